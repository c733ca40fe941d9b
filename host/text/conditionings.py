"""CONDITIONINGs in a sampling: whether they fit, several as one, and their entries, which draw one estimate together.

What the host has processed for a guider is a list of dicts, one for each entry; what comes in at a socket is a list of
[text, options].
"""

import math
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.model_base import SDXL, SDXLRefiner
from comfy.model_patcher import ModelPatcher
from comfy.samplers import get_area_and_mult

from ...attention_patches.attention import is_unet, layers
from ...editing.trajectory import Inversion
from .. import messages
from ..sampling.checks import check_finite
from ..sampling.source import check_masks

TEXT_LENGTHS = "pix2pix_zero_text_lengths"  # in a conditioning's options: of each row, before it was repeated
WORDS = "pix2pix_zero_words"
"""In a conditioning's options: ((row of the source's text, row of this one), ..) of the words of the caption, None where they
are not known; in a tuple with those of all texts, or of each."""
# Of inpainting and pix2pix models: the further channels of the UNet's input.
FURTHER_CHANNELS = ("concat_latent_image", "concat_mask")
# Of edit models, such as Flux Kontext and Qwen-Image-Edit: pictures that stand beside the text.
REFERENCES = ("reference_latents", "reference_latents_method", "ref_latent")
# What an encoder gives of a text beside its rows, one row for each text.
BESIDE_TEXT = ("pooled_output", "conditioning_llama3", "conditioning_byt5small", "attention_mask")
EMBEDDED = 256  # numbers that SDXL makes of each size it is told, beside the pooled text
SIZES = ((SDXL, 6), (SDXLRefiner, 5))


def stack_conditionings(conditionings: list[list], socket: str) -> list:
    """Several CONDITIONINGs as one with a row for each. A single one is returned as it is.

    Texts of unequal length are repeated to a common one, which leaves cross-attention as it was; their own are in the
    options, as `TEXT_LENGTHS`. Raises ValueError if they have unequal numbers of parts, come from different text encoders
    or are limited differently, by a mask, an area, a time range or a ControlNet.
    """
    if len(conditionings) == 1:
        return conditionings[0]
    if len({len(conditioning) for conditioning in conditionings}) > 1:
        raise ValueError(f"{socket}: the texts of one batch must be combined alike. Encode each with the same nodes.")
    return [_stack_entries(entries, socket) for entries in zip(*conditionings)]


def _stack_entries(entries: tuple, socket: str) -> list:
    texts = [text for text, _ in entries]
    if any(text is None for text in texts):
        raise ValueError(f"{socket}: one of its entries has no text. Encode each with CLIP Text Encode.")
    if len({text.shape[2:] for text in texts}) > 1:
        raise ValueError(f"{socket}: the texts of one batch come from different text encoders. Use one CLIP.")
    lengths = tuple(text.shape[1] for text in texts)
    tokens = math.lcm(*lengths)
    others = [{name: value for name, value in options.items() if name != WORDS} for _, options in entries]
    extras = _common_options(others, socket)
    words = _words_of_each(entries)
    if any(words):
        extras[WORDS] = words
    if len(set(lengths)) > 1:
        extras[TEXT_LENGTHS] = lengths
    return [torch.cat([text.repeat(1, tokens // text.shape[1], 1) for text in texts]), extras]


def _words_of_each(entries: tuple) -> tuple:
    """The `WORDS` of stacked texts: one for all where they are the same."""
    words = []
    for text, options in entries:
        own = options.get(WORDS, (None,))
        words += own * (len(text) // len(own))
    return tuple(words[:1] if len(set(words)) == 1 else words)


def _common_options(options: list[dict], socket: str) -> dict:
    """The options that all entries have, with the pooled texts and the like as rows."""
    others = [{name: value for name, value in each.items() if name not in BESIDE_TEXT} for each in options]
    beside = {name: [each.get(name) for each in options] for name in BESIDE_TEXT}
    shapes = [{None if value is None else value.shape for value in values} for values in beside.values()]
    if any(not _equal(each, others[0]) for each in others) or any(len(each) > 1 for each in shapes):
        raise ValueError(
            f"{socket}: the texts of one batch must be limited alike (mask, area, time range, ControlNet). Use one limit for "
            "all, or edit the pictures one by one, as a list."
        )
    rows = {name: torch.cat(values) for name, values in beside.items() if values[0] is not None}
    return {**options[0], **rows}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b.to(a))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if a is b or type(a) is not type(b):
        return a is b
    if not isinstance(a, Hashable) and hasattr(a, "__dict__"):  # compared by what they hold, which may be tensors
        return _equal(vars(a), vars(b))
    return bool(a == b)


def check_conditioning(conditioning: list, batch: int, socket: str) -> None:
    """Raise ValueError unless every text of a CONDITIONING is finite and has one row, or one per picture of the batch.

    Its masks too are one for all pictures, or as many as these or more.
    """
    if not conditioning:
        raise ValueError(f"{socket}: it is empty. Connect an encoded text.")
    for text, options in conditioning:
        if text is not None and len(text) not in (1, batch):
            raise ValueError(
                f"{socket}: it holds {len(text)} texts for {batch} pictures. Give one text, or one per picture."
            )
        for values in (text, options.get("pooled_output"), options.get("mask")):
            if isinstance(values, torch.Tensor):
                check_finite(values, socket, "Encode the text again, with the CLIP in fp32.")
        if torch.is_tensor(options.get("mask")):
            check_masks(options["mask"], batch, socket)


def check_width(model: ModelPatcher, conditioning: list, socket: str) -> None:
    """Raise ValueError if the UNet of a MODEL cannot read the texts of a CONDITIONING: those of another CLIP."""
    unet = model.model.diffusion_model
    width = _text_width(unet) if is_unet(unet) else None
    pooled_width = next(
        (model.model.adm_channels - EMBEDDED * n for kind, n in SIZES if isinstance(model.model, kind)), None
    )
    advice = "Encode the text with the CLIP that belongs to the model."
    for text, options in conditioning:
        if text is None and width is not None:
            raise ValueError(f"{socket}: it has no text, which the model reads. {advice}")
        if text is not None and width is not None and text.shape[-1] != width:
            raise ValueError(
                f"{socket}: its text has {text.shape[-1]} values for each token, the model reads {width}. {advice}"
            )
        if pooled_width is None or "unclip_conditioning" in options:
            continue
        pooled = options.get("pooled_output")
        if not torch.is_tensor(pooled) or pooled.ndim != 2 or pooled.shape[-1] != pooled_width:
            raise ValueError(
                f"{socket}: it has no pooled text of {pooled_width} values, which the model reads. {advice}"
            )


def _text_width(unet: torch.nn.Module) -> int | None:
    """The width of the texts that a UNet attends to."""
    for layer in layers(unet):
        if isinstance(layer.module, SpatialTransformer):
            for block in layer.module.transformer_blocks:
                keys = getattr(getattr(block, "attn2", None), "to_k", None)
                if keys is not None:
                    return getattr(keys, "in_features", None)
    return None


def check_lengths(conditioning: list, model: ModelPatcher, socket: str) -> None:
    """Raise ValueError if texts of unequal length were joined for a MODEL whose picture and text attend together.

    A text that is repeated is another one there.
    """
    if any(TEXT_LENGTHS in options for _, options in conditioning) and not is_unet(model.model.diffusion_model):
        raise ValueError(
            f"{socket}: its texts have unequal numbers of tokens, which this model cannot draw in one batch. Bring the pictures "
            "as a list, one by one."
        )


def check_whole_sampling(conditioning: list, model: ModelPatcher, sigmas: torch.Tensor, socket: str) -> None:
    """Raise ValueError if a CONDITIONING says nothing at one of the noise levels that the UNet is told.

    `sigmas`: in any order; a level of 0 is never told.
    """
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    windows = [
        (to_sigma(options.get("start_percent", 0.0)), to_sigma(options.get("end_percent", 1.0)))
        for _, options in conditioning
    ]
    for sigma in sigmas.tolist():
        if sigma > 0 and not any(last <= sigma <= first for first, last in windows):
            raise ValueError(
                f"{socket}: it is limited to a part of the sampling (ConditioningSetTimestepRange?) and says nothing at noise "
                f"level {sigma:.2f}. Use a text for all of it, or combine it with one for the rest."
            )


def draws_negative(model: ModelPatcher, cfg: float) -> bool:
    """Whether the host evaluates the negative text at this `cfg`: at 1 it only does for patches that ask for it."""
    return not math.isclose(cfg, 1.0) or model.model_options.get("disable_cfg1_optimization", False)


def beside_the_source(conditioning: list, source: list, socket: str) -> list:
    """A CONDITIONING of an edit with the further input channels and references of `source` where it names none of its own.

    A text that is the source's own counts as a description of the picture even as the negative: else a model with
    aesthetic scores (SDXL's refiner) would be told that it describes an ugly one, and the two would not cancel.
    Raises ValueError if it cannot be told which part of the source an entry stands beside.
    """
    completed = []
    for i, (text, options) in enumerate(conditioning):
        beside = [source[i]] if len(source) == len(conditioning) else source
        added = {}
        for names in (FURTHER_CHANNELS, REFERENCES):
            if not any(name in options for name in names):
                added |= _common([options for _, options in beside], names, socket)
        if any(same_tensor(text, other) for other, _ in beside):
            added["prompt_type"] = "positive"
        completed.append([text, {**added, **options}])
    return completed


def says_something(entries: list[dict], x: torch.Tensor, timestep: torch.Tensor) -> bool:
    """Whether any entry of a processed conditioning is evaluated at latents [B, C, H, W] and their noise level [B]."""
    return any(get_area_and_mult(entry, x, timestep) is not None for entry in entries)


def with_float_masks(conditioning: list) -> list:
    """A CONDITIONING whose masks the host can resize: those of true and false, or of integers, as fp32."""
    return [
        [text, {**options, "mask": options["mask"].float()}] if _is_whole(options.get("mask")) else [text, options]
        for text, options in conditioning
    ]


def _is_whole(mask: Any) -> bool:
    return torch.is_tensor(mask) and not mask.is_floating_point()


def _common(sources: list[dict], names: tuple[str, ...], socket: str) -> dict[str, Any]:
    for name in names:
        if not all(same_values(options.get(name), sources[0].get(name)) for options in sources):
            raise ValueError(
                f"{socket}: the parts of the inversion's caption are for different pictures to inpaint, and it has another "
                "number of parts. Combine it from as many texts as the caption."
            )
    return {name: sources[0][name] for name in names if name in sources[0]}


def same_values(a: Any, b: Any) -> bool:
    """Whether both are the same values, of tensors on any device, and of lists and dicts of them."""
    return _equal(a, b)


def same_tensor(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether both are the same values, or both are None."""
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b.to(a)))


def remember_base(moved: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """`moved`, which from now on knows the text that it was made from by adding a direction."""
    # On the tensor: whatever makes another text of it, such as Conditioning (Concat), drops it.
    if moved is not text:
        moved.pix2pix_zero_base = getattr(text, "pix2pix_zero_base", text)
    return moved


def moved_from(conditioning: list) -> list | None:
    """The CONDITIONING that one was moved from along a direction, so far as that is known."""
    bases = [getattr(text, "pix2pix_zero_base", None) for text, _ in conditioning]
    return None if any(base is None for base in bases) else [[base, {}] for base in bases]


def same_texts(conditioning: list, other: list) -> bool:
    """Whether two CONDITIONINGs hold the same texts, one for all pictures counting as one for each."""
    return len(conditioning) == len(other) and all(_same_rows(a, b) for (a, _), (b, _) in zip(conditioning, other))


def _same_rows(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    fits = a.shape[1:] == b.shape[1:] and (1 in (len(a), len(b)) or len(a) == len(b))
    return fits and bool((a == b.to(a)).all())


def unlike_the_source(inversion: Inversion, positive: list, negative: list, cfg: float) -> Iterator[str]:
    """What in the CONDITIONINGs or the `cfg` of an edit lets change what is not edited, as messages."""
    source, generated = inversion.source, inversion.generated
    base, negative_is_source = moved_from(positive), same_texts(negative, source)
    swapped = base is None and moved_from(negative) is not None and not negative_is_source
    if same_texts(positive, source) and base is None:
        yield messages.SWAPPED if swapped else messages.NO_EDIT
    elif base is not None and not same_texts(base, source):
        yield messages.OTHER_TEXT
    if generated is None and not negative_is_source and not swapped:
        yield messages.OTHER_NEGATIVE
    if generated is not None and not same_texts(negative, generated.negative):
        yield messages.OTHER_REFERENCE_NEGATIVE
    if generated is not None and abs(cfg - generated.cfg) > 1e-6:
        yield messages.OTHER_CFG.format(cfg=f"{cfg:g}", reference=f"{generated.cfg:g}")


@dataclass(frozen=True)
class Entry:
    """`area`: as the host has it, sizes, then offsets, or None for the whole picture. `tokens`: of its text, or None.

    `share`: [B, 1, h, w] over its area, how much of the estimate there is drawn from it, or None for all of it.
    `shared_tokens`: where it and the text that it is compared with are not of one length, how many tokens both have, for
    all pictures or for each. `compared`: False for a text that is only evaluated in the same calls. `words`: rows of its
    text that are compared with a source's in turn, where text and picture attend together, for all pictures or for each;
    None on a UNet. `sites`: the attentions where a picture is compared, for all pictures or for each; None for all of them.
    """

    uuid: object
    area: list | None = None
    tokens: int | None = None
    share: torch.Tensor | None = None
    shared_tokens: tuple[int, ...] | None = None
    compared: bool = True
    words: tuple[tuple[int, ...], ...] | None = None
    sites: Sequence[Collection] | None = None

    def compared_at(self, site: object, picture: int) -> bool:
        """Whether a picture, by its number in the batch, is compared at an attention."""
        return self.sites is None or site in self.sites[picture % len(self.sites)]


def entries_of(conditioning: list[dict], x: torch.Tensor, timestep: torch.Tensor) -> list[Entry]:
    """The entries of a guider's conditioning at the latents `x` [B, C, H, W] and their noise level `timestep` [B]."""
    shares = _shares(conditioning, x, timestep) if len(conditioning) > 1 else {}
    return [
        Entry(entry["uuid"], entry.get("area"), _tokens(entry), shares.get(i)) for i, entry in enumerate(conditioning)
    ]


def compared_with(entries: list[Entry], conditioning: list[dict], reference: list[dict]) -> list[Entry]:
    """The entries of a processed conditioning with their `shared_tokens`. `reference`: another, entry i for entry i."""
    shared = [_shared_tokens(own, other) for own, other in zip(conditioning, reference)]
    return [replace(entry, shared_tokens=tokens) for entry, tokens in zip(entries, shared)] + entries[len(shared) :]


def _shared_tokens(*pair: dict) -> tuple[int, ...] | None:
    tokens = [_tokens(entry) for entry in pair]
    if None in tokens:
        return None
    own, others = (entry.get(TEXT_LENGTHS, (length,)) for entry, length in zip(pair, tokens))
    if {*tokens, *own, *others} == {tokens[0]}:
        return None
    return tuple(min(own[i % len(own)], others[i % len(others)]) for i in range(max(len(own), len(others))))


def areas_of(conditioning: Sequence[dict]) -> list[tuple | None]:
    """The area of each entry."""
    return [None if entry.get("area") is None else tuple(entry["area"]) for entry in conditioning]


def _tokens(entry: dict) -> int | None:
    text = entry["model_conds"].get("c_crossattn")
    return None if text is None else text.cond.shape[1]


def _shares(conditioning: list[dict], x: torch.Tensor, timestep: torch.Tensor) -> dict[int, torch.Tensor]:
    """By the weights that the host mixes their estimates with, for those that are active at this noise level."""
    weights = {}
    total = torch.zeros_like(x[:, :1])
    # The host gives a default entry what the others leave.
    for i, entry in sorted(enumerate(conditioning), key=lambda numbered: "default" in numbered[1]):
        drawn = get_area_and_mult(entry, x, timestep)
        if drawn is None:
            continue
        weights[i] = (1 - total).clamp(min=0) if "default" in entry else drawn.mult[:, :1]
        narrowed(total, entry.get("area")).add_(weights[i])
    return {i: weight / narrowed(total, conditioning[i].get("area")).clamp(min=1e-6) for i, weight in weights.items()}


def narrowed(tensor: torch.Tensor, area: list | None) -> torch.Tensor:
    """The view of [B, C, H, W] that a conditioning's area covers; all of it when there is none."""
    if area is None:
        return tensor
    dims = len(area) // 2
    for i in range(dims):
        tensor = tensor.narrow(i + 2, area[dims + i], min(area[i], tensor.shape[i + 2] - area[dims + i]))
    return tensor


def own_tokens(keys: int, entries: list[Entry]) -> list[int]:
    """How many of `keys` tokens are each entry's own, in a batch where the host repeats shorter texts to one length."""
    lengths = [entry.tokens for entry in entries]
    if None in lengths or math.lcm(*lengths) != keys:
        return [keys] * len(entries)
    return lengths
