"""Prompt-to-Prompt on diffusion transformers: what of the source's attention goes into the edit at each noise level."""

import math
from collections.abc import Callable

import torch
from comfy.samplers import CFGGuider
from comfy.sd import CLIP

from ...attention_patches.joint import joint_sites, patch_side, reading_calls, reading_sites, united
from ...attention_patches.joint_prompts import JointEdit, SourceRows
from ...editing.token_alignment import Prompt, TokenMap, Word, positions, word_pairs
from ...editing.word_masks import WordMask
from ..sampling.checks import estimates, framed, unframed
from ..sampling.source import check_size
from ..text.caption_rows import T5_IDS, caption_words, rows_read
from ..unet.jobs import add_job, only_job
from .joint_blocks import Chosen, scored_sites
from .prompt_edit import KeptEstimate, PromptEdit, check_attended


def encoded_words(clip: CLIP, text: str, socket: str) -> Prompt:
    """The words of a text, with the rows that stand for each in what this CLIP makes of it."""
    cond, options = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]
    return caption_words(clip, text, rows_read(cond, options), socket, "t5xxl" if T5_IDS in options else None)


def changed_words(source: Prompt, target: Prompt) -> TokenMap:
    """The words that differ. No map is carried over: each word is read where the picture asks as the source does."""
    pairs = [
        (one, other) for one, other in word_pairs(source, target) if not (one and other and one.tokens == other.tokens)
    ]
    removed, added = (tuple(pair[side] for pair in pairs if pair[side]) for side in (0, 1))
    return TokenMap(torch.zeros(source.length, 0), torch.zeros(target.length), removed, added)


def check_factors(weights: list[tuple[list[Word], float]]) -> None:
    """Raise ValueError for a factor that no softmax can be weighted with."""
    for words, factor in weights:
        if factor < 0:
            raise ValueError(
                f"reweight: {words[0].text!r} has {factor:g}, and where text and picture attend together a word cannot be read "
                "less than not at all. Take 0 or more."
            )


class JointSampling:
    """One run of a sampler on a diffusion transformer: the source in lockstep, and the masks of local blending.

    `source`: the processed conditioning of the source text.
    """

    def __init__(self, edit: PromptEdit, guider: CFGGuider, source: list[dict], kept: KeptEstimate):
        self.edit = edit
        self.guider = guider
        self.source = source
        self.kept = kept
        dit = guider.model_patcher.model.diffusion_model
        self.dit = dit
        self.order = {site[:2]: i for i, site in enumerate(joint_sites(dit))}
        self.holding: Chosen | None = None
        self.reading = reading_calls(dit)
        self.watched = reading_sites(dit) if edit.blend else []
        size = [math.ceil(side / patch_side(dit)) for side in edit.inversion.trajectory.shape[-2:]]
        self.masks = [WordMask(tokens, tuple(size)) for tokens in edit.blend_tokens]

    def predict_noise(
        self, executor: Callable, x: torch.Tensor, timestep: torch.Tensor, model_options: dict, seed: int | None
    ) -> torch.Tensor:
        check_size(x, self.edit.inversion)
        sigma = float(timestep[0])
        if self.holding is None:
            self.holding = self._holding(model_options)
        keys = sigma >= self.edit.self_end
        taken = united(self.dit, self.holding) if keys or sigma >= self.edit.cross_end else []
        added = self.masks[1]
        kept = self._attend_to_source(taken, unframed(x), timestep, model_options)
        edit = JointEdit(
            {entry["uuid"] for entry in self.guider.conds["positive"]},
            kept,
            keys,
            self.edit.factors,
            self.reading,
            self.watched if added.tokens else [],
            lambda maps: added.add(maps.unsqueeze(1)),
            len(self.edit.token_map.own),
            self.holding,
        )
        denoised = executor(x, timestep, add_job(model_options, edit), seed)
        blend = self.edit.blend_mask(self.masks, unframed(x), sigma)
        restored = self.kept.restore(unframed(denoised), unframed(x), sigma, blend)
        return framed(restored, self.guider.inner_model)

    def _holding(self, model_options: dict) -> Chosen:
        """The blocks where a picture takes the source's rows: where the added words are read least as the edit acts."""
        if min(self.edit.cross_end, self.edit.self_end) == math.inf:
            return []
        words = positions(self.edit.token_map.added) or None
        return scored_sites(self.guider, self.edit.inversion, self.source, model_options, words, least=True)

    def _attend_to_source(self, taken: list, x: torch.Tensor, timestep: torch.Tensor, model_options: dict) -> dict:
        """The source's queries and keys at the sites `taken`; its maps are added to the mask of the words that went."""
        words = self.masks[0]
        watched = self.watched if words.tokens else []
        if not taken and not watched:
            return {}
        last = max((*taken, *watched), key=lambda site: (self.order[site[:2]], site.call))
        job = SourceRows(taken, watched, last, rows_read(self.source[0]["cross_attn"], self.source[0]))
        latent = self.edit.inversion.latent_at(float(timestep[0])).to(x)
        estimates(self.guider.inner_model, [self.source], latent, timestep, only_job(model_options, job))
        complete = len(job.kept) == len(taken) and len(job.maps) == len(watched)
        check_attended(complete, self.source, latent, timestep)
        for maps in job.maps.values():
            words.add(maps.unsqueeze(1))
        return job.kept
