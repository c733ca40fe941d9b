"""FlowEdit by ComfyUI's guider, for models that diffuse and for flow models, see `editing.flow_edit`."""

from dataclasses import dataclass, field, replace

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ...editing.flow_edit import FlowEditSettings, flow_edit, skipped
from ...editing.guidance import LocalBlend
from .. import running
from ..messages import EDITING, STEP_DISTILLED, WHOLE_PICTURE
from ..running import Run, sample
from ..text.conditionings import beside_the_source, check_conditioning, check_lengths, check_whole_sampling
from ..unet.jobs import for_own_sampler
from .checks import (
    base_of_distilled,
    check_model,
    check_numbers,
    clean_latent,
    framed,
    noise_levels,
    noise_path,
    too_large,
    unframed,
)
from .source import EditGuider, NoiseMask, edited_area, limited

SOCKETS = {"positive": "target", "negative": "negative"}
SOURCE_CFG = (
    "source_cfg: without a negative, the source's text is that of both texts. Connect a negative, or set it to 1."
)
WHOLE = "whole picture"
PRESETS = ("default", WHOLE)


@dataclass(frozen=True)
class FlowEditing:
    """How a picture is edited.

    `steps`, `scheduler`: of the host's grid of noise levels, or `sigmas` in its place. `skip`: share of the steps, in 0..1
    from the noisiest on, that are left out. `source_cfg`, `cfg`: of classifier-free guidance with the source's text and
    the edit's. `seed`: of the noise, which is the same for all pictures of a batch. `local_blend`: see
    `editing.guidance.LocalBlend`; 0 without. `mask`: MASK [B or 1, height, width], 1 where the picture may change.
    `preset`: one of `PRESETS`.
    """

    steps: int = 20
    scheduler: str = "simple"
    skip: float = 0.33
    source_cfg: float = 1.0
    cfg: float = 5.0
    seed: int = 0
    local_blend: float = 0.2
    mask: torch.Tensor | None = None
    sigmas: torch.Tensor | None = None
    averaging: FlowEditSettings = field(default_factory=FlowEditSettings)
    preset: str = PRESETS[0]

    def for_preset(self) -> "FlowEditing":
        """These settings as the preset draws them: light and style are decided in the first steps, and are everywhere."""
        if self.preset != WHOLE:
            return self
        return replace(self, skip=0.0, local_blend=0.0, averaging=replace(self.averaging, consistency=0.0))


def flow_edit_latent(
    model: ModelPatcher, source: list, target: list, negative: list | None, latent_image: dict, settings: FlowEditing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Edit a LATENT described by the CONDITIONING `source` into one described by `target`.

    `negative`: of both; None for the source. Returns LATENT samples, and where the picture could change as a MASK
    [B, height, width].

    Raises ValueError for a model, latent, text or number that does not fit.
    """
    settings = settings.for_preset()
    sigmas = _grid(model, settings)
    samples = clean_latent(model, latent_image)
    if negative is None and settings.source_cfg != 1:
        raise ValueError(SOURCE_CFG)
    texts = {"source": source, "target": target, "negative": negative}
    for socket, conditioning in texts.items():
        if conditioning is not None:
            check_conditioning(conditioning, len(samples), socket)
            check_lengths(conditioning, model, socket)
            check_whole_sampling(conditioning, model, sigmas, socket)
    for advice in too_large(model, samples):
        running.warn(advice)
    picture = unframed(model.model.process_latent_in(samples))
    mask = limited(latent_image.get("noise_mask"), settings.mask, picture)
    guider = EditGuider(for_own_sampler(model))
    beside = {"positive": target, "negative": source if negative is None else negative}
    edits = {name: beside_the_source(text, source, SOCKETS[name]) for name, text in beside.items()}
    guider.inner_set_conds({**edits, "source": source})
    guider.set_cfg(settings.cfg)
    edit = _FlowEdit(picture, mask, settings)
    samples, blend_mask = sample(guider, edit.walk_down, samples, sigmas)
    if blend_mask is not None and settings.skip and (blend_mask.amin((1, 2, 3)) == 1).any():
        running.warn(WHOLE_PICTURE.format(preset=WHOLE))
    if base := base_of_distilled(model):
        running.warn(STEP_DISTILLED.format(base=base))
    return samples, edited_area(model, picture, mask, blend_mask)


def _grid(model: ModelPatcher, settings: FlowEditing) -> torch.Tensor:
    """The noise levels that are left after the skipped ones, descending to 0."""
    check_numbers(
        skip=settings.skip,
        source_cfg=settings.source_cfg,
        cfg=settings.cfg,
        local_blend=settings.local_blend,
        source_consistency=settings.averaging.consistency,
    )
    check_model(model, unet=False)
    sigmas = noise_levels(model, settings.steps, settings.scheduler, settings.sigmas)
    return sigmas[skipped(len(sigmas) - 1, settings.skip) :]


class _FlowEdit:
    """One edit. `picture`: the model's own latent [B, C, H, W]. `mask`: where it may change, None for everywhere."""

    def __init__(self, picture: torch.Tensor, mask: torch.Tensor | None, settings: FlowEditing):
        self.picture = picture
        self.mask = mask
        self.settings = settings

    def walk_down(self, run: Run) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the edited latent, the mask of the local blend)."""
        run.guider.add_source(self.picture)
        picture, levels = self.picture.to(run.x), run.sigmas.tolist()
        blend = LocalBlend(self.settings.local_blend) if self.settings.local_blend else None
        noise_mask = NoiseMask(self.mask, run.guider, run.model_options, run.sigmas)

        def after_step(step: int, edited: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
            if blend is not None:
                blend.observe(contrast, step / (len(levels) - 1))
                edited = blend.keep_source(edited, picture)
            mask = noise_mask.at(levels[step], picture)
            if mask is not None:
                edited = torch.lerp(picture, edited, mask)
            run.report(EDITING, step, edited, edited)
            return edited

        path, passes = noise_path(run.guider.model_patcher), _Passes(run, picture, self.settings)
        edited = flow_edit(picture, levels, path, passes, self.settings.averaging, after_step)
        return edited, None if blend is None else blend.mask


class _Passes:
    """See `editing.flow_edit.FlowEditPasses`: the guider's estimates, and noise that is one for all pictures of a batch."""

    def __init__(self, run: Run, picture: torch.Tensor, settings: FlowEditing):
        self.run = run
        self.picture = picture
        self.settings = settings
        self.generator = torch.Generator().manual_seed(settings.seed)

    def source(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        return self._estimate("source", x, sigma, self.settings.source_cfg)

    def target(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        return self._estimate("positive", x, sigma, self.settings.cfg)

    def noise(self) -> torch.Tensor:
        noise = torch.randn((1, *self.picture.shape[1:]), generator=self.generator)
        return noise.to(self.picture).expand_as(self.picture)

    def _estimate(self, text: str, x: torch.Tensor, sigma: float, cfg: float) -> torch.Tensor:
        guider = self.run.guider
        estimate = comfy.samplers.sampling_function(
            guider.inner_model,
            framed(x, guider.inner_model),
            x.new_full((len(x),), sigma),
            guider.conds["negative"],
            guider.conds[text],
            cfg,
            model_options=self.run.model_options,
            seed=self.run.extra_args.get("seed"),
        )
        return unframed(estimate)
