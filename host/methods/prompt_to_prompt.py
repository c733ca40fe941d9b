"""Prompt-to-Prompt on any sampler of ComfyUI: the source picture's attention in the UNet calls of an edit.

Hertz et al., ICLR 2023. The source branch is the inversion's stored trajectory, so it neither drifts nor has to be
sampled (direct inversion, Ju et al. 2024): at each noise level one more UNet call on the stored latent gives its attention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from comfy import samplers
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider
from comfy.sd import CLIP

from ...attention_patches.attention import attends_to_itself, cross_attention_sites, is_unet, site_halvings, size_after
from ...attention_patches.joint import joint_sites
from ...attention_patches.prompt_to_prompt import AttentionEdit, SourceAttention
from ...editing.token_alignment import Prompt, column_factors, map_tokens
from ...editing.trajectory import Inversion
from ...editing.word_masks import WordMask
from .. import running
from ..messages import OTHER_SOURCE
from ..sampling.checks import check_inversion, unframed
from ..sampling.source import NoiseMask, check_size, load_with_source, processed_source, start_of
from ..text.caption_rows import phrase_words, rows_read
from ..text.conditionings import TEXT_LENGTHS
from ..text.prompt_words import blend_tokens, find_words, is_text_of, read_factors, tokenize, words_of
from ..text.text_encoding import require_clip
from ..unet.jobs import add_job, is_for_own_sampler, only_job, with_jobs
from .joint_prompts import JointSampling, changed_words, check_factors, encoded_words
from .prompt_edit import KeptEstimate, PromptEdit, check_attended, takes_ddim_steps

KEY = "pix2pix_zero_prompt_to_prompt"
BLEND_FROM = 0.2
"""Share of the inversion's steps before local blending starts, as in the authors' code: earlier, the maps say little."""

BLEND_HALVINGS = 2
"""Local blending reads the maps at a quarter of the latent's side: 16x16 for Stable Diffusion at 512x512."""


@dataclass(frozen=True)
class PromptEditSettings:
    """`cross_until`, `self_until`: shares of the inversion's steps, 0..1 from the noisiest on, that take its attention.

    `reweight`: "word: factor" in lines or between commas. `local_blend`: threshold in 0..1 of the mask outside which the
    picture stays, 0 for none. `blend_words`: in lines or between commas; empty for the words that differ.
    """

    cross_until: float = 0.4
    self_until: float = 0.6
    reweight: str = ""
    local_blend: float = 0.0
    blend_words: str = ""


def edit_by_prompt(
    model: ModelPatcher, inversion: Inversion, clip: CLIP, source: str, target: str, settings: PromptEditSettings
) -> tuple[ModelPatcher, list]:
    """(a clone of the MODEL that samples the edit, the encoded `target` as CONDITIONING).

    Raises ValueError, naming the socket, for texts, words or an inversion that do not fit.
    """
    require_clip(clip)
    check_inversion(inversion, model, unet=False)
    if model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY):
        raise ValueError("model: it has a Prompt-to-Prompt edit already. Connect the model from before it.")
    unet = is_unet(model.model.diffusion_model)
    (cross_attention_sites if unet else joint_sites)(model.model.diffusion_model)  # refuse models without any
    if len(inversion.source) != 1:
        raise ValueError(
            f"inversion: its caption has {len(inversion.source)} parts (Conditioning Combine?). Invert the picture with a "
            "single encoded text."
        )
    read, words, aligned = (tokenize, words_of, map_tokens) if unet else (encoded_words, phrase_words, changed_words)
    before, after = (read(clip, text, socket) for text, socket in ((source, "source"), (target, "target")))
    _check_source(clip, source, before, inversion)
    positive = _encode_target(clip, target, after, inversion)
    token_map = aligned(before, after)
    find = partial(words, clip)
    weights = [(find_words(find, word, "reweight", after), factor) for word, factor in read_factors(settings.reweight)]
    if not unet:
        check_factors(weights)
    blended = ([], [])
    if settings.local_blend:
        blended = blend_tokens(find, settings.blend_words, (before, after), token_map, weights)
    edit = PromptEdit(
        inversion,
        token_map,
        inversion.lowest_sigma(settings.cross_until),
        inversion.lowest_sigma(settings.self_until),
        column_factors(after.length, weights) if weights else None,
        settings.local_blend,
        inversion.lowest_sigma(BLEND_FROM),
        blended,
    )
    return _with_edit(model, edit), positive


def _check_source(clip: CLIP, source: str, prompt: Prompt, inversion: Inversion) -> None:
    encoded, options = inversion.source[0]
    if TEXT_LENGTHS in options or encoded is not None and any((row != encoded[0]).any() for row in encoded):
        raise ValueError(
            "inversion: its pictures have a caption each, and Prompt-to-Prompt edits by one. Invert them as a list, one by "
            "one, or with one caption for all."
        )
    rows = 0 if encoded is None else rows_read(encoded, options)
    if rows != prompt.length:
        raise ValueError(
            f"source: it is {prompt.length} tokens long, but the text of the inversion {rows}. Write the caption that the "
            "picture was inverted with."
        )
    if clip.encode_from_tokens(clip.tokenize(source)).shape[-1] != encoded.shape[-1]:
        raise ValueError("clip: it does not belong to this model. Connect the CLIP that encoded the caption.")
    if not is_text_of(clip, source, encoded[0]):
        running.warn(OTHER_SOURCE)


def _encode_target(clip: CLIP, target: str, prompt: Prompt, inversion: Inversion) -> list:
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(target))
    if any(rows_read(cond, options) != prompt.length for cond, options in encoded):
        raise ValueError("clip: its encoding is not one vector for each token. Use the CLIP of an SD or SDXL model.")
    beside = {name: value for name, value in inversion.source[0][1].items() if name != TEXT_LENGTHS}
    return [[cond, {**beside, **options}] for cond, options in encoded]


def _with_edit(model: ModelPatcher, edit: PromptEdit) -> ModelPatcher:
    def sample(
        executor: Callable,
        guider: CFGGuider,
        sigmas: torch.Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: torch.Tensor,
        *args: Any,  # the latent to begin from, then what is only passed on
        **kwargs: Any,
    ) -> torch.Tensor:
        latent_image, *passed_on = args
        options = create_model_options_clone(extra_args["model_options"])
        _check_sampling(options["transformer_options"], guider, noise, edit)
        start = start_of(edit.inversion, sigmas, noise, latent_image)
        with processed_source(guider, edit.inversion) as source:
            if source[0].get("area") is not None:
                raise ValueError("inversion: its caption is limited to an area. Invert the picture with a plain text.")
            mask = NoiseMask(edit.inversion.noise_mask, guider, options, sigmas)
            kept = KeptEstimate(edit.inversion, mask, sigmas, takes_ddim_steps(executor.class_obj))
            kind = Sampling if is_unet(model.model.diffusion_model) else JointSampling
            options["transformer_options"][KEY] = kind(edit, guider, source, kept)
            extra_args = {**extra_args, "model_options": options}
            return running.finite(executor(guider, sigmas, extra_args, callback, *start, *passed_on, **kwargs))

    model = with_jobs(model)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, partial(load_with_source, edit.inversion))
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, sample)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
    return model


def _check_sampling(options: dict, guider: CFGGuider, noise: torch.Tensor, edit: PromptEdit) -> None:
    if is_for_own_sampler(options):
        raise ValueError(
            "model: a Prompt-to-Prompt edit is sampled with the stock KSampler or SamplerCustomAdvanced. Connect the model "
            "from before Prompt-to-Prompt to the nodes of Pix2Pix-Zero."
        )
    expected, given = edit.inversion.trajectory.shape[1:], unframed(noise).shape
    if given != expected:
        raise ValueError(
            f"latent_image: its shape is {tuple(given)}, that of the inverted picture {tuple(expected)}. Connect the "
            "noise output of Invert Picture."
        )
    if "positive" not in guider.conds:
        raise ValueError("guider: it has no positive text. Use the CFG guider or the basic guider.")
    tokens = len(edit.token_map.own)
    for entry in guider.conds["positive"]:
        if entry.get("area") is not None:
            raise ValueError("positive: Prompt-to-Prompt cannot limit a text to an area. Use a noise mask instead.")
        text = entry.get("cross_attn")
        if text is None or rows_read(text, entry) != tokens:
            raise ValueError(
                f"positive: it is not the target text, which has {tokens} tokens. Connect the positive output of "
                "Prompt-to-Prompt."
            )


def _predict_noise(
    executor: Callable, x: torch.Tensor, timestep: torch.Tensor, model_options: dict, seed: int | None = None
) -> torch.Tensor:
    sampling = model_options["transformer_options"][KEY]
    return sampling.predict_noise(executor, x, timestep, model_options, seed)


class Sampling:
    """One run of a sampler: the source branch in lockstep, and the masks of local blending.

    `source`: the processed conditioning of the source text.
    """

    def __init__(self, edit: PromptEdit, guider: CFGGuider, source: list[dict], kept: KeptEstimate):
        device = guider.model_patcher.load_device
        self.edit = edit
        self.token_map = edit.token_map.to(device)
        self.factors = None if edit.factors is None else edit.factors.to(device)
        self.guider = guider
        self.source = source
        self.kept = kept
        inversion = edit.inversion
        unet = guider.model_patcher.model.diffusion_model
        halvings = site_halvings(unet)
        self.cross = [("attn2", site) for site in halvings]
        self.self_attention = [
            ("attn1", site) for site, count in halvings.items() if count > 0 and attends_to_itself(unet, site)
        ]
        at = min(halvings.values(), key=lambda count: abs(count - BLEND_HALVINGS))
        self.watched = [site for site in self.cross if halvings[site[1]] == at] if edit.blend else []
        height, width = size_after(at, inversion.trajectory.shape[-2:])
        self.masks = [WordMask(tokens, (height, width)) for tokens in edit.blend_tokens]

    def predict_noise(
        self, executor: Callable, x: torch.Tensor, timestep: torch.Tensor, model_options: dict, seed: int | None
    ) -> torch.Tensor:
        check_size(x, self.edit.inversion)
        sigma = float(timestep[0])
        cross, to_itself = sigma >= self.edit.cross_end, sigma >= self.edit.self_end
        taken = self.cross if cross else self.watched
        if to_itself:
            taken = taken + self.self_attention
        attention = SourceAttention(taken, len(self.token_map.mapper))
        if taken:
            self._attend_to_source(attention, x, timestep, model_options)
        seen = {}
        edit = AttentionEdit(
            attention,
            self.cross,
            {entry["uuid"] for entry in self.guider.conds["positive"]},
            len(self.edit.token_map.own),
            self.token_map if cross else None,
            self.factors,
            self.watched,
            lambda site, *maps: seen.__setitem__(site, maps),
        )
        denoised = executor(x, timestep, add_job(model_options, edit), seed)
        for maps in seen.values():
            for mask, part in zip(self.masks, maps):
                if mask.tokens:
                    mask.add(part)
        return self.kept.restore(denoised, x, sigma, self.edit.blend_mask(self.masks, x, sigma))

    def _attend_to_source(
        self, attention: SourceAttention, x: torch.Tensor, timestep: torch.Tensor, model_options: dict
    ) -> None:
        options = only_job(model_options, attention)
        latent = self.edit.inversion.latent_at(float(timestep[0])).to(x)
        samplers.calc_cond_batch(self.guider.inner_model, [self.source], latent, timestep, options)
        check_attended(len(attention.kept) == len(attention.sites), self.source, latent, timestep)
