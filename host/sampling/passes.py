"""The evaluations of the guided samplers, carried out by a running ComfyUI guider."""

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import torch
from comfy import samplers

from ...attention_patches.joint import JointSite
from ...editing.guidance import Maps
from ...editing.trajectory import NoisePath
from .. import running
from ..messages import NOT_AT_ONCE, ONE_BY_ONE
from ..text.compared_words import with_compared_words
from ..text.conditionings import Entry, compared_with, entries_of, same_values, says_something
from ..unet.jobs import LEFT_OUT, add_job
from ..unet.map_jobs import Checkpointing, MatchMaps, RecordMaps, Site
from ..unet.memory import MODES
from .checks import estimates, framed, noise_path, unframed


class _BranchEstimates:
    """A post-CFG function that only looks: the estimates of the two branches at `sigma`.

    `negative` is None if it was left out.
    """

    positive = negative = sigma = None

    def held_negative(self, positive: torch.Tensor, path: NoisePath, sigma: float) -> torch.Tensor:
        """The negative's estimate at another noise level, if its noise stays as far from the positive's as it was."""
        apart = (self.negative - self.positive) / path.noise_to_picture(self.sigma)
        return positive + apart * path.noise_to_picture(sigma)

    def __call__(self, args: dict) -> torch.Tensor:
        self.positive = unframed(args["cond_denoised"])
        self.negative = None if args["uncond"] is None else unframed(args["uncond_denoised"])
        return args["denoised"]


class UNetPasses:
    """The evaluations of `editing.guidance.DenoisingPasses`, carried out by a running guider.

    `model_k`: what a KSAMPLER's function is given; its `inner_model` is the guider. The guider's conditionings
    "source", "positive" and "negative" are the branches. `own_sites`: those of the `sites` that a picture is matched at, for all
    pictures or for each; None for all of them.
    """

    def __init__(
        self,
        model_k: Callable,
        extra_args: dict,
        sites: list[Site],
        checkpointing: Checkpointing | None = None,
        own_sites: Sequence[Collection[Site]] | None = None,
    ):
        self.model_k = model_k
        self.guider = model_k.inner_model
        options = extra_args["model_options"]
        self.estimates = _BranchEstimates()
        hooks = [*options.get("sampler_post_cfg_function", []), self.estimates]
        self.extra_args = {**extra_args, "model_options": {**options, "sampler_post_cfg_function": hooks}}
        self.sites = sites
        self.own_sites = own_sites
        self.checkpointing = checkpointing or Checkpointing(MODES[0], sys.maxsize)
        self.by_words = bool(sites) and isinstance(sites[0], JointSite)
        patches = options.get("transformer_options", {}).get("patches", {})
        self.told = False
        self.patched = any(patches[name] for name in patches if name.startswith("attn"))

    def denoise(self, x: torch.Tensor, sigma: float, hold_negative: bool = False) -> torch.Tensor:
        if self._holds(hold_negative):
            return self._denoise(x, sigma, partial(self._branches, [], True))
        return self._denoise(x, sigma)

    def _denoise(self, x: torch.Tensor, sigma: float, evaluate: Callable | None = None) -> torch.Tensor:
        """The guider's own estimate; `evaluate` in place of the host's evaluation of the two branches."""
        denoised = self.model_k(x, _timestep(x, sigma), **self._evaluated_by(evaluate))
        self.estimates.sigma = sigma
        return denoised

    def _evaluated_by(self, evaluate: Callable | None) -> dict:
        options = self.extra_args["model_options"]
        if evaluate is not None:
            options = {**options, "sampler_calc_cond_batch_function": evaluate}
        return {**self.extra_args, "model_options": options}

    def _holds(self, hold_negative: bool) -> bool:
        evaluated_by_another = "sampler_calc_cond_batch_function" in self.extra_args["model_options"]
        return hold_negative and self.estimates.negative is not None and not evaluated_by_another and not self.patched

    def _branches(self, jobs: list, hold_negative: bool, args: dict) -> list[torch.Tensor]:
        """Estimates for positive and negative text, one after the other, with a job in the positive one's UNet call.

        It is taken out of `jobs`: should a function of another pack evaluate the branches again, it is done. Patches of
        the attention may read both texts, as NAG does: with those, both are evaluated in one call.
        """
        (positive, negative), options = args["conds"], args["model_options"]
        rest = args["input"], args["sigma"]
        theirs = self.extra_args["model_options"].get("sampler_calc_cond_batch_function")
        working = add_job(options, jobs.pop()) if jobs else options
        if self.patched and theirs is None and negative is not None:
            if len(args["input"]) * (len(positive) + len(negative)) > self.checkpointing.rows:
                self._tell(NOT_AT_ONCE)
            return samplers.calc_cond_batch(args["model"], [positive, negative], *rest, working)
        (edited,) = samplers.calc_cond_batch(args["model"], [positive], *rest, working)
        if theirs is not None:
            return theirs({**args, "model_options": {**options, "sampler_calc_cond_batch_function": theirs}})
        if hold_negative:
            path = noise_path(self.guider.model_patcher)
            held = self.estimates.held_negative(unframed(edited), path, float(args["sigma"][0]))
            return [edited, held.view_as(edited)]
        # Other packs tell the negative by its place in the list.
        return [edited, samplers.calc_cond_batch(args["model"], [[], negative], *rest, options)[1]]

    def _tell(self, reason: str) -> None:
        if not self.told:
            self.told = True
            running.warn(reason)

    def contrast(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        source = self.estimates.negative
        if source is None or not negative_is_source(self.guider.conds):
            source = self.denoise_branch("source", x, sigma)
        return (self.estimates.positive - source).abs().mean(1, keepdim=True)

    def denoise_branch(self, branch: str, x: torch.Tensor, sigma: float) -> torch.Tensor:
        return self._evaluate(branch, x, sigma)

    def mix_branches(
        self, positive: torch.Tensor, negative: torch.Tensor, x: torch.Tensor, sigma: float
    ) -> torch.Tensor:
        conds = self.guider.conds
        return samplers.cfg_function(
            self.guider.inner_model,
            positive,
            negative,
            self.guider.cfg,
            x,
            _timestep(x, sigma),
            model_options=self.extra_args["model_options"],
            cond=conds["positive"],
            uncond=conds["negative"],
        )

    def estimate_elsewhere(
        self, denoised: torch.Tensor, x: torch.Tensor, x_there: torch.Tensor, sigma: float
    ) -> torch.Tensor:
        # An estimate is linear in latent and output: with a zero output, only the latent's part is left.
        sampling = self.guider.inner_model.model_sampling
        return denoised + sampling.calculate_denoised(_timestep(x, sigma), torch.zeros_like(x), x_there - x)

    def denoise_and_record(self, x: torch.Tensor, sigma: float, keep: Callable) -> torch.Tensor:
        """`denoise`, with the maps of the positive branch handed to `keep((entry, site), maps)` on the way."""
        job = RecordMaps(self.sites, self._entries("positive", x, sigma), keep, stops=False)
        denoised = self._denoise(x, sigma, partial(self._branches, [job], False))
        self._check_made(job, "positive", x, sigma)
        return denoised

    def record_maps(self, branch: str, x: torch.Tensor, sigma: float) -> Maps:
        maps = {}
        job = RecordMaps(self.sites, self._entries(branch, x, sigma), maps.__setitem__, stops=True)
        self._evaluate(branch, x, sigma, job)
        self._check_made(job, branch, x, sigma)
        return maps

    def map_gradient(
        self, branch: str, x: torch.Tensor, sigma: float, reference: Maps
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.patched:
            self._tell(ONE_BY_ONE)
        job = self._match(branch, x, sigma, reference, stops=True)
        self._evaluate(branch, x, sigma, job)
        self._check_made(job, branch, x, sigma)
        return unframed(job.gradient), job.distance

    def denoise_and_match(
        self, x: torch.Tensor, sigma: float, reference: Maps, hold_negative: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        job = self._match("positive", x, sigma, reference, stops=False)
        evaluate = partial(self._branches, [job], self._holds(hold_negative))
        denoised = self.model_k(x, _timestep(x, sigma), **self._evaluated_by(evaluate))
        self.estimates.sigma = sigma
        self._check_made(job, "positive", x, sigma)
        return denoised, unframed(job.gradient), job.distance

    def _match(self, branch: str, x: torch.Tensor, sigma: float, reference: Maps, stops: bool) -> MatchMaps:
        entries = self._entries(branch, x, sigma)
        if branch == "positive":
            if not self.by_words:
                entries = compared_with(entries, self.guider.conds[branch], self.guider.conds["source"])
            # They may be evaluated in the same call: what they give to the maps there is differentiated too.
            others = self._entries("negative", x, sigma) if self.patched else []
            entries = entries + [replace(entry, share=None, compared=False) for entry in others]
        return MatchMaps(self.sites, entries, reference, framed(x, self.guider.inner_model), self.checkpointing, stops)

    def _check_made(self, job: RecordMaps | MatchMaps, branch: str, x: torch.Tensor, sigma: float) -> None:
        """Raise ValueError where another pack's wrapper has answered in place of the UNet, whose attention is needed."""
        if not job.made and says_something(self.guider.conds[branch], x, _timestep(x, sigma)):
            raise ValueError(LEFT_OUT)

    def _entries(self, branch: str, x: torch.Tensor, sigma: float) -> list[Entry]:
        conds = self.guider.conds
        entries = entries_of(conds[branch], framed(x, self.guider.inner_model), _timestep(x, sigma))
        if self.by_words and branch != "negative":
            entries = with_compared_words(entries, conds["source"], conds["positive"], branch == "source")
            return [replace(entry, sites=self.own_sites) for entry in entries]
        return entries

    def _evaluate(self, branch: str, x: torch.Tensor, sigma: float, job=None) -> torch.Tensor:
        options = self.extra_args["model_options"]
        if job is not None:
            options = add_job(options, job)
        # Other packs tell the negative by its place in the list.
        conds = [[], self.guider.conds[branch]] if branch == "negative" else [self.guider.conds[branch]]
        return estimates(self.guider.inner_model, conds, x, _timestep(x, sigma), options)[-1]


def negative_is_source(conds: dict[str, list[dict]]) -> bool:
    """Whether the negative of a guider's processed conditionings is the source's text."""
    negative, source = (conds[branch] for branch in ("negative", "source"))
    return len(negative) == len(source) and all(_same_inputs(a, b) for a, b in zip(negative, source))


def _same_inputs(*entries: dict) -> bool:
    """Whether two entries of processed conditionings give the network the same text and all else beside the latent."""
    inputs = [entry["model_conds"] for entry in entries]
    names = {name for given in inputs for name in given}
    return all(same_values(*(getattr(given.get(name), "cond", None) for given in inputs)) for name in names)


def _timestep(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return x.new_full((len(x),), sigma)
