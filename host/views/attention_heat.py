"""Where in an inverted picture each word of its caption is read: the cross-attention maps as pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ...attention_patches.attention import AttentionSite, is_unet, map_shapes, site_halvings
from ...attention_patches.joint import JointSite
from ...editing.attention_heat import AttentionHeat
from ...editing.guidance import Maps
from ...editing.inputs import interruptible
from ...editing.token_alignment import Prompt, Word, positions
from ...editing.trajectory import Inversion
from ...pictures.charts import as_image
from ...pictures.heat import draw_heat
from .. import running
from ..messages import OTHER_CAPTION, READING_MAPS, RECORDING_MAPS
from ..running import Run, look
from ..sampling.checks import BROKEN, check_finite, check_inversion, framed, pixels_per_latent
from ..sampling.passes import UNetPasses
from ..text.caption_rows import phrase_words, rows_read
from ..text.prompt_words import entries, is_text_of, tokenize, words_of
from ..text.text_encoding import require_clip
from ..unet.jobs import attention_state, for_own_sampler
from .joint_heat import joint_shapes, joint_words, record_joint

RESOLUTIONS = ("all", "1", "1/2", "1/4", "1/8")
MOST_PHRASES = 100
Site = AttentionSite | JointSite


@dataclass(frozen=True)
class HeatmapSettings:
    """`words`: between commas or in lines, for all pictures, or a tuple with some for each; empty for all but little ones.

    `window`: part of the sampling, as (start, end) percents in 0..1. `resolution`: one of `RESOLUTIONS`, the side of the
    maps as part of the latent's. `image`: to lay the heat over, an IMAGE [B or 1, height, width, 3].
    """

    words: str | tuple[str, ...] = ""
    window: tuple[float, float] = (0.0, 1.0)
    resolution: str = RESOLUTIONS[0]
    image: torch.Tensor | None = None


def attention_heatmaps(
    model: ModelPatcher, inversion: Inversion, clip: CLIP, caption: str | tuple[str, ...], settings: HeatmapSettings
) -> torch.Tensor:
    """A labelled heatmap for each word of each inverted picture: IMAGE [pictures * words, height, width, 3].

    `caption`: for all pictures, or a tuple with one for each. Raises ValueError, naming the socket, for a model, text,
    word, window or resolution that does not fit.
    """
    check_inversion(inversion, model, unet=False)
    require_clip(clip)
    image = settings.image
    if image is not None and len(image) not in (1, inversion.batch):
        raise ValueError(f"image: it holds {len(image)} pictures, the inversion {inversion.batch}.")
    captions, phrases = (_for_each(texts, inversion.batch) for texts in (caption, settings.words))
    if is_unet(model.model.diffusion_model):
        prompts = [tokenize(clip, text, "caption") for text in captions]
        words = words_of
    else:
        _check_caption(inversion)
        prompts = [joint_words(clip, text, inversion) for text in captions]
        words = phrase_words
    chosen = [_choose_words(text, prompt, partial(words, clip)) for text, prompt in zip(phrases, prompts)]
    heat = mean_attention(model, inversion, prompts[0].length, settings.window, settings.resolution)
    check_finite(heat, "model", BROKEN)
    pictures = []
    for number, words in enumerate(chosen):
        base = None if image is None else image[min(number, len(image) - 1)]
        for label, tokens in interruptible(words):
            pictures.append(draw_heat(heat[number, tokens].sum(0), label, base, pixels_per_latent(model)))
    _warn_of_other_captions(clip, captions, inversion.source[0][0])  # in the end, or progress would write over it
    return torch.stack([as_image(picture) for picture in pictures])


def _warn_of_other_captions(clip: CLIP, captions: list[str], encoded: torch.Tensor) -> None:
    for number, caption in enumerate(captions):
        if not is_text_of(clip, caption, encoded[min(number, len(encoded) - 1)]):
            running.warn(OTHER_CAPTION.format(caption=repr(caption)))
            return


def _for_each(text: str | tuple[str, ...], count: int) -> list[str]:
    return [text] * count if isinstance(text, str) else list(text) if len(text) == count else list(text) * count


def _choose_words(
    phrases: str, prompt: Prompt, read: Callable[[str, str], Sequence[Word]]
) -> list[tuple[str, list[int]]]:
    """(what to write, positions of the tokens) of each phrase, or of each word that is not little.

    `read(phrase, socket)`: the words of a phrase.
    """
    if not entries(phrases):
        named = {}
        for word in prompt.words:
            if not word.little:
                named.setdefault(word.text, []).append(word)
        return [(text, positions(words)) for text, words in named.items()]
    chosen = []
    asked = entries(phrases)
    if len(asked) > MOST_PHRASES:
        raise ValueError(f"words: there are {len(asked)}, and at most {MOST_PHRASES} are drawn. Take fewer.")
    for phrase in interruptible(asked):
        found = prompt.find(read(phrase, "words"))
        if not found:
            known = ", ".join(dict.fromkeys(word.text for word in prompt.words))
            raise ValueError(f"words: {phrase!r} is not in the caption. Write it as it stands there: {known}.")
        chosen.append((phrase, positions(found)))
    return chosen


@torch.inference_mode()
def mean_attention(
    model: ModelPatcher, inversion: Inversion, length: int, window: tuple[float, float], resolution: str
) -> torch.Tensor:
    """The attention that each token of the source's text draws: [B, length, H, W] fp32 of the latent's size, on the CPU.

    The mean over heads, layers and the levels of the window; over all tokens, pixels of a UNet sum to 1, those of a
    diffusion transformer to less, as they attend to each other too. Maps kept by the inversion
    are used where the MODEL is patched as it was then; others are recorded from the stored latents. `length`: the text's
    number of tokens. Raises ValueError for a window, resolution or text that does not fit.
    """
    _check_caption(inversion)
    rows = rows_read(*inversion.source[0])
    if rows % length:
        raise ValueError(
            f"caption: it is {length} tokens long, but the text of the inversion {rows}. Write the caption that the "
            "picture was inverted with."
        )
    shapes = _shapes_at(model, inversion, resolution)
    levels = _levels_in(model, inversion, window)
    heat = AttentionHeat(length)
    bar = comfy.utils.ProgressBar(len(levels))

    def add(maps: Maps, message: str) -> None:
        for site, shape in shapes.items():
            heat.add(maps[0, site], shape)
        bar.update(1)
        running.show(message.format(step=bar.current, steps=bar.total))

    kept = inversion.maps
    if kept is not None and kept.made_with != attention_state(model):
        kept = None
    missing = []
    for level in levels:
        comfy.model_management.throw_exception_if_processing_interrupted()
        maps = None if kept is None else kept.get(level, model.load_device)
        if maps is None:
            missing.append(level)
        else:
            add(maps, READING_MAPS)
    if missing and is_unet(model.model.diffusion_model):
        _record(model, inversion, missing, shapes, add)
    elif missing:
        _record_joint(model, inversion, missing, shapes, heat)
    return heat.mean(tuple(inversion.trajectory.shape[-2:])).cpu()


def _check_caption(inversion: Inversion) -> None:
    text = inversion.source[0][0]
    if len(inversion.source) != 1 or text is None:
        raise ValueError(
            f"inversion: its caption has {len(inversion.source)} parts (Conditioning Combine?). Invert the picture with a "
            "single encoded text."
        )
    if "area" in inversion.source[0][1]:
        raise ValueError("inversion: its caption is limited to an area. Invert the picture with a plain text.")


def _shapes_at(model: ModelPatcher, inversion: Inversion, resolution: str) -> dict[Site, tuple[int, int]]:
    """(height, width) of the maps of each site that has the resolution."""
    unet = model.model.diffusion_model
    if not is_unet(unet):
        return joint_shapes(model, inversion, resolution)
    shapes = map_shapes(unet, inversion.trajectory.shape[-2:])
    halvings = site_halvings(unet)
    chosen = {site: shape for site, shape in shapes.items() if resolution in ("all", _part(halvings[site]))}
    if not chosen:
        having = ", ".join(map(_part, sorted({halvings[site] for site in shapes})))
        raise ValueError(f"resolution: this model has no attention to the text at {resolution}. It has it at {having}.")
    return chosen


def _part(halvings: int) -> str:
    return f"1/{2**halvings}" if halvings else "1"


def _levels_in(model: ModelPatcher, inversion: Inversion, window: tuple[float, float]) -> list[int]:
    """The levels of the inversion in a window of the sampling, from the noisiest on."""
    sampling = model.get_model_object("model_sampling")
    first, last = (float(sampling.percent_to_sigma(percent)) for percent in window)
    levels = [i for i in range(inversion.steps, 0, -1) if last <= float(inversion.sigmas[i]) <= first]
    if not levels:
        raise ValueError(
            f"start_percent, end_percent: none of the inversion's {inversion.steps} steps lies between {window[0]:g} and "
            f"{window[1]:g}. Take a wider window."
        )
    return levels


def _record(model: ModelPatcher, inversion: Inversion, levels: list[int], shapes: dict, add: Callable) -> None:
    """Hand the maps of UNet calls on the stored latents of some levels to `add`, level by level."""

    def read(run: Run) -> None:
        passes = UNetPasses(run.model_k, run.extra_args, list(shapes))
        for level in levels:
            x = inversion.trajectory[level].to(run.x)
            add(passes.record_maps("positive", x, float(inversion.sigmas[level])), RECORDING_MAPS)

    _look_at_source(model, inversion, read)


def _record_joint(
    model: ModelPatcher, inversion: Inversion, levels: list[int], shapes: dict, heat: AttentionHeat
) -> None:
    """The same of a diffusion transformer, whose maps are added up one by one."""
    (shape,) = set(shapes.values())
    bar = comfy.utils.ProgressBar(len(levels))

    def read(run: Run) -> None:
        for level in levels:
            comfy.model_management.throw_exception_if_processing_interrupted()
            record_joint(run, inversion, level, list(shapes), partial(heat.add, shape=shape))
            bar.update(1)
            running.show(RECORDING_MAPS.format(step=bar.current, steps=bar.total))

    _look_at_source(model, inversion, read)


def _look_at_source(model: ModelPatcher, inversion: Inversion, read: Callable[[Run], None]) -> None:
    guider = comfy.samplers.CFGGuider(for_own_sampler(model))
    guider.inner_set_conds({"positive": inversion.source})
    picture = model.model.process_latent_out(framed(inversion.latent(0), model))
    look(guider, read, picture, inversion.sigmas.flip(0))
