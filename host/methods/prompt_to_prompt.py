"""Prompt-to-Prompt on any sampler of ComfyUI: the source picture's attention in the UNet calls of an edit.

Hertz et al., ICLR 2023. The source branch is the inversion's stored trajectory, so it neither drifts nor has to be
sampled (direct inversion, Ju et al. 2024): at each noise level one more UNet call on the stored latent gives its attention.
"""

import logging
import math
from dataclasses import dataclass
from functools import partial

import comfy.utils
import torch
from comfy import samplers
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP

from ...attention_patches.prompt_to_prompt import AttentionEdit, SourceAttention
from ...attention_patches.sites import attends_to_itself, cross_attention_sites, site_halvings, size_after
from ...editing.inversion import Inversion
from ...editing.token_alignment import Prompt, TokenMap, column_factors, map_tokens
from ...editing.word_masks import WordMask, soft_mask
from ..batching import TEXT_LENGTHS
from ..sampling.model_checks import check_inversion
from ..sampling.source_conditioning import load_with_source, processed_source
from ..text.prompt_words import blend_tokens, find_words, read_factors, tokenize
from ..unet.jobs import add_job, is_for_own_sampler, only_job, with_jobs

KEY = "pix2pix_zero_prompt_to_prompt"
BLEND_FROM = 0.2
"""Share of the steps before local blending starts, as in the authors' code: earlier, the maps say little."""

BLEND_HALVINGS = 2
"""Local blending reads the maps at a quarter of the latent's side: 16x16 for Stable Diffusion at 512x512."""


@dataclass(frozen=True)
class PromptEdit:
    """An edit of an inverted picture by its prompt.

    `cross_steps`, `self_steps`: how many steps of the inversion, from the noisiest on, take the source's cross- and
    self-attention. `factors`: [T] for the columns of the edited maps, or None. `blend`: threshold in 0..1 of the mask
    outside which the picture stays, or 0 for none, and the tokens it is drawn from in the source and in the target.
    """

    inversion: Inversion
    token_map: TokenMap
    cross_steps: int
    self_steps: int
    factors: torch.Tensor | None
    blend: float
    blend_tokens: tuple[list[int], list[int]]


def edit_by_prompt(
    model,
    inversion: Inversion,
    clip,
    source: str,
    target: str,
    cross_until: float = 0.4,
    self_until: float = 0.6,
    reweight: str = "",
    local_blend: float = 0.0,
    blend_words: str = "",
) -> tuple:
    """(a clone of the MODEL that samples the edit, the encoded `target` as CONDITIONING).

    `cross_until`, `self_until`: shares of the inversion's steps in 0..1. `reweight`: "word: factor" in lines or between
    commas. `local_blend`: threshold in 0..1. `blend_words`: in lines or between commas; empty for the words that differ.
    Raises ValueError, naming the socket, for texts, words or an inversion that do not fit.
    """
    if clip is None:
        raise ValueError("clip: there is none. If it comes from a checkpoint loader, the file has no text encoder.")
    check_inversion(inversion, model)
    if model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY):
        raise ValueError("model: it has a Prompt-to-Prompt edit already. Connect the model from before it.")
    cross_attention_sites(model.model.diffusion_model)  # refuses models without any
    if len(inversion.source) != 1:
        raise ValueError(
            f"inversion: its caption has {len(inversion.source)} parts (Conditioning Combine?). Invert the picture with a "
            "single encoded text."
        )
    before, after = (tokenize(clip, text, socket) for text, socket in ((source, "source"), (target, "target")))
    _check_source(clip, source, before, inversion)
    positive = _encode_target(clip, target, after, inversion)
    token_map = map_tokens(before, after)
    weights = [(find_words(clip, word, "reweight", after), factor) for word, factor in read_factors(reweight)]
    blended = blend_tokens(clip, blend_words, before, after, token_map, weights) if local_blend else ([], [])
    edit = PromptEdit(
        inversion,
        token_map,
        round(cross_until * inversion.steps),
        round(self_until * inversion.steps),
        column_factors(after.length, weights) if weights else None,
        local_blend,
        blended,
    )
    return _with_edit(model, edit), positive


def _check_source(clip, source: str, prompt: Prompt, inversion: Inversion) -> None:
    encoded = inversion.source[0][0]
    if encoded is None or encoded.shape[1] != prompt.length:
        raise ValueError(
            f"source: it is {prompt.length} tokens long, but the text of the inversion "
            f"{0 if encoded is None else encoded.shape[1]}. Write the caption that the picture was inverted with."
        )
    own = clip.encode_from_tokens(clip.tokenize(source))
    if own.shape[-1] != encoded.shape[-1]:
        raise ValueError("clip: it does not belong to this model. Connect the CLIP that encoded the caption.")
    own = own.to(encoded)
    if any((row - own[0]).norm() > 0.1 * own[0].norm() for row in encoded):
        logging.warning(
            "Pix2Pix-Zero: the source text is not the one that the picture was inverted with, or was encoded otherwise. "
            "Words may be matched to the wrong parts of the picture."
        )


def _encode_target(clip, target: str, prompt: Prompt, inversion: Inversion) -> list:
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(target))
    if any(cond.shape[1] != prompt.length for cond, _ in encoded):
        raise ValueError("clip: its encoding is not one vector for each token. Use the CLIP of an SD or SDXL model.")
    beside = {name: value for name, value in inversion.source[0][1].items() if name != TEXT_LENGTHS}
    return [[cond, {**beside, **options}] for cond, options in encoded]


def _with_edit(model, edit: PromptEdit):
    def sample(executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
        options = create_model_options_clone(extra_args["model_options"])
        _check_sampling(options["transformer_options"], guider, noise, edit)
        with processed_source(guider, edit.inversion) as source:
            if source[0].get("area") is not None:
                raise ValueError("inversion: its caption is limited to an area. Invert the picture with a plain text.")
            options["transformer_options"][KEY] = Sampling(edit, guider, source)
            return executor(guider, sigmas, {**extra_args, "model_options": options}, callback, noise, *args, **kwargs)

    model = with_jobs(model)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, partial(load_with_source, edit.inversion))
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, sample)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
    return model


def _check_sampling(options: dict, guider, noise: torch.Tensor, edit: PromptEdit) -> None:
    if is_for_own_sampler(options):
        raise ValueError(
            "model: a Prompt-to-Prompt edit is sampled with the stock KSampler or SamplerCustomAdvanced. Connect the model "
            "from before Prompt-to-Prompt to the nodes of Pix2Pix-Zero."
        )
    expected = edit.inversion.trajectory.shape[1:]
    if noise.shape != expected:
        raise ValueError(
            f"latent_image: its shape is {tuple(noise.shape)}, that of the inverted picture {tuple(expected)}. Connect the "
            "noise output of Invert Picture."
        )
    if "positive" not in guider.conds:
        raise ValueError("guider: it has no positive text. Use the CFG guider or the basic guider.")
    tokens = len(edit.token_map.own)
    for entry in guider.conds["positive"]:
        if entry.get("area") is not None:
            raise ValueError("positive: Prompt-to-Prompt cannot limit a text to an area. Use a noise mask instead.")
        text = entry.get("cross_attn")
        if text is None or text.shape[1] != tokens:
            raise ValueError(
                f"positive: it is not the target text, which has {tokens} tokens. Connect the positive output of "
                "Prompt-to-Prompt."
            )


def _predict_noise(executor, x, timestep, model_options={}, seed=None):
    sampling = model_options["transformer_options"][KEY]
    return sampling.predict_noise(executor, x, timestep, model_options, seed)


class Sampling:
    """One run of a sampler: the source branch in lockstep, and the masks of local blending.

    `source`: the processed conditioning of the source text.
    """

    def __init__(self, edit: PromptEdit, guider, source: list[dict]):
        device = guider.model_patcher.load_device
        self.edit = edit
        self.token_map = edit.token_map.to(device)
        self.factors = None if edit.factors is None else edit.factors.to(device)
        self.guider = guider
        self.source = source
        inversion = edit.inversion
        self.grid = [float(sigma) for sigma in inversion.sigmas]
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

    def predict_noise(self, executor, x, timestep, model_options, seed):
        sigma = float(timestep[0])
        place = self._place(sigma)
        step = len(self.grid) - 1 - place
        cross, to_itself = step < self.edit.cross_steps, step < self.edit.self_steps
        taken = self.cross if cross else self.watched
        if to_itself:
            taken = taken + self.self_attention
        attention = SourceAttention(taken)
        if taken:
            self._attend_to_source(attention, x, timestep, model_options, place)
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
        return self._land(denoised, x, sigma, place, step, model_options)

    def _attend_to_source(self, attention, x, timestep, model_options, place) -> None:
        options = only_job(model_options, attention)
        latent = self._latent(place).to(x)
        samplers.calc_cond_batch(self.guider.inner_model, [self.source], latent, timestep, options)
        if len(attention.kept) != len(attention.sites):
            raise ValueError(
                "inversion: its caption is limited to a part of the sampling. Invert the picture with a plain text."
            )

    def _place(self, sigma: float) -> float:
        """The place of a noise level on the inversion's grid, a whole number if it is one of its levels."""
        for level, there in enumerate(self.grid):
            if abs(sigma - there) <= 1e-4 * there:
                return float(level)
            if sigma < there:
                below = self.grid[level - 1]
                return level - 1 + (sigma - below) / (there - below)
        raise ValueError(
            f"sigmas: sampling starts at noise level {sigma:.2f}, but the inversion ends at {self.grid[-1]:.2f}. Connect "
            f"the sigmas of Invert Picture, or choose the scheduler ddim_uniform with {self.edit.inversion.steps} steps."
        )

    def _latent(self, place: float) -> torch.Tensor:
        """The source picture at a place on the grid; between two levels on the line that DDIM draws."""
        level = math.floor(place)
        trajectory = self.edit.inversion.trajectory
        if level == place:
            return trajectory[level]
        return trajectory[level].lerp(trajectory[level + 1], place - level)

    def _land(self, denoised, x, sigma, place, step, model_options) -> torch.Tensor:
        """Change the estimate so that a DDIM step along it lands where the edit wants the latent.

        A step from sigma to sigma' takes `x` to `r * x + (1 - r) * denoised` with `r = sigma' / sigma`. The inversion's
        residual is added to that, and outside the mask the source's own latent takes its place.
        """
        levels = model_options["transformer_options"]["sample_sigmas"].tolist()
        lower = [level for level in levels if level < sigma * (1 - 1e-4)]
        if not lower:
            return denoised
        ratio = max(lower) / sigma
        landing = self._place(max(lower))
        residuals = self.edit.inversion.residuals
        if residuals is not None and place == landing + 1:
            denoised = denoised + residuals[int(landing)].to(x) / (1 - ratio)
        mask = self._mask(x, step)
        if mask is None:
            return denoised
        there = (self._latent(landing).to(x) - ratio * x) / (1 - ratio)
        return mask * denoised + (1 - mask) * there

    def _mask(self, x, step) -> torch.Tensor | None:
        """[B, 1, H, W] or [B, C, H, W], 1 where the picture may change; None where it may everywhere."""
        mask = None
        if self.edit.inversion.noise_mask is not None:
            mask = comfy.utils.reshape_mask(self.edit.inversion.noise_mask, x.shape).to(x)
        if self.edit.blend and step >= BLEND_FROM * self.edit.inversion.steps:
            areas = [words.area(self.edit.blend) for words in self.masks if words.total is not None]
            if areas:
                blend = soft_mask(areas, x.shape[-2:]).to(x)
                mask = blend if mask is None else mask * blend
        return mask
