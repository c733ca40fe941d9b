"""FlowEdit by ComfyUI's guider, for models that diffuse and for flow models, see `editing.flow_edit`."""

from dataclasses import dataclass, field

import comfy.model_management
import comfy.samplers
import torch
from comfy import model_sampling
from comfy.model_patcher import ModelPatcher

from ...editing import flow_edit
from ...editing.flow_edit import FlowEditSettings
from ...editing.guidance import LocalBlend
from ..running import Run, sample
from ..text.conditionings import check_conditioning, check_whole_sampling
from .checks import check_diffusion, check_numbers, clean_latent
from .source import NoiseMask, area_of, limited

SCHEDULERS = ("simple", "normal", "sgm_uniform", "beta", "ddim_uniform")
SOURCE_CFG = (
    "source_cfg: without a negative, the source's text is that of both texts. Connect a negative, or set it to 1."
)


@dataclass(frozen=True)
class FlowEditing:
    """How a picture is edited.

    `steps`, `scheduler`: of the host's grid of noise levels. `skip`: share of the steps, in 0..1 from the noisiest on, that
    are left out. `source_cfg`, `cfg`: of classifier-free guidance with the source's text and the edit's. `seed`: of the
    noise, which is the same for all pictures of a batch. `local_blend`: see `editing.guidance.LocalBlend`; 0 without.
    `mask`: MASK [B or 1, height, width], 1 where the picture may change.
    """

    steps: int = 20
    scheduler: str = SCHEDULERS[0]
    skip: float = 0.33
    source_cfg: float = 1.0
    cfg: float = 5.0
    seed: int = 0
    local_blend: float = 0.2
    mask: torch.Tensor | None = None
    averaging: FlowEditSettings = field(default_factory=FlowEditSettings)


def flow_edit_latent(
    model: ModelPatcher, source: list, target: list, negative: list | None, latent_image: dict, settings: FlowEditing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Edit a LATENT described by the CONDITIONING `source` into one described by `target`.

    `negative`: of both; None for the source. Returns LATENT samples, and where the picture could change as a MASK
    [B, height, width].

    Raises ValueError for a model, latent, text or number that does not fit.
    """
    sigmas = _grid(model, settings)
    samples = clean_latent(model, latent_image)
    conds = {"positive": target, "negative": source if negative is None else negative, "source": source}
    names = {"positive": "target", "negative": "source" if negative is None else "negative", "source": "source"}
    for name, conditioning in conds.items():
        check_conditioning(conditioning, len(samples), names[name])
        check_whole_sampling(conditioning, model, sigmas, names[name])
    if negative is None and settings.source_cfg != 1:
        raise ValueError(SOURCE_CFG)
    picture = model.model.process_latent_in(samples)
    mask = limited(latent_image.get("noise_mask"), settings.mask, picture)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds(conds)
    guider.set_cfg(settings.cfg)
    edit = _FlowEdit(picture, mask, settings)
    samples, blend_mask = sample(guider, edit.walk_down, samples, sigmas)
    return samples, area_of(model, picture, mask, blend_mask)


def is_flow(model: ModelPatcher) -> bool:
    """Whether a MODEL mixes picture and noise along straight lines, its noise level being the share of noise."""
    sampling = model.get_model_object("model_sampling")
    others = tuple(
        getattr(model_sampling, name) for name in ("COSMOS_RFLOW", "IMG_TO_IMG_FLOW") if hasattr(model_sampling, name)
    )
    return isinstance(sampling, model_sampling.CONST) and not isinstance(sampling, others)


def _grid(model: ModelPatcher, settings: FlowEditing) -> torch.Tensor:
    """The noise levels that are left after the skipped ones, descending to 0."""
    check_numbers(
        skip=settings.skip,
        source_cfg=settings.source_cfg,
        cfg=settings.cfg,
        local_blend=settings.local_blend,
        source_consistency=settings.averaging.consistency,
    )
    if not is_flow(model):
        check_diffusion(model)
    sampling = model.get_model_object("model_sampling")
    if not 1 <= settings.steps <= len(sampling.sigmas):
        raise ValueError(
            f"steps: {settings.steps} is outside 1 to {len(sampling.sigmas)}, the number of the model's noise levels."
        )
    sigmas = comfy.samplers.calculate_sigmas(sampling, settings.scheduler, settings.steps)
    return sigmas[flow_edit.skipped(len(sigmas) - 1, settings.skip) :]


class _FlowEdit:
    def __init__(self, picture: torch.Tensor, mask: torch.Tensor | None, settings: FlowEditing):
        self.picture = picture
        self.mask = mask
        self.settings = settings

    def walk_down(self, run: Run) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the edited latent, the mask of the local blend)."""
        picture = self.picture.to(run.x)
        levels = run.sigmas.tolist()
        flow = is_flow(run.guider.model_patcher)
        estimates = _GuiderEstimates(run, flow, levels, self.settings)
        blend = LocalBlend(self.settings.local_blend) if self.settings.local_blend else None
        noise_mask = NoiseMask(self.mask, run.guider, run.model_options, run.sigmas)
        generator = torch.Generator().manual_seed(self.settings.seed)

        def draw_noise() -> torch.Tensor:
            noise = torch.randn((1, *picture.shape[1:]), generator=generator)
            return noise.to(picture).expand_as(picture)

        def after_step(step: int, edited: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
            if blend is not None:
                blend.observe(contrast, step / (len(levels) - 1))
                edited = blend.keep_source(edited, picture)
            mask = noise_mask.at(levels[step], picture)
            if mask is not None:
                edited = torch.lerp(picture, edited, mask)
            run.report("Editing", step, edited, edited)
            return edited

        shares = [estimates.share_of(level) for level in levels]
        edited = flow_edit.flow_edit(picture, shares, estimates, draw_noise, self.settings.averaging, after_step)
        return edited, None if blend is None else blend.mask


class _GuiderEstimates:
    """What the host's guider estimates, asked in straight latents."""

    def __init__(self, run: Run, flow: bool, levels: list[float], settings: FlowEditing):
        self.run = run
        self.flow = flow
        self.settings = settings
        self.levels = {self.share_of(level): level for level in levels}

    def share_of(self, sigma: float) -> float:
        """The share of noise at a noise level of the model's."""
        return sigma if self.flow else sigma / (1 + sigma)

    def source(self, x: torch.Tensor, share: float) -> torch.Tensor:
        return self._estimate("source", x, share, self.settings.source_cfg)

    def target(self, x: torch.Tensor, share: float) -> torch.Tensor:
        return self._estimate("positive", x, share, self.settings.cfg)

    def _estimate(self, text: str, x: torch.Tensor, share: float, cfg: float) -> torch.Tensor:
        guider, sigma = self.run.guider, self.levels[share]
        x = x if self.flow else x * (1 + sigma)
        return comfy.samplers.sampling_function(
            guider.inner_model,
            x,
            x.new_full((len(x),), sigma),
            guider.conds["negative"],
            guider.conds[text],
            cfg,
            model_options=self.run.model_options,
            seed=self.run.extra_args.get("seed"),
        )
