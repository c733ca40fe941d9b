"""Inversion and guided sampling through ComfyUI's guider, which brings loading, conditioning, previews and progress."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ...attention_patches.sites import cross_attention_sites, is_unet, map_shapes
from ...editing import ddim
from ...editing.guidance import GuidanceSchedule, sample_guided, sample_official
from ...editing.inversion import Inversion
from ...editing.local_blend import LocalBlend
from ...editing.map_store import MapStore
from ...editing.regularization import NoiseRegularization, regularize_noise
from .. import progress
from ..methods.plug_and_play import with_source_features
from ..methods.presets import PRESETS
from ..unet.checkpointing import MODES
from ..unet.entries import areas_of
from ..unet.jobs import for_own_sampler
from ..unet.map_jobs import Checkpointing
from ..unet.memory import affordable_mode, affordable_rows, announce_memory, guided_pass_memory
from ..unet.model_state import attention_state
from .edit_guider import EditGuider
from .edit_texts import beside_the_source
from .hook_schedule import HookSchedule
from .inversion_walk import plain_psnr, walk_up
from .model_checks import check_inversion
from .noise_levels import ddim_grid, places_on_table
from .passes import UNetPasses

INVERSION_METHODS = ("direct", "ddim", "official", "diffusers", "fixed-point")
ON_THE_GRID = ("direct", "ddim", "fixed-point")  # their UNet calls are at the sampler's own levels
FIXED_POINT_ITERATIONS = 1
MAP_MEMORY = 2048 * 2**20


def clean_latent(model, latent_image: dict, socket: str = "latent_image") -> torch.Tensor:
    """The samples of a LATENT [B, C, H, W], checked to be finite and of the model's kind."""
    samples = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"{socket}: its shape is {tuple(samples.shape)}, but the model wants [batch, {channels}, height, width]. "
            "Encode the picture with the VAE that belongs to the model."
        )
    if not samples.isfinite().all():
        raise ValueError(f"{socket}: it contains NaN or infinite values. Try the VAE in fp32, and check the picture.")
    return samples


def invert_latent(
    model,
    positive: list,
    latent_image: dict,
    steps: int,
    seed: int,
    regularization: NoiseRegularization,
    method: str = "direct",
    map_memory: int = MAP_MEMORY,
    scheduler: str = "ddim_uniform",
    fixed_point_iterations: int = FIXED_POINT_ITERATIONS,
    measure_reconstruction: bool = False,
) -> Inversion:
    """Invert a LATENT described by the CONDITIONING `positive`. Raises ValueError as `ddim_grid` and `clean_latent`.

    The cross-attention maps of its UNet calls are kept for `sample_edit`, up to `map_memory` bytes, where they are made
    on the sampler's own levels: all methods but "official" and "diffusers". `fixed_point_iterations`: those of each step
    with the method "fixed-point", see `editing.inversion.invert_fixed_point`. `measure_reconstruction`: also redraw the
    picture plainly, in as many UNet calls as there are steps, to tell how well that works.
    """
    sigmas = ddim_grid(model, steps, scheduler).flip(0)
    samples = clean_latent(model, latent_image)
    check_conditioning(positive, len(samples), "positive")
    transitions = _transitions(model, sigmas, method)
    generator = torch.Generator().manual_seed(seed)
    trajectory = residuals = psnr = None
    unet = model.model.diffusion_model
    keeps_maps = map_memory > 0 and method in ON_THE_GRID and is_unet(unet)
    sites = cross_attention_sites(unet) if keeps_maps else []
    maps = MapStore(map_memory, attention_state(model)) if keeps_maps else None

    def walk(model_k, x, sigmas, extra_args, callback, disable):
        nonlocal trajectory, residuals, psnr
        passes = UNetPasses(model_k, extra_args, sites)
        hooks = HookSchedule(guider.model_patcher, list(guider.conds.values()), sigmas)

        def on_step(index, denoised, x):
            # The authors' inversion leaves out the first levels.
            _report(callback, sigmas, "Inverting", index + len(sigmas) - 1 - len(transitions), denoised, x)

        trajectory, residuals = walk_up(
            method,
            x,
            sigmas,
            transitions,
            passes,
            hooks,
            maps,
            lambda eps: regularize_noise(eps, regularization, generator),
            fixed_point_iterations,
            on_step,
        )
        if measure_reconstruction:
            psnr = plain_psnr(trajectory, sigmas, passes, hooks)
        return x

    guider = comfy.samplers.CFGGuider(for_own_sampler(model))
    # The negative is evaluated only where a patch of another pack asks for one.
    guider.set_conds(positive, positive)
    _sample(guider, walk, samples, sigmas, seed=0)
    mask = latent_image.get("noise_mask")
    return Inversion(trajectory, sigmas, positive, weakref.ref(model.model), mask, residuals, maps, psnr)


def _transitions(model, sigmas: torch.Tensor, method: str) -> list[ddim.Transition]:
    sampling = model.get_model_object("model_sampling")
    if method == "official":
        return ddim.official_transitions(places_on_table(sampling, sigmas[1:]), sampling.sigmas)
    if method == "diffusers":
        return ddim.diffusers_transitions(sigmas, sampling.sigmas)
    return ddim.inversion_transitions(sigmas)


def inverted_noise(inversion: Inversion, model) -> torch.Tensor:
    """The noise end of an inversion as LATENT samples: sample it with noise disabled on the inversion's own sigmas."""
    return model.model.process_latent_out(inversion.trajectory[-1]).to(comfy.model_management.intermediate_device())


def _sample(guider, sampler_function, samples: torch.Tensor, sigmas: torch.Tensor, seed: int) -> torch.Tensor:
    """Run `sampler_function` on LATENT samples, nothing added to them, with the host's preview and progress bar.

    `seed`: of what the host draws for a conditioning, such as unCLIP's noise: the same for inversion and edit.
    """
    callback = progress.over_runs(latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1))
    return guider.sample(
        torch.zeros_like(samples),
        samples,
        comfy.samplers.KSAMPLER(sampler_function),
        sigmas,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    ).to(comfy.model_management.intermediate_device())


def _report(callback, sigmas, phase: str, index: int, denoised, x, note: str = "") -> None:
    progress.show(f"{phase} {index + 1}/{len(sigmas) - 1}{note}")
    if callback is not None:
        callback({"i": index, "denoised": denoised, "x": x, "sigma": sigmas[index], "sigma_hat": sigmas[index]})


def check_conditioning(conditioning: list, batch: int, socket: str) -> None:
    """Raise ValueError unless every text of a CONDITIONING has one row, or one row per picture of the batch."""
    if not conditioning:
        raise ValueError(f"{socket}: it is empty. Connect an encoded text.")
    for text, _ in conditioning:
        if text is not None and len(text) not in (1, batch):
            raise ValueError(
                f"{socket}: it holds {len(text)} texts for {batch} pictures. Give one text, or one per picture."
            )


def sample_edit(
    model,
    inversion: Inversion,
    positive: list,
    negative: list,
    cfg: float,
    strength: float,
    window: tuple[float, float] = (0.0, 1.0),
    preset: str = "default",
    blend: LocalBlend | None = None,
    feature_until: float = 0.0,
) -> torch.Tensor:
    """Redraw an inverted picture along the edited CONDITIONING `positive`: LATENT samples [B, C, H, W].

    `window`: part of the sampling, as (start, end) percents in 0..1, in which cross-attention guidance acts. `preset`: a
    name in `presets.PRESETS`. `blend`: keeps the source wherever the edit does not act, and holds the mask afterwards.
    `feature_until`: part of the steps, 0..1 from the noisiest on, that are drawn with the source's own decoder features
    (Plug-and-Play, Tumanyan et al., CVPR 2023, section 4.1). The preset "official" does without blend and features.

    Raises ValueError if the inversion was made with another model or a conditioning does not fit the batch.
    """
    _check_edit(model, inversion, positive, negative)
    official = preset == "official"
    if feature_until and not official:
        model = with_source_features(model, inversion, feature_until, attention_until=0.0)
    positive, negative = (beside_the_source(texts, inversion.source) for texts in (positive, negative))
    chosen = PRESETS[preset]
    unet = model.model.diffusion_model
    sites = cross_attention_sites(unet)
    size = inversion.trajectory.shape[-2:]
    attending = len(positive) * sum(height * width for height, width in map_shapes(unet, size).values())
    sampling = model.get_model_object("model_sampling")
    levels = (sampling.percent_to_sigma(percent) for percent in window)
    guidance = GuidanceSchedule(strength, *levels, **chosen.schedule(inversion.steps))
    maps = None if official else _maps_for(model, inversion)
    needs = _needs([*positive, *inversion.source], maps, inversion.steps)
    guided = for_own_sampler(model)
    if strength:
        # The least it can do with, so that weights stay where they are; more is used where it is free.
        least = guided_pass_memory(model, inversion.trajectory.shape[1:], MODES[-1], **needs)
        guided = announce_memory(guided, least)

    def walk(model_k, x, sigmas, extra_args, callback, disable):
        guider.add_source()
        _check_areas(guider.conds["positive"], guider.conds["source"])
        mode = affordable_mode(model, x, chosen.checkpointing, **needs)
        rows = affordable_rows(model, x, mode, entries=len(positive) + len(negative), **needs)
        mask_at = partial(_mask_at, inversion, model_k, extra_args["model_options"], sigmas)
        run = (
            inversion,
            UNetPasses(model_k, extra_args, sites, Checkpointing(mode, rows)),
            inversion.trajectory[-1].to(x),
            guidance,
            partial(_report_edit, callback, sigmas, attending),
            partial(_keep_outside, inversion, mask_at),
        )
        if official:
            return sample_official(*run, final_sigma=float(sampling.sigmas[0]))
        return sample_guided(*run, lambda level: None if maps is None else maps.get(level, x.device), blend)

    guider = EditGuider(guided)
    guider.inner_set_conds({"positive": positive, "negative": negative, "source": inversion.source})
    guider.set_cfg(cfg)
    picture = model.model.process_latent_out(inversion.trajectory[0])
    return _sample(guider, walk, picture, inversion.sigmas.flip(0), seed=0)


def _check_edit(model, inversion: Inversion, positive: list, negative: list) -> None:
    check_inversion(inversion, model)
    for conditioning, socket in ((positive, "positive"), (negative, "negative")):
        check_conditioning(conditioning, inversion.batch, socket)
    if len(positive) != len(inversion.source):
        raise ValueError(
            f"positive: it has {len(positive)} parts, the caption of the inversion {len(inversion.source)}. "
            "Make it from the same conditioning, with Apply Direction."
        )


def _maps_for(model, inversion: Inversion) -> MapStore | None:
    """The maps that the inversion has kept, if the MODEL draws the same ones."""
    maps = inversion.maps
    return maps if maps is not None and maps.made_with == attention_state(model) else None


def _report_edit(callback, sigmas, attending: int, step: int, denoised, x, distance: torch.Tensor | None) -> None:
    """`attending`: how many pixels of all sites look at the text."""
    if distance is None:
        _report(callback, sigmas, "Sampling", step, denoised, x)
    else:
        note = f", map distance {float(distance.mean()) / attending:.3f}"
        _report(callback, sigmas, "Guided step", step, denoised, x, note)


def _needs(texts: list, maps: MapStore | None, steps: int) -> dict:
    """What beside the latent's size decides the memory of a guided pass, see `guided_pass_memory`.

    `texts`: the entries of both CONDITIONINGs, the edit's and the source's.
    """
    lengths = [text.shape[1] for text, _ in texts if text is not None]
    kept = maps is not None and all(maps.get(level, torch.device("cpu")) is not None for level in range(1, steps + 1))
    return {"records": not kept, **({"tokens": max(lengths)} if lengths else {})}


def masked(inversion: Inversion, mask: torch.Tensor | None) -> Inversion:
    """The inversion limited to a MASK [B or 1, height, width] as well, 1 where the picture may change."""
    if mask is None:
        return inversion
    mask = _latent_mask(mask, inversion.trajectory[0])
    if inversion.noise_mask is not None:
        mask = mask * _latent_mask(inversion.noise_mask, inversion.trajectory[0])
    return replace(inversion, noise_mask=mask)


def edited_area(model, inversion: Inversion, blend: LocalBlend | None) -> torch.Tensor:
    """Where a picture could change in an edit, as a MASK [B, height, width] of the picture's size."""
    latent = inversion.trajectory[0]
    area = torch.ones_like(latent[:, :1])
    if inversion.noise_mask is not None:
        area = _latent_mask(inversion.noise_mask, latent)[:, :1]
    if blend is not None and blend.mask is not None:
        area = area * blend.mask.to(area)
    ratio = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)
    area = torch.nn.functional.interpolate(area, scale_factor=ratio, mode="bilinear", align_corners=False)[:, 0]
    return area.to(comfy.model_management.intermediate_device())


def _latent_mask(mask: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    return comfy.utils.reshape_mask(mask, latent.shape).to(latent)


def _check_areas(positive: list[dict], source: list[dict]) -> None:
    # An area of the negative's that no other text has comes after them.
    if areas_of(positive)[: len(source)] != areas_of(source):
        raise ValueError(
            "positive: its parts are limited to other areas than those of the inversion's caption. Make it from the same "
            "conditioning, with Apply Direction."
        )


def _mask_at(inversion: Inversion, model_k, model_options: dict, sigmas: torch.Tensor, level: int) -> torch.Tensor:
    """The noise mask [B, C, H, W] at a level of the inversion, as Differential Diffusion and the like change it."""
    latent = inversion.trajectory[level].to(sigmas)
    mask = _latent_mask(inversion.noise_mask, latent)
    function = model_options.get("denoise_mask_function")
    if function is None:
        return mask
    # The stock sampler masks with a step's noise level before the step and after it.
    sigma = inversion.sigmas[max(level, 1)].to(sigmas).expand(len(latent))
    return function(sigma, mask, extra_options={"model": model_k.inner_model, "sigmas": sigmas})


def _keep_outside(
    inversion: Inversion, mask_at: Callable[[int], torch.Tensor], x: torch.Tensor, level: int
) -> torch.Tensor:
    """The source's own latent wherever the inversion's noise mask is 0."""
    if inversion.noise_mask is None:
        return x
    mask = mask_at(level)
    return mask * x + (1 - mask) * inversion.trajectory[level].to(x)


def generate_reference(
    model,
    positive: list,
    negative: list,
    latent_image: dict,
    steps: int,
    cfg: float,
    seed: int,
    scheduler: str = "ddim_uniform",
) -> tuple[Inversion, torch.Tensor]:
    """Generate a picture by DDIM from seeded noise and keep its trajectory: (inversion, LATENT samples)."""
    sigmas = ddim_grid(model, steps, scheduler)
    samples = clean_latent(model, latent_image)
    for conditioning, socket in ((positive, "positive"), (negative, "negative")):
        check_conditioning(conditioning, len(samples), socket)
    noise = comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))
    trajectory = []

    def walk(model_k, x, sigmas, extra_args, callback, disable):
        x = ddim.rescale(x, 0.0, float(sigmas[0]))
        trajectory.append(x.cpu())
        for index, (sigma, sigma_next) in enumerate(zip(sigmas.tolist(), sigmas.tolist()[1:])):
            denoised = model_k(x, x.new_full((len(x),), sigma), **extra_args)
            x = ddim.step(x, ddim.predicted_eps(x, denoised, sigma), sigma, sigma_next)
            trajectory.append(x.cpu())
            _report(callback, sigmas, "Generating", index, denoised, x)
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    latent = _sample(guider, walk, model.model.process_latent_out(noise), sigmas, seed=0)
    return Inversion(torch.stack(trajectory[::-1]), sigmas.flip(0), positive, weakref.ref(model.model)), latent
