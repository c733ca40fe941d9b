"""Where diffusion transformers attend, and reaching each attention there in one call.

Most let the picture and the text attend together: one table says where their blocks are and which rows are the picture's.
Attention is reached by the host's override, the only place where every family shows q, k and v, and the block that it is
called from by the forwards of the blocks, which are afterwards what they were.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from .attention import own_attribute

OVERRIDE = "optimized_attention_override"
CHOSEN = 5
"""As many blocks hold the layout where none are known to: as many as Shin et al. (ICCV 2025) find enough."""

OTHER_ROWS = (
    "model: another patch changes how many rows of its attention are the picture's (ToMe, a reference of another kind?). "
    "Take it out."
)


class JointSite(NamedTuple):
    """The attention that block `number` of a list of blocks calls as its `call`th."""

    blocks: str
    number: int
    call: int = 0


class Known(NamedTuple):
    """Blocks as (list, number): those that hold the layout, and those whose maps tell things apart."""

    holding: tuple[tuple[str, int], ...]
    reading: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class JointFamily:
    """How a class of diffusion transformers attends.

    `blocks`: its lists of blocks, in the order of the forward pass. The rows of the picture come last, or first with
    `picture_first`; `references`: whether the tokens of reference latents come after them. `before_text`: rows ahead of the
    text's. `padding`: the attribute that says of what number the rows of the picture are a multiple. `ahead`: lists of
    blocks that the picture alone passes first. `reads_apart`: the text is read by a second attention of the block, and the
    first is the picture's own. `known`: by the numbers of blocks in a model, what is known of them.
    """

    blocks: tuple[str, ...]
    picture_first: bool = False
    references: bool = False
    before_text: int = 0
    padding: str = ""
    ahead: tuple[str, ...] = ()
    reads_apart: bool = False
    known: dict[tuple[int, ...], Known] = field(default_factory=dict)


def _of(name: str, *numbers: int) -> tuple[tuple[str, int], ...]:
    return tuple((name, number) for number in numbers)


STREAMS = ("double_blocks", "single_blocks")
# FLUX.1: the vital layers of Avrahami et al., "Stable Flow", CVPR 2025. SD 3.5 Medium: Hu et al., "LayerVerse", ECCV 2026.
FLUX_HOLDING = (*_of(STREAMS[0], 0, 1, 17, 18), *_of(STREAMS[1], 6, 9, 34, 35, 37))
SD35_HOLDING = _of("joint_blocks", 0, 1, 3, 4, 12, 14, 17, 18, 19)
# The blocks whose maps tell things apart, of the same source.
FLUX_READING = (*_of(STREAMS[0], 14, 17, 18), *_of(STREAMS[1], 4))
SD35_READING = _of("joint_blocks", 7, 9, 13, 23)
FLUX = JointFamily(STREAMS, references=True, known={(19, 38): Known(FLUX_HOLDING, FLUX_READING)})
SD3 = JointFamily(("joint_blocks",), known={(24,): Known(SD35_HOLDING, SD35_READING)})
FAMILIES = {
    "comfy.ldm.modules.diffusionmodules.mmdit.MMDiT": SD3,
    "comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper": SD3,
    "comfy.ldm.flux.model.Flux": FLUX,
    "comfy.ldm.chroma.model.Chroma": FLUX,
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": JointFamily(("transformer_blocks",), references=True),
    "comfy.ldm.lumina.model.NextDiT": JointFamily(("layers",), padding="pad_tokens_multiple", ahead=("noise_refiner",)),
    "comfy.ldm.aura.mmdit.MMDiT": JointFamily(("double_layers", "single_layers"), before_text=8),
    "comfy.ldm.hidream.model.HiDreamImageTransformer2DModel": JointFamily(
        ("double_stream_blocks", "single_stream_blocks"), picture_first=True
    ),
    "comfy.ldm.hunyuan_video.model.HunyuanVideo": JointFamily(STREAMS),
    "comfy.ldm.wan.model.WanModel": JointFamily(("blocks",), reads_apart=True),
    "comfy.ldm.kandinsky5.model.Kandinsky5": JointFamily(("visual_transformer_blocks",), reads_apart=True),
    "comfy.ldm.anima.model.Anima": JointFamily(("blocks",), reads_apart=True),
    "comfy.ldm.cosmos.predict2.MiniTrainDIT": JointFamily(("blocks",), reads_apart=True),
}


def joint_family(dit: torch.nn.Module) -> JointFamily | None:
    """How a diffusion model attends; None for a UNet, and for a class that is not known."""
    kind = type(dit)
    return FAMILIES.get(f"{kind.__module__}.{kind.__qualname__}")


def joint_sites(dit: torch.nn.Module) -> list[JointSite]:
    """The first attention of each block, in the order of the forward pass; there the picture's rows attend to each other.

    Raises ValueError for a class that is not known.
    """
    family = joint_family(dit)
    if family is None:
        raise ValueError(
            f"model: where {type(dit).__name__} attends is not known here. Use a UNet (SD 1.x, SD 2.x, SDXL), or a model of the "
            "families in the README's table."
        )
    return [JointSite(name, number) for name in family.blocks for number in range(len(getattr(dit, name)))]


def holding_sites(dit: torch.nn.Module) -> list[JointSite]:
    """The blocks whose keys and values hold the layout: those that are known, or else some spread evenly."""
    sites, known = joint_sites(dit), known_blocks(dit)
    if known is not None:
        return [site for site in sites if site[:2] in known.holding]
    return sites[:: math.ceil(len(sites) / CHOSEN)]


def reading_calls(dit: torch.nn.Module) -> list[JointSite]:
    """Every attention where the picture reads the text, in the order of the forward pass."""
    apart = int(joint_family(dit).reads_apart)
    return [site._replace(call=apart) for site in joint_sites(dit)]


def reading_sites(dit: torch.nn.Module) -> list[JointSite]:
    """Those of them where things are told apart: in the blocks that are known for it, or else all."""
    known = known_blocks(dit)
    return [site for site in reading_calls(dit) if known is None or site[:2] in known.reading]


def known_blocks(dit: torch.nn.Module) -> Known | None:
    """What is known of a model's blocks."""
    family = joint_family(dit)
    return family.known.get(tuple(len(getattr(dit, name)) for name in family.blocks))


def united(dit: torch.nn.Module, chosen: Sequence[Collection[JointSite]]) -> list[JointSite]:
    """The attentions that are in any of some choices, in the order of the forward pass."""
    blocks = [site[:2] for site in joint_sites(dit)]
    return sorted({site for sites in chosen for site in sites}, key=lambda site: (blocks.index(site[:2]), site.call))


def early_sites(dit: torch.nn.Module, holding: list[JointSite]) -> list[JointSite]:
    """The blocks whose features hold shapes: those of the first third that hold the layout, or else the first block."""
    sites = joint_sites(dit)
    early = set(sites[: math.ceil(len(sites) / 3)])
    return [site for site in holding if site in early] or sites[:1]


def blocks_before(dit: torch.nn.Module, site: JointSite) -> list[torch.nn.Module]:
    """The blocks ahead of that of a site which the picture passes, in the order of the forward pass."""
    blocks = [each[:2] for each in joint_sites(dit)]
    ahead = [block for name in joint_family(dit).ahead for block in getattr(dit, name)]
    return ahead + [getattr(dit, name)[number] for name, number in blocks[: blocks.index(site[:2])]]


def patch_side(dit: torch.nn.Module) -> int:
    """How many latent pixels, along a side, a row of a diffusion transformer stands for."""
    size = getattr(dit, "patch_spatial", None) or dit.patch_size
    return size if isinstance(size, int) else size[-1]


def patches(dit: torch.nn.Module, latent: torch.Tensor) -> int:
    """How many rows a latent [.., H, W] is in a diffusion transformer."""
    side = patch_side(dit)
    return math.ceil(latent.shape[-2] / side) * math.ceil(latent.shape[-1] / side)


@dataclass(frozen=True)
class Attention:
    """One attention at work. `picture`: the picture's rows among the queries. `mask`, `scale(q)`: of its softmax.

    Called with q, k and v [B, heads, rows, d] it gives what the host, and the overrides of other packs, make of
    them: [B, rows, heads*d].
    """

    rows: "_Rows"
    picture: slice
    function: Callable
    arguments: tuple
    options: dict[str, Any]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not self.options.get("skip_reshape"):
            q, k, v = (tensor.transpose(1, 2).flatten(2) for tensor in (q, k, v))
        out = self.function(q, k, v, *self.arguments, **self.options)
        return out.transpose(1, 2).flatten(2) if self.options.get("skip_output_reshape") else out

    @property
    def heads(self) -> int:
        return self.arguments[0] if self.arguments else self.options["heads"]

    @property
    def mask(self) -> torch.Tensor | None:
        return self.arguments[1] if len(self.arguments) > 1 else self.options.get("mask")

    def scale(self, q: torch.Tensor) -> float:
        return self.options.get("scale") or q.shape[-1] ** -0.5

    def text(self, rows: int) -> slice:
        """Where the keys of a text of so many rows are, without what the model puts around it."""
        return self.rows.text(rows)

    def of_rows(self, rows: slice) -> "Attention":
        """The same in some rows of the batch."""
        mask = self.mask
        if mask is None or mask.ndim < 3 or len(mask) == 1:
            return self
        return replace(self, arguments=(self.heads, mask[rows]), options={**self.options, "mask": None})

    def by_head(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v, as the host passes them, [B, heads, rows, d]."""
        if self.options.get("skip_reshape"):
            return tensors
        flat = [tensor.flatten(2) for tensor in tensors]  # SD 3's v has its heads apart
        width = flat[0].shape[-1] // self.heads
        return tuple(tensor.unflatten(-1, (-1, width)).transpose(1, 2) for tensor in flat)

    def as_the_host(self, out: torch.Tensor) -> torch.Tensor:
        """Of an output [B, rows, heads*d]."""
        if self.options.get("skip_output_reshape"):
            return out.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return out


Attend = Callable[[JointSite, Attention, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def with_joint_attention(
    call, sites: Collection[JointSite], attend: Attend, transformer_options: dict
) -> Iterator[dict]:
    """While active, `attend(site, attention, q, k, v)` gives the output of the attention at `sites`: [B, rows, heads*d].

    `call`: the call of the model, with its latent `x` and its further `arguments`. q, k and v are [B, heads, rows, d].
    Yields the transformer options to call the model with. An override of another pack gets what `attend` goes on with.
    """
    dit = call.model.diffusion_model
    rows = _Rows(dit, call)
    here = _Here()
    previous = transformer_options.get(OVERRIDE)

    def override(func: Callable, q, k, v, *arguments, **options):
        site = here.next()
        function = func if previous is None else partial(previous, func)
        if site not in sites:
            return function(q, k, v, *arguments, **options)
        attention = Attention(rows, rows.picture(q.shape[-2]), function, arguments, options)
        return attention.as_the_host(attend(site, attention, *attention.by_head(q, k, v)))

    with contextlib.ExitStack() as hooks:
        for name, number in {site[:2] for site in sites}:
            block = getattr(dit, name)[number]
            # No hooks: a forward that is computed again in the backward pass does not call them.
            hooks.enter_context(own_attribute(block, "forward", here.within(name, number, block.forward)))
        yield {**transformer_options, OVERRIDE: override}


class _Here:
    """The block that is running, and how often it has called attention."""

    def __init__(self):
        self.block: tuple[str, int] | None = None
        self.calls = 0

    def within(self, name: str, number: int, forward: Callable) -> Callable:
        """The forward of a block, which tells that it runs."""

        def told(*args, **kwargs):
            self.block, self.calls = (name, number), 0
            try:
                return forward(*args, **kwargs)
            finally:
                self.block = None

        return told

    def next(self) -> JointSite | None:
        if self.block is None:
            return None
        self.calls += 1
        return JointSite(*self.block, self.calls - 1)


class _Rows:
    """Which rows are the picture's, and which the text's, in a call of a model."""

    def __init__(self, dit: torch.nn.Module, call):
        self.family = joint_family(dit)
        self.call = call
        self.count = patches(dit, call.x)
        padding = getattr(dit, self.family.padding, None) if self.family.padding else None
        self.behind = (-self.count) % padding if padding else 0
        if self.family.references:
            self.behind += sum(patches(dit, latent) for latent in call.arguments.get("ref_latents") or ())

    def picture(self, total: int) -> slice:
        start = 0 if self.family.picture_first else total - self.behind - self.count
        if start < 0 or start + self.count > total:
            raise ValueError(OTHER_ROWS)
        return slice(start, start + self.count)

    def text(self, rows: int) -> slice:
        if self.family.reads_apart:
            return slice(0, rows)
        start = self.count if self.family.picture_first else self.family.before_text
        start += self.call.arguments["c_crossattn"].shape[1] - rows  # that a model pads it with in front
        return slice(start, start + rows)
