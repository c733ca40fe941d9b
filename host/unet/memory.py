"""The memory of a guided step: what it needs beside an ordinary one, and how it does with less.

With less, parts of the UNet are computed again in the backward pass. The gradient is the same; only time is spent.
"feed-forward" recomputes what costs least beside what it frees, "blocks" everything. What is needed is asked of the host
before it loads the model.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.ldm.modules.attention import GEGLU, BasicTransformerBlock, FeedForward, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch.utils.checkpoint import checkpoint

from ...attention_patches.attention import (
    AttentionSite,
    Layer,
    cross_attention_sites,
    is_unet,
    layers,
    own_attribute,
    size_after,
)
from ...attention_patches.joint import JointSite, blocks_before
from .gradients import has_constant_weights, recording_again, weights_stay_put
from .transformer_memory import pass_memory

MODES = ("none", "feed-forward", "blocks")
# Elements of a feed-forward layer's input that are worked on at once at "blocks"; the layer widens them 24 times.
PIECE = 2**19
MEMORY = "pix2pix_zero_memory"
TOKENS = 77  # of one chunk of a CLIP text
SLACK = 1.02  # for what is not counted layer by layer: the embedded time, the norms' statistics
MAP_ITEM = 4  # maps, and the gradients of their distance, are fp32 in every precision


@contextlib.contextmanager
def checkpointed(
    unet: torch.nn.Module, mode: str, last_site: AttentionSite | JointSite | None = None
) -> Iterator[None]:
    """While active, a graph through ComfyUI's UNetModel keeps only the inputs of some modules.

    Take the gradient before leaving, for the modules run again then. Calls that record no graph go straight through.

    `mode`: "none"; "feed-forward", the feed-forward layers of the transformers and, of residual blocks, all but the
    convolutions; "blocks", every residual block and transformer, and within them the same once more. Of a diffusion
    transformer both are the blocks ahead of that of `last_site`.
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
    unet: torch.nn.Module, mode: str, last_site: AttentionSite | JointSite | None = None
) -> list[torch.nn.Module]:
    """The modules whose forward is computed again at this mode, see `checkpointed`."""
    if mode not in MODES:
        raise ValueError(f"checkpointing: {mode!r} is none of {', '.join(MODES)}.")
    if mode == "none":
        return []
    if not is_unet(unet):
        return blocks_before(unet, last_site)
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


def _needs_gradient(values: Iterable) -> bool:
    return any(_needs_gradient(value) if isinstance(value, (list, tuple)) else _in_graph(value) for value in values)


def graph_memory(
    unet: torch.nn.Module,
    latent_shape: tuple[int, ...],
    mode: str,
    dtype: torch.dtype,
    constant_weights: bool = True,
    tokens: int = TOKENS,
) -> int:
    """Bytes that one guided pass of ComfyUI's UNetModel needs at its peak, activations of an ordinary pass included.

    `latent_shape`: [B, C, H, W] of the latent. `mode`: see `checkpointed`. `dtype`: of the computation.
    `constant_weights`: False where weights are
    cast or moved for each layer, so that the pass holds copies of them. `tokens`: of the text.
    """
    item = dtype.itemsize
    last_site = cross_attention_sites(unet)[-1]  # where recording ends
    kept = working = copies = one_copy = 0
    ended = False
    for layer, pixels in _sized_layers(unet, latent_shape):
        if ended:  # the rest of the pass runs while the graph is kept
            working = max(working, _unrecorded(layer.module, pixels * item))
            continue
        here = last_site if (layer.block, layer.number) == last_site[:2] else None
        cost = _cost(layer.module, pixels, mode, item, here, tokens)
        kept += cost.kept
        working = max(working, cost.working)
        if not constant_weights:
            held, at_work = (count * item for count in _copied_weights(layer.module, mode))
            copies += held
            one_copy = max(one_copy, at_work)
        ended = cost.ends
    return int(SLACK * (kept + working)) + copies + one_copy


@dataclass
class _Cost:
    """Bytes a layer keeps for the backward pass, those at work in its own backward, and whether recording ends in it."""

    kept: int = 0
    working: int = 0
    ends: bool = False


def _sized_layers(unet: torch.nn.Module, latent_shape: tuple[int, ...]) -> Iterator[tuple[Layer, int]]:
    """The layers in the order of the forward pass, each with B*H*W of its input."""
    for layer in layers(unet):
        yield layer, latent_shape[0] * math.prod(size_after(layer.halvings, latent_shape[-2:]))


def _cost(
    layer: torch.nn.Module, pixels: int, mode: str, item: int, last_site: AttentionSite | None, tokens: int
) -> _Cost:
    if isinstance(layer, ResBlock):
        return _residual_cost(layer, pixels * item, mode)
    if isinstance(layer, SpatialTransformer):
        return _transformer_cost(layer, pixels, mode, item, last_site, tokens)
    return _Cost()


def _unrecorded(layer: torch.nn.Module, size: int) -> int:
    """Bytes at work in a residual block, the largest of layers, when nothing is recorded: inputs, joined, and outputs."""
    return 5 * layer.channels * size if isinstance(layer, ResBlock) else 0


def _residual_cost(block: ResBlock, size: int, mode: str) -> _Cost:
    # Each of its two halves keeps the input of the norm and that of the activation; convolutions keep nothing.
    inside = 2 * (block.channels + block.out_channels) * size
    if mode == "none":
        return _Cost(inside, inside // 2)
    if mode == "feed-forward":
        return _Cost(inside // 2, inside)
    return _Cost(block.channels * size, inside + inside // 2)


def _transformer_cost(
    layer: SpatialTransformer, pixels: int, mode: str, item: int, last_site: AttentionSite | None, tokens: int
) -> _Cost:
    blocks = list(layer.transformer_blocks)
    cost = _Cost(layer.in_channels * pixels * item, ends=last_site is not None)
    whole = mode == "blocks" and len(blocks) == 1 and last_site is None
    for index, block in enumerate(blocks):
        ends = last_site is not None and index == last_site.index
        attention, feed_forward, width = _block_sizes(block, pixels, item)
        if ends:  # the rest of the block runs, but is not recorded
            cost.working = max(cost.working, feed_forward * 4 // 3 + 2 * width)
            feed_forward = 0
        inside = attention + feed_forward
        maps = 3 * block.n_heads * pixels * tokens * MAP_ITEM
        if mode == "none" or ends:
            cost.kept += inside
            cost.working = max(cost.working, feed_forward, maps)
        elif mode == "feed-forward":
            cost.kept += attention + width
            cost.working = max(cost.working, 2 * feed_forward, maps)
        else:
            cost.kept += 0 if whole else width
            piece = min(2 * feed_forward, 24 * PIECE * item)
            cost.working = max(cost.working, attention + max(piece, maps, 6 * width))
        if ends:
            break
    return cost


def _copied_weights(layer: torch.nn.Module, mode: str) -> tuple[int, int]:
    """Elements of the weights whose copies a layer keeps for the backward pass, and of those in its own backward."""
    if isinstance(layer, ResBlock):
        # The layers for the time's embedding take no part: they have no input that a gradient is wanted for.
        halves = _weights(layer.in_layers), _weights(layer.out_layers)
        every = sum(halves) + _weights(layer.skip_connection)
        kept = {"none": every, "feed-forward": every - sum(halves), "blocks": 0}[mode]
        return kept, {"none": 0, "feed-forward": max(halves), "blocks": every}[mode]
    if isinstance(layer, SpatialTransformer):
        feed_forwards = [_weights(block.ff) for block in layer.transformer_blocks]
        # Neither do keys and values of the text.
        blocks = [
            _weights(block) - (_weights(block.attn2.to_k) + _weights(block.attn2.to_v) if block.attn2 else 0)
            for block in layer.transformer_blocks
        ]
        around = _weights(layer) - sum(map(_weights, layer.transformer_blocks))
        if mode == "none":
            return sum(blocks) + around, 0
        if mode == "feed-forward":
            return sum(blocks) - sum(feed_forwards) + around, max(feed_forwards)
        return (0, blocks[0] + around) if len(blocks) == 1 else (around, max(blocks))
    if mode == "blocks" and isinstance(layer, (Downsample, Upsample)):
        return 0, _weights(layer)
    return _weights(layer), 0


def _weights(module: torch.nn.Module) -> int:
    # Those of norms and offsets do not count beside matrices.
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def _block_sizes(block: BasicTransformerBlock, pixels: int, item: int) -> tuple[int, int, int]:
    """Bytes kept by the attentions of a transformer block, by its feed-forward layer, and of its input."""
    dim = block.norm1.normalized_shape[0]
    width = dim * pixels * item
    # Inputs of the three norms; query, key, value, output of self-attention; query and output of cross-attention; the
    # distance's gradient; the attentions' normalizers.
    attention = 9 * width + dim * pixels * MAP_ITEM + 2 * block.n_heads * pixels * 4
    inner = block.ff.net[-1].in_features * pixels * item
    return attention, 3 * inner if isinstance(block.ff.net[0], GEGLU) else inner, width


def map_memory(unet: torch.nn.Module, latent_shape: tuple[int, ...], tokens: int = TOKENS) -> int:
    """Bytes of the maps of all cross-attentions for latents [B, C, H, W], as they are recorded of the source."""
    heads = (
        (block.n_heads, pixels)
        for layer, pixels in _sized_layers(unet, latent_shape)
        if isinstance(layer.module, SpatialTransformer)
        for block in layer.module.transformer_blocks
        if block.attn2 is not None
    )
    return sum(count * pixels for count, pixels in heads) * tokens * MAP_ITEM


def guided_pass_memory(
    model: ModelPatcher, latent_shape: tuple[int, ...], mode: str, tokens: int = TOKENS, records: bool = False
) -> int:
    """`graph_memory` of a MODEL as it is loaded now. `latent_shape`: [B, C, H, W].

    `records`: with the reference's maps, which are held meanwhile where the inversion has not kept them.
    """
    base = model.model
    constant = has_constant_weights(base, model.load_device)
    dtype = base.get_dtype_inference()
    if not is_unet(base.diffusion_model):
        return pass_memory(base.diffusion_model, latent_shape, (mode, dtype.itemsize, tokens), constant, records)
    graph = graph_memory(base.diffusion_model, latent_shape, mode, dtype, constant_weights=constant, tokens=tokens)
    return graph + (map_memory(base.diffusion_model, latent_shape, tokens) if records else 0)


def affordable_mode(model: ModelPatcher, x: torch.Tensor, least: str, **needs) -> str:
    """The checkpointing mode for guiding `x` [B, C, H, W]: `least`, or the first after it that fits in free memory.

    Copies of weights that are cast or moved for each layer count, so that a model that is offloaded since it does not
    fit is guided with "blocks", which holds one block's copies at a time. `needs`: see `guided_pass_memory`.
    """
    free = comfy.model_management.get_free_memory(x.device)
    for mode in MODES[MODES.index(least) :]:
        if guided_pass_memory(model, x.shape, mode, **needs) <= free:
            return mode
    return MODES[-1]


def affordable_rows(model: ModelPatcher, x: torch.Tensor, mode: str, entries: int = 1, **needs) -> int:
    """How many latents like those of `x` [B, C, H, W] can be guided at once with a checkpointing mode, at least 1.

    At most B times `entries`, the number of texts that draw each of them. `needs`: see `guided_pass_memory`.
    """
    free = comfy.model_management.get_free_memory(x.device)
    sizes = range(len(x) * entries, 1, -1)
    return next((rows for rows in sizes if guided_pass_memory(model, (rows, *x.shape[1:]), mode, **needs) <= free), 1)


def announce_memory(model: ModelPatcher, amount: int) -> ModelPatcher:
    """A clone of the MODEL for whose sampling the host keeps `amount` bytes more free."""
    model = model.clone()

    def prepare(executor: Callable, patcher, noise_shape, *args, **kwargs):
        # The host's estimate is proportional to the batch, and the batch is all it reads of the shape's first entry.
        one, two = (patcher.model.memory_required([rows, *noise_shape[1:]]) for rows in (1, 2))
        rows = math.ceil(amount / max(two - one, 1))
        return executor(patcher, [noise_shape[0] + rows, *noise_shape[1:]], *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, MEMORY, prepare)
    return model
