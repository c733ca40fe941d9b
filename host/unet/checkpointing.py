"""Less memory for a gradient through the UNet: parts of it are computed again in the backward pass.

The gradient is the same; only time is spent. "feed-forward" recomputes what costs least beside what it frees, "blocks"
everything.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from comfy.ldm.modules.attention import FeedForward, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample
from torch.utils.checkpoint import checkpoint

from ...attention_patches.attention import AttentionSite, layers
from .gradients import own_attribute, recording_again, weights_stay_put

MODES = ("none", "feed-forward", "blocks")
# Elements of a feed-forward layer's input that are worked on at once at "blocks"; the layer widens them 24 times.
PIECE = 2**19


@contextlib.contextmanager
def checkpointed(unet: torch.nn.Module, mode: str, last_site: AttentionSite | None = None) -> Iterator[None]:
    """While active, a graph through ComfyUI's UNetModel keeps only the inputs of some modules.

    Take the gradient before leaving, for the modules run again then. Calls that record no graph go straight through.

    `mode`: "none"; "feed-forward", the feed-forward layers of the transformers and, of residual blocks, all but the
    convolutions; "blocks", every residual block and transformer, and within them the same once more.
    `last_site`: recording ends inside the transformer block of this cross-attention, so it keeps what it needs at
    "blocks"; its backward is the first to run.

    Raises ValueError: an unknown mode.
    """
    with contextlib.ExitStack() as stack:
        for module in recomputed_modules(unet, mode, last_site):
            in_pieces = mode == "blocks" and isinstance(module, FeedForward)
            stack.enter_context(_recomputing(module, PIECE if in_pieces else None))
        yield


def recomputed_modules(
    unet: torch.nn.Module, mode: str, last_site: AttentionSite | None = None
) -> list[torch.nn.Module]:
    """The modules whose forward is computed again at this mode, see `checkpointed`."""
    if mode not in MODES:
        raise ValueError(f"checkpointing: {mode!r} is none of {', '.join(MODES)}.")
    if mode == "none":
        return []
    # Within a block, too: its repetition ends before its feed-forward layer, so that this costs nothing more.
    cheap = list(_cheap_modules(unet))
    return cheap if mode == "feed-forward" else [*cheap, *_blocks(unet, last_site)]


def _cheap_modules(unet: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for module in unet.modules():
        if isinstance(module, FeedForward):
            yield module
        elif isinstance(module, ResBlock):
            # Their convolutions keep nothing, so that the recomputation ends before them.
            yield module.in_layers
            yield module.out_layers


def _blocks(unet: torch.nn.Module, last_site: AttentionSite | None) -> Iterator[torch.nn.Module]:
    for layer in layers(unet):
        if isinstance(layer.module, (ResBlock, Downsample, Upsample)):
            yield layer.module
        elif isinstance(layer.module, SpatialTransformer):
            blocks = list(layer.module.transformer_blocks)
            if last_site is not None and (layer.block, layer.number) == last_site[:2]:
                yield from (block for index, block in enumerate(blocks) if index != last_site.index)
            elif len(blocks) == 1:
                yield layer.module
            else:
                # Only one of several blocks is alive at a time.
                yield from blocks


def _recomputing(module: torch.nn.Module, piece: int | None) -> contextlib.AbstractContextManager:
    forward = module.forward

    def recomputed(*args, **kwargs):
        if not torch.is_grad_enabled() or not _needs_gradient((*args, *kwargs.values())):
            return forward(*args, **kwargs)
        if isinstance(module, (Downsample, Upsample)) and weights_stay_put(module, args[0].device, args[0].dtype):
            return forward(*args, **kwargs)  # It keeps a copy of its weight or nothing.
        if piece is not None and not kwargs and len(args) == 1 and args[0].ndim == 3:
            # Such a layer knows no neighbours: tokens [B, tokens, dim] may pass in any portions.
            tokens = max(1, piece // (args[0].shape[0] * args[0].shape[2]))
            return torch.cat([_checkpoint(forward, part) for part in args[0].split(tokens, dim=1)], dim=1)
        return _checkpoint(forward, *args, **kwargs)

    return own_attribute(module, "forward", recomputed)


def _checkpoint(forward: Callable, *args, **kwargs):
    call = _Repeatable(forward, args, kwargs)
    out = checkpoint(
        call,
        *call.graph_tensors(),
        use_reentrant=False,
        preserve_rng_state=True,  # patches such as HyperTile draw lots
        context_fn=lambda: (contextlib.nullcontext(), recording_again()),
    )
    error, call.error = call.error, None
    try:
        if error is not None:
            raise error
        return out
    finally:
        del error  # or its traceback would hold on to this frame, and with it to tensors


class _Repeatable:
    """A call of a forward with the same arguments each time, given its tensors of the graph.

    Only those are handed to autograd, which drops them within an outer repetition and is strict about them: others,
    such as the text, are touched up in place by fp8 layers.
    The UNet's loop writes the current block into its transformer options: the first run gets the options themselves,
    since others may read what is written there, each later run a copy of what they were.
    """

    def __init__(self, forward: Callable, args: tuple, kwargs: dict):
        self.forward = forward
        self.names = list(kwargs)
        self.values = [*args, *kwargs.values()]
        self.options = {i: value.copy() for i, value in enumerate(self.values) if isinstance(value, dict)}
        self.in_graph = [i for i, value in enumerate(self.values) if _in_graph(value)]
        self.repeats = False
        self.error: BaseException | None = None

    def graph_tensors(self) -> list[torch.Tensor]:
        """The tensors to call this with. They are given away: asked for once."""
        tensors = [self.values[i] for i in self.in_graph]
        for i in self.in_graph:
            self.values[i] = None
        return tensors

    def __call__(self, *tensors: torch.Tensor):
        values = self.values.copy()
        for i, tensor in zip(self.in_graph, tensors):
            values[i] = tensor
        positional = len(values) - len(self.names)
        if not self.repeats:
            self.repeats = True
            try:
                return self.forward(*values[:positional], **dict(zip(self.names, values[positional:])))
            except BaseException as error:
                # `checkpoint` leaves its hooks behind when an error passes through it: that one is raised afterwards.
                self.error = error
                return None
        for i, options in self.options.items():
            values[i] = options.copy()
        return self.forward(*values[:positional], **dict(zip(self.names, values[positional:])))


def _in_graph(value) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _needs_gradient(values) -> bool:
    return any(_needs_gradient(value) if isinstance(value, (list, tuple)) else _in_graph(value) for value in values)
