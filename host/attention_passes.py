"""Record or match cross-attention maps in UNet calls that go through ComfyUI's own conditioning batches.

A job travels in `transformer_options`; a wrapper around `apply_model` carries it out. Everything above that call, the
hooks, areas, ControlNets and masks of the conditioning, runs as in any other sampler and stays in inference mode.
"""

from collections.abc import Callable

import torch
from comfy import samplers
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP

from ..attention_patches.maps import LastSiteReached, MapTap
from ..attention_patches.sites import AttentionSite, cross_attention_sites
from ..editing.guidance import Maps, attention_distance
from .gradients import differentiable_attention, input_gradients, ordinary, unshared_skips

JOB = "pix2pix_zero_job"


def with_map_jobs(model):
    """A clone of the MODEL whose UNet calls carry out the job in their transformer options, if there is one."""
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, JOB, _run_job)
    return model


def _run_job(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    job = transformer_options.get(JOB)
    if job is None:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def call(x, transformer_options, convert=lambda value: value):
        try:
            executor(
                x,
                convert(t),
                convert(c_concat),
                convert(c_crossattn),
                convert(control),
                transformer_options,
                **convert(kwargs),
            )
        except LastSiteReached:
            pass

    job.run(call, executor.class_obj, x, transformer_options)
    return torch.zeros_like(x)


class RecordMaps:
    """Job: read the maps. `maps` afterwards: {(entry of the conditioning, site): [B, heads, H*W, tokens]}."""

    def __init__(self, sites: list[AttentionSite], entries: list):
        self.sites = sites
        self.entries = entries
        self.maps: Maps = {}

    def run(self, call: Callable, model, x: torch.Tensor, transformer_options: dict) -> None:
        entries = [self.entries.index(uuid) for uuid in transformer_options["uuids"]]

        def keep(site, maps):
            for entry, part in zip(entries, maps.chunk(len(entries))):
                self.maps[entry, site] = part

        call(x, MapTap(self.sites, keep).install(transformer_options))


class MatchMaps:
    """Job: the attention distance to `reference`, `distance` [B], and its `gradient` [B, C, H, W] afterwards."""

    def __init__(self, sites: list[AttentionSite], entries: list, areas: list, reference: Maps, x: torch.Tensor):
        self.sites = sites
        self.entries = entries
        self.areas = areas
        self.reference = reference
        self.gradient = torch.zeros_like(x)
        self.distance = x.new_zeros(len(x))

    def run(self, call: Callable, model, x: torch.Tensor, transformer_options: dict) -> None:
        entries = [self.entries.index(uuid) for uuid in transformer_options["uuids"]]
        with input_gradients(model):
            x = x.clone().requires_grad_(True)
            distance = x.new_zeros(len(x))

            def compare(site, maps):
                nonlocal distance
                reference = torch.cat([ordinary(self.reference[entry, site]) for entry in entries])
                if maps.shape != reference.shape:
                    raise ValueError(
                        "positive: its text is encoded to another number of tokens than the caption the picture was "
                        "inverted with. Make it from the same caption, with Apply Edit Direction, or shorten the text."
                    )
                distance = distance + attention_distance(maps, reference)

            options = unshared_skips(differentiable_attention(transformer_options))
            call(x, MapTap(self.sites, compare).install(options), ordinary)
            (gradient,) = torch.autograd.grad(distance.sum(), x)
        for entry, part, amount in zip(entries, gradient.chunk(len(entries)), distance.detach().chunk(len(entries))):
            _narrow(self.gradient, self.areas[entry]).add_(part)
            self.distance += amount


def _narrow(tensor: torch.Tensor, area) -> torch.Tensor:
    """The view of `tensor` that a conditioning area (sizes, then offsets) covers; all of it when there is none."""
    if area is None:
        return tensor
    dims = len(area) // 2
    for i in range(dims):
        tensor = tensor.narrow(i + 2, area[dims + i], min(area[i], tensor.shape[i + 2] - area[dims + i]))
    return tensor


class UNetPasses:
    """The evaluations of `editing.guidance.DenoisingPasses`, carried out by a running guider.

    `model_k`: what a KSAMPLER's function is given; its `inner_model` is the guider. The guider's conditionings
    "source", "positive" and "negative" are the branches.
    """

    def __init__(self, model_k, extra_args: dict):
        self.model_k = model_k
        self.guider = model_k.inner_model
        self.extra_args = extra_args
        self.sites = cross_attention_sites(self.guider.inner_model.diffusion_model)

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        return self.model_k(x, _levels(x, sigma), **self.extra_args)

    def denoise_branch(self, branch: str, x: torch.Tensor, sigma: float) -> torch.Tensor:
        return self._evaluate(branch, x, sigma, self.extra_args["model_options"])

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
            _levels(x, sigma),
            model_options=self.extra_args["model_options"],
            cond=conds["positive"],
            uncond=conds["negative"],
        )

    def estimate_elsewhere(
        self, denoised: torch.Tensor, x: torch.Tensor, x_there: torch.Tensor, sigma: float
    ) -> torch.Tensor:
        # An estimate is linear in latent and output: with a zero output, only the latent's part is left.
        sampling = self.guider.inner_model.model_sampling
        return denoised + sampling.calculate_denoised(_levels(x, sigma), torch.zeros_like(x), x_there - x)

    def record_maps(self, branch: str, x: torch.Tensor, sigma: float) -> Maps:
        job = RecordMaps(self.sites, self._entries(branch))
        self._evaluate(branch, x, sigma, self._with_job(job))
        return job.maps

    def map_gradient(
        self, branch: str, x: torch.Tensor, sigma: float, reference: Maps
    ) -> tuple[torch.Tensor, torch.Tensor]:
        areas = [entry.get("area") for entry in self.guider.conds[branch]]
        job = MatchMaps(self.sites, self._entries(branch), areas, reference, x)
        self._evaluate(branch, x, sigma, self._with_job(job))
        return job.gradient, job.distance

    def _entries(self, branch: str) -> list:
        return [entry["uuid"] for entry in self.guider.conds[branch]]

    def _with_job(self, job) -> dict:
        options = create_model_options_clone(self.extra_args["model_options"])
        options["transformer_options"][JOB] = job
        return options

    def _evaluate(self, branch: str, x: torch.Tensor, sigma: float, model_options: dict) -> torch.Tensor:
        (denoised,) = samplers.calc_cond_batch(
            self.guider.inner_model, [self.guider.conds[branch]], x, _levels(x, sigma), model_options
        )
        return denoised


def _levels(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return x.new_full((len(x),), sigma)
