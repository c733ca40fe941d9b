"""Redraw an inverted picture along an edit (pix2pix-zero section 3.3, Algorithm 1), by ComfyUI's guider."""

import math
from dataclasses import dataclass, replace

import torch
from comfy.model_patcher import ModelPatcher

from ...attention_patches.attention import cross_attention_sites, is_unet, map_shapes
from ...attention_patches.joint import joint_family, patches, united
from ...editing.guidance import GuidanceSchedule, KeptSource, LocalBlend, sample_guided
from ...editing.official import sample_official
from ...editing.trajectory import Inversion, MapStore
from .. import running
from ..messages import GUIDED, LEFT_OUT, NO_UNET, NOT_GUIDED, SAMPLING, STEP_DISTILLED
from ..methods.joint_blocks import matched_sites
from ..methods.plug_and_play import SourceFeatures, sites_until
from ..running import Run, sample
from ..text.conditionings import (
    areas_of,
    beside_the_source,
    check_conditioning,
    check_lengths,
    check_whole_sampling,
    draws_negative,
    unlike_the_source,
)
from ..unet.jobs import attention_state, for_own_sampler, prepare_with
from ..unet.map_jobs import Checkpointing, Site
from ..unet.memory import MODES, affordable_mode, affordable_rows, announce_memory, guided_pass_memory
from .checks import base_of_distilled, check_inversion, check_numbers, framed
from .passes import UNetPasses, negative_is_source
from .source import EditGuider, NoiseMask, edited_area, masked


@dataclass(frozen=True)
class Preset:
    """How much of the guidance is computed, and what is kept meanwhile.

    `guided_steps`: about how many steps guidance would act on over the whole edit; all of them if None. `share`,
    `holds_negative`: see `editing.guidance.GuidanceSchedule`. `checkpointing`: the least that the backward pass computes
    again, see `memory.checkpointed`. `paper_step`: the paper's way: guidance alone, without the source's features and
    a local blend, in the whole sampling, by gradient steps of this size, the paper's lambda, in place of
    `guidance_strength`. `authors_update`: `sample_official` in place of `sample_guided`, which does not use kept maps.
    """

    guided_steps: int | None = None
    share: float = 1.0
    holds_negative: bool = False
    checkpointing: str = "none"
    paper_step: float | None = None
    authors_update: bool = False

    def schedule(self, guidance_strength: float, steps: int) -> GuidanceSchedule:
        """Of an edit of so many steps, all of which may be guided."""
        every = 1 if self.guided_steps is None else max(1, round(steps / self.guided_steps))
        plain = self.paper_step is not None
        strength = self.paper_step if plain else guidance_strength
        return GuidanceSchedule(strength, plain, every=every, share=self.share, holds_negative=self.holds_negative)


PAPER_LAMBDA = 0.1  # of the paper and of the authors' code

PRESETS = {
    "default": Preset(),
    # Spread steps hold the layout as well as all do, up to about three times the strength each.
    "fast": Preset(guided_steps=16, share=0.8, holds_negative=True, checkpointing="feed-forward"),
    "low memory": Preset(checkpointing="blocks"),
    "official": Preset(paper_step=PAPER_LAMBDA, authors_update=True),
    "paper": Preset(paper_step=PAPER_LAMBDA),
}


FEATURE_UNTIL = 0.5


@dataclass(frozen=True)
class EditSettings:
    """How an edit is drawn.

    `guidance_strength`: in 0..1, see `editing.guidance.GuidanceSchedule`. `window`: part of the sampling, as (start, end)
    percents in 0..1, in which guidance acts. `preset`: a name in `PRESETS`. `local_blend`: part of its strongest, 0..1, that
    the edit must act with where the source does not stay; 0 lets everything change. `feature_until`: part of the steps, 0..1
    from the noisiest on, that are drawn with the source's own decoder features (Plug-and-Play, Tumanyan et al., CVPR 2023,
    section 4.1).
    """

    cfg: float = 5.0
    guidance_strength: float = 0.0
    window: tuple[float, float] = (0.0, 1.0)
    preset: str = "default"
    local_blend: float = 0.0
    feature_until: float = 0.0
    mask: torch.Tensor | None = None

    def left_out(self) -> list[str]:
        """What is set and the preset does without."""
        set_ones = [name for name in ("guidance_strength", "local_blend", "feature_until") if getattr(self, name)]
        return [] if PRESETS[self.preset].paper_step is None else set_ones

    def for_preset(self) -> "EditSettings":
        """These settings as the preset draws them."""
        if PRESETS[self.preset].paper_step is None:
            return self
        return replace(self, window=(0.0, 1.0), **dict.fromkeys(self.left_out(), 0.0))

    @property
    def guides(self) -> bool:
        """Whether guidance may act."""
        return bool(self.guidance_strength or PRESETS[self.preset].paper_step)


def sample_edit(
    model: ModelPatcher, inversion: Inversion, positive: list, negative: list, settings: EditSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Redraw an inverted picture along the edited CONDITIONING `positive`.

    Returns LATENT samples [B, C, H, W], and where the picture could change as a MASK [B, height, width].

    Raises ValueError if the inversion was made with another model, a conditioning does not fit the batch, or a number is
    none.
    """
    _check(model, inversion, positive, negative, settings)
    for advice in unlike_the_source(inversion, positive, negative, settings.cfg):
        running.warn(advice)
    left_out = settings.left_out()
    settings = settings.for_preset()
    unread = not is_unet(model.model.diffusion_model) and bool(settings.feature_until)
    if not is_unet(model.model.diffusion_model):
        settings = without_features(settings, model)
    texts = {
        "positive": beside_the_source(positive, inversion.source, "positive"),
        "negative": beside_the_source(negative, inversion.source, "negative"),
        "source": inversion.source,
    }
    edit = _Edit(model, _with_valid_maps(masked(inversion, settings.mask), model, settings), settings, texts)
    guider = EditGuider(edit.patched_model())
    guider.inner_set_conds(texts)
    guider.set_cfg(settings.cfg)
    picture = model.model.process_latent_out(framed(inversion.latent(0), model))
    samples, blend_mask = sample(guider, edit.walk_down, picture, inversion.sigmas.flip(0))
    if left_out:
        names = " and ".join(", ".join(left_out).rsplit(", ", 1))
        running.warn(LEFT_OUT.format(preset=settings.preset, names=names))
    if unread:
        running.warn(NO_UNET)
    if base := base_of_distilled(model):
        running.warn(STEP_DISTILLED.format(base=base))
    return samples, edited_area(model, edit.inversion.latent(0), edit.inversion.noise_mask, blend_mask)


def without_features(settings: EditSettings, model: ModelPatcher) -> EditSettings:
    """Settings of an edit by a MODEL that has no decoder whose features could be taken.

    Raises ValueError where they are asked for otherwise than they stand on the node, and for guidance where the model's
    attention is not known.
    """
    if settings.feature_until not in (0.0, FEATURE_UNTIL):
        raise ValueError(
            f"feature_until: {settings.feature_until} needs the decoder of a UNet (SD 1.x, SD 2.x, SDXL), which this model does "
            "not have. Set it to 0, and use Plug-and-Play for the source's keys, values and features."
        )
    if settings.guides and joint_family(model.model.diffusion_model) is None:
        knob = "guidance_strength" if settings.guidance_strength else "preset"
        raise ValueError(
            f"{knob}: where {type(model.model.diffusion_model).__name__} reads the text is not known here, so that its attention "
            f"cannot be matched. Set it to {0 if settings.guidance_strength else 'default'}; local_blend and mask hold the "
            "picture."
        )
    return replace(settings, feature_until=0.0)


def _check(model: ModelPatcher, inversion: Inversion, positive: list, negative: list, settings: EditSettings) -> None:
    check_inversion(inversion, model, unet=False)
    if inversion.path.straight and PRESETS[settings.preset].authors_update:
        raise ValueError(
            f"preset: {settings.preset} is the authors' update of models that diffuse. Use default for a flow model."
        )
    start, end = settings.window
    check_numbers(cfg=settings.cfg, guidance_strength=settings.guidance_strength, start_percent=start, end_percent=end)
    check_numbers(local_blend=settings.local_blend, feature_until=settings.feature_until)
    if not 0 <= settings.guidance_strength <= 1:
        raise ValueError(
            f"guidance_strength: {settings.guidance_strength:g} is not between 0 and 1. Set it to 1 at most."
        )
    for conditioning, socket in ((positive, "positive"), (negative, "negative")):
        check_conditioning(conditioning, inversion.batch, socket)
        check_lengths(conditioning, model, socket)
    spoken = {"positive": positive, **({"negative": negative} if draws_negative(model, settings.cfg) else {})}
    for socket, conditioning in spoken.items():
        check_whole_sampling(conditioning, model, inversion.sigmas, socket)
    if len(positive) != len(inversion.source):
        raise ValueError(
            f"positive: it has {len(positive)} parts, the caption of the inversion {len(inversion.source)}. "
            "Make it from the same conditioning, with Apply Direction."
        )


def _with_valid_maps(inversion: Inversion, model: ModelPatcher, settings: EditSettings) -> Inversion:
    """The inversion with the maps that it has kept, if they are used and the MODEL draws the same ones."""
    kept = inversion.maps
    usable = kept is not None and not PRESETS[settings.preset].authors_update
    return inversion if usable and kept.made_with == attention_state(model) else replace(inversion, maps=None)


class _Edit:
    """One edit on a running guider. `texts`: the CONDITIONINGs "positive", "negative" and "source"."""

    def __init__(self, model: ModelPatcher, inversion: Inversion, settings: EditSettings, texts: dict[str, list]):
        self.model = model
        self.inversion = inversion
        self.settings = settings
        self.preset = PRESETS[settings.preset]
        self.entries = {name: len(texts[name]) for name in ("positive", "negative")}
        self.needs = _needs([*texts["positive"], *texts["source"]], inversion.maps, inversion.steps)

    def patched_model(self) -> ModelPatcher:
        """The MODEL that carries out jobs in its UNet calls, with room for the least that guidance can do with.

        So weights stay where they are; more memory is used where it is free.
        """
        guided = for_own_sampler(self.model)
        if not self.settings.guides:
            return guided
        least = guided_pass_memory(self.model, self.inversion.trajectory.shape[1:], MODES[-1], **self.needs)
        return announce_memory(guided, least)

    def walk_down(self, run: Run) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the edited latent, the mask of the local blend)."""
        run.guider.add_source(self.inversion.latent(0))
        _check_areas(run.guider.conds["positive"], run.guider.conds["source"])
        inversion, unet = self.inversion, self.model.model.diffusion_model
        x = inversion.latent(-1).to(run.x)
        arguments = {**run.extra_args, "model_options": self._with_source_features(run)}
        sites, own_sites = self._sites(run)
        passes = UNetPasses(run.model_k, arguments, sites, self._checkpointing(run), own_sites)
        blend = LocalBlend(self.settings.local_blend) if self.settings.local_blend else None
        noise_mask = NoiseMask(inversion.noise_mask, run.guider, run.model_options, run.sigmas)
        # The stock sampler masks with a step's noise level before the step and after it.
        kept = KeptSource(inversion, lambda level: noise_mask.at(float(inversion.sigmas[max(level, 1)]), x), blend)
        attending = self.entries["positive"] * _pixels(unet, own_sites or [sites], inversion.latent(0)).to(x)

        def on_step(step: int, denoised: torch.Tensor, x: torch.Tensor, distance: torch.Tensor | None) -> None:
            if distance is None:
                run.report(SAMPLING, step, denoised, x)
            else:
                off = float((distance / attending).mean())
                run.report(GUIDED, step, denoised, x, distance=f"{off:.3f}")

        loop = sample_official if self.preset.authors_update else sample_guided
        edited = loop(inversion, passes, x, self._schedule(), kept, on_step)
        if self.settings.guides and not kept.lets_guide:
            running.warn(NOT_GUIDED)
        return edited, None if blend is None else blend.mask

    def _sites(self, run: Run) -> tuple[list[Site], list[list[Site]] | None]:
        """(the attentions whose maps are matched, those of each picture where they are not all), see `UNetPasses`."""
        unet = self.model.model.diffusion_model
        if is_unet(unet):
            return cross_attention_sites(unet), None
        if not self.settings.guides:
            return [], None
        chosen = matched_sites(run.guider, self.inversion, run.guider.conds["source"], run.model_options)
        return united(unet, chosen), chosen if len(chosen) > 1 else None

    def _with_source_features(self, run: Run) -> dict:
        """Model options of the edit's evaluations."""
        until = self.settings.feature_until
        if not until:
            return run.model_options
        if self.inversion.aligned:  # each step is evaluated one level further down
            until = min(1.0, until + 1 / self.inversion.steps)
        sites = sites_until(self.model.model.diffusion_model, self.inversion, until, attention_until=0.0)
        conds = run.guider.conds
        negative = [] if negative_is_source(conds) else conds["negative"]
        features = SourceFeatures(self.inversion, conds["source"], sites, negative=negative)
        return prepare_with(run.model_options, features.put_into)

    def _schedule(self) -> GuidanceSchedule:
        sampling = self.model.get_model_object("model_sampling")
        first, last = (sampling.percent_to_sigma(percent) for percent in self.settings.window)
        schedule = self.preset.schedule(self.settings.guidance_strength, self.inversion.steps)
        return replace(schedule, first=first, last=last, final_sigma=float(sampling.sigmas[0]))

    def _checkpointing(self, run: Run) -> Checkpointing | None:
        if not is_unet(self.model.model.diffusion_model) and not self.settings.guides:
            return None
        mode = affordable_mode(self.model, run.x, self.preset.checkpointing, **self.needs)
        return Checkpointing(
            mode, affordable_rows(self.model, run.x, mode, entries=sum(self.entries.values()), **self.needs)
        )


def _pixels(unet: torch.nn.Module, chosen: list[list[Site]], latent: torch.Tensor) -> torch.Tensor:
    """How many rows of maps a latent [B, C, H, W] has at all its sites together: [1 or B], as `chosen` for all or for each."""
    if not is_unet(unet):
        return patches(unet, latent) * torch.tensor([len(sites) for sites in chosen])
    return torch.tensor([sum(math.prod(shape) for shape in map_shapes(unet, latent.shape[-2:]).values())])


def _needs(texts: list, maps: MapStore | None, steps: int) -> dict:
    """What beside the latent's size decides the memory of a guided pass, see `guided_pass_memory`.

    `texts`: the entries of both CONDITIONINGs, the edit's and the source's.
    """
    lengths = [text.shape[1] for text, _ in texts if text is not None]
    kept = maps is not None and all(maps.get(level, torch.device("cpu")) is not None for level in range(1, steps + 1))
    return {"records": not kept, **({"tokens": max(lengths)} if lengths else {})}


def _check_areas(positive: list[dict], source: list[dict]) -> None:
    # An area of the negative's that no other text has comes after them.
    if areas_of(positive)[: len(source)] != areas_of(source):
        raise ValueError(
            "positive: its parts are limited to other areas than those of the inversion's caption. Make it from the same "
            "conditioning, with Apply Direction."
        )
