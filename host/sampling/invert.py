"""Inversion: a picture walked up the noise levels by ComfyUI's guider (pix2pix-zero section 3.1)."""

from dataclasses import dataclass, field, replace
from functools import partial

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import ModelSamplingDiscrete

from ...attention_patches.attention import cross_attention_sites, is_unet
from ...editing.inversion import (
    FixedPoint,
    Transition,
    aligned_residuals,
    corrected_picture,
    diffusers_transitions,
    direct_residuals,
    inversion_transitions,
    invert,
    invert_fixed_point,
    latent_psnr,
    on_grid,
    reconstruct,
)
from ...editing.official import official_transitions
from ...editing.regularization import NoiseRegularization, regularize_noise
from ...editing.trajectory import Inversion, MapStore
from .. import running
from ..messages import (
    EXACT,
    FEW_MAPS,
    HALF_PRECISION,
    INVERTING,
    MEASURED,
    MEASURED_EXACT,
    NOT_MEASURED,
    REDRAWING,
)
from ..running import Run, sample
from ..text.conditionings import check_conditioning, check_lengths, check_whole_sampling
from ..unet.jobs import attention_state, for_own_sampler
from ..unet.memory import TOKENS, map_memory
from .checks import (
    AUTO,
    ON_THE_TABLE,
    check_finite,
    check_numbers,
    clean_latent,
    ddim_grid,
    framed,
    made_with,
    noise_path,
    too_large,
)
from .passes import UNetPasses
from .source import check_masks

METHODS = ("direct", "ddim", "official", "diffusers", "fixed-point", "aligned")
ON_THE_GRID = ("direct", "ddim", "fixed-point", "aligned")  # their UNet calls are at the sampler's own levels
# These keep what each step of the sampler misses the trajectory by.
CORRECTED = ("direct", "fixed-point", "aligned")
MAP_MEMORY = 2048 * 2**20
EXACTLY = 1e-2
"""How far a picture that comes back exactly may be off by rounding, where latents have a spread of about 1."""
FREE_SHARE = 0.9  # of free memory; the rest is for the host and other programs


@dataclass(frozen=True)
class InversionSettings:
    """How a picture is inverted.

    `steps`, `scheduler`, `sigmas`: see `ddim_grid`. `seed`: of the regularization's shifts. `method`: one of `METHODS`.
    `map_memory`: bytes for the cross-attention maps of its UNet calls, which are kept for edits with the methods
    `ON_THE_GRID`. `fixed_point_iterations`: those of each step with the method "fixed-point", see
    `editing.inversion.invert_fixed_point`. `measure_reconstruction`: also redraw the picture plainly, in as many UNet
    calls as there are steps, to tell how well that works. `kept_in`: the precision of the trajectory and of what corrects it.
    """

    steps: int = 50
    seed: int = 0
    regularization: NoiseRegularization = field(default_factory=NoiseRegularization)
    method: str = METHODS[0]
    map_memory: int = MAP_MEMORY
    scheduler: str = AUTO
    fixed_point_iterations: int = 1
    measure_reconstruction: bool = False
    sigmas: torch.Tensor | None = None
    kept_in: torch.dtype = torch.float32


def invert_latent(
    model: ModelPatcher, positive: list, latent_image: dict, settings: InversionSettings | None = None
) -> Inversion:
    """Invert a LATENT described by the CONDITIONING `positive`.

    Raises ValueError for a model, latent, text or number that does not fit, and if the result is not finite.
    """
    settings = settings or InversionSettings()
    regularization = settings.regularization
    check_numbers(autocorrelation_weight=regularization.autocorrelation_weight, kl_weight=regularization.kl_weight)
    sigmas = ddim_grid(model, settings.steps, settings.scheduler, settings.sigmas).flip(0)
    samples = clean_latent(model, latent_image)
    mask = latent_image.get("noise_mask")
    if mask is not None:
        check_finite(mask, "latent_image", "Draw its noise mask again.")
        check_masks(mask, len(samples), "latent_image")
    check_conditioning(positive, len(samples), "positive")
    check_lengths(positive, model, "positive")
    for advice in too_large(model, samples):
        running.warn(advice)
    transitions = _transitions(model, sigmas, settings)
    told = torch.tensor([transition.sigma_model for transition in transitions])
    check_whole_sampling(positive, model, torch.cat([told, sigmas[-1:]]), "positive")
    settings = replace(settings, **_within_memory(model, samples, positive, replace(settings, steps=len(sigmas) - 1)))
    guider = comfy.samplers.CFGGuider(for_own_sampler(model))
    # The negative is evaluated only where a patch of another pack asks for one.
    guider.set_conds(positive, positive)
    walk = partial(_walk_up, model, settings, transitions)
    _, found = sample(guider, walk, samples, sigmas, _further_passes(settings, len(sigmas) - 1))
    for tensor in (found["trajectory"], found["residuals"]):
        if tensor is not None:
            check_finite(tensor, "model", "The inversion ended in them. Load it in bf16 or fp32.")
    return Inversion(sigmas=sigmas, source=positive, noise_mask=mask, **made_with(model), **found)


def _further_passes(settings: InversionSettings, steps: int) -> int:
    """UNet calls after the last step of an inversion."""
    return (settings.method == "direct") + (steps if settings.measure_reconstruction else 0)


def _within_memory(model: ModelPatcher, samples: torch.Tensor, positive: list, settings: InversionSettings) -> dict:
    """The settings `kept_in` and `map_memory` that fit into memory, which it says where that is less than was asked for.

    Counted before the work: the latents that are kept, those of the way to them, and the maps. Raises ValueError where the
    latents do not fit even in half precision.
    """
    corrected = settings.method in CORRECTED
    kept_in, left = affordable_latents(model, samples, settings.steps, settings.steps if corrected else 0)
    maps = min(settings.map_memory, max(left, 0))
    unet = model.model.diffusion_model
    if maps < settings.map_memory and is_unet(unet):
        tokens = max((text.shape[1] for text, _ in positive if text is not None), default=TOKENS)
        wanted = settings.steps * map_memory(unet, tuple(samples.shape), tokens) // 2  # they are kept in 16 bits
        if maps < min(wanted, settings.map_memory):
            running.warn(FEW_MAPS.format(size=size_in_words(maps)))
    return {"kept_in": kept_in, "map_memory": maps}


def affordable_latents(
    model: ModelPatcher, latents: torch.Tensor, steps: int, corrections: int
) -> tuple[torch.dtype, int]:
    """In what precision the way of latents [B, C, H, W] can be kept in RAM, and the bytes that are left there.

    Kept are a latent for each level and so many `corrections`. Raises ValueError where they do not fit even in half
    precision.
    """
    cpu, device = torch.device("cpu"), model.load_device
    # Until the end of the way, the latents and estimates are held where the model is, and corrections are put together twice.
    walking = (2 * steps + 1) * latents.numel() * 4
    if device.type != "cpu":  # the host makes room before a sampling, by unloading what it does not need
        comfy.model_management.free_memory(walking / FREE_SHARE, device)
    free, there = (int(FREE_SHARE * comfy.model_management.get_free_memory(place)) for place in (cpu, device))
    ram = free - walking if device.type == "cpu" else free
    for dtype in (torch.float32, torch.float16):
        kept = (steps + 1 + 2 * corrections) * latents.numel() * dtype.itemsize
        if kept <= ram and walking <= there:
            if dtype == torch.float16:
                running.warn(HALF_PRECISION)
            return dtype, ram - kept
    needed, known = (walking, there) if walking > there else (walking + kept, free)
    raise ValueError(
        f"latent_image: {len(latents)} pictures in {steps} steps take {size_in_words(needed)} of memory, and "
        f"{size_in_words(known)} are free. Give fewer or smaller pictures, or fewer steps."
    )


def size_in_words(amount: float) -> str:
    """Bytes in MB or GB."""
    return f"{amount / 2**30:.1f} GB" if amount >= 2**30 else f"{amount / 2**20:.0f} MB"


def _transitions(model: ModelPatcher, sigmas: torch.Tensor, settings: InversionSettings) -> list[Transition]:
    method = settings.method
    if method not in ON_THE_GRID and noise_path(model).straight:
        raise ValueError(
            f"method: {method} is defined on the noise levels of a model that diffuses, and this one is a flow model. Use "
            f"{', '.join(ON_THE_GRID[:-1])} or {ON_THE_GRID[-1]}."
        )
    if method not in ON_THE_GRID and (settings.sigmas is not None or settings.scheduler not in (AUTO, *ON_THE_TABLE)):
        raise ValueError(
            f"method: {method} takes its noise levels from the model's table. Choose the scheduler {' or '.join(ON_THE_TABLE)}, "
            "without sigmas."
        )
    sampling = model.get_model_object("model_sampling")
    if method == "official":
        return official_transitions(places_on_table(sampling, sigmas[1:]), sampling.sigmas)
    if method == "diffusers":
        return diffusers_transitions(sigmas, sampling.sigmas)
    return inversion_transitions(sigmas)


def places_on_table(sampling: ModelSamplingDiscrete, sigmas: torch.Tensor) -> torch.Tensor:
    """The index of each noise level [N] in a model sampling's table: int64 [N]. Only in a table of 1000 is it the timestep."""
    return (sigmas[:, None].log() - sampling.log_sigmas.to(sigmas)).abs().argmin(1)


def inverted_noise(inversion: Inversion, model: ModelPatcher) -> torch.Tensor:
    """The noise end of an inversion as LATENT samples: sample it with noise disabled on the inversion's own sigmas."""
    noise = model.model.process_latent_out(framed(inversion.latent(-1), model))
    return noise.to(comfy.model_management.intermediate_device())


def _walk_up(
    model: ModelPatcher, settings: InversionSettings, transitions: list[Transition], run: Run
) -> tuple[torch.Tensor, dict]:
    """(the latent as it came, the fields of an `Inversion` that the way up gives)."""
    sigmas, method, path = run.sigmas, settings.method, noise_path(model)
    maps = _map_store(model, settings)
    sites = [] if maps is None else cross_attention_sites(model.model.diffusion_model)
    evaluations = _Evaluations(
        UNetPasses(run.model_k, run.extra_args, sites),
        _HookSchedule(run.guider.model_patcher, list(run.guider.conds.values()), sigmas),
        maps,
        last=len(sigmas) - (2 if method in ("ddim", "aligned") else 1),
    )
    generator = torch.Generator().manual_seed(settings.seed)
    regularize = partial(regularize_noise, settings=settings.regularization, generator=generator)
    skipped = len(sigmas) - 1 - len(transitions)  # the authors' inversion leaves out the first levels

    def on_step(index: int, denoised: torch.Tensor, x: torch.Tensor) -> None:
        evaluations.keep_maps_of(x, level=index + 1)
        run.report(INVERTING, index + skipped, denoised, x)

    if method == "fixed-point":
        visited, estimates = invert_fixed_point(
            run.x, sigmas, evaluations.denoise, regularize, on_step, FixedPoint(settings.fixed_point_iterations, path)
        )
        trajectory = torch.stack([x.to("cpu", settings.kept_in) for x in visited])
    else:
        visited, estimates = invert(run.x, transitions, evaluations.denoise, regularize, on_step, path)
        trajectory = on_grid(visited, transitions, run.x, sigmas, path, settings.kept_in)
    if method in ("direct", "aligned"):
        # The walk up has visited every level but the last one with just these estimates.
        estimates = estimates[1:]
        if method == "direct" or not estimates:
            estimates.append(evaluations.denoise(visited[-1], float(sigmas[-1]), len(sigmas) - 1))
            run.advance(len(sigmas) - 1, estimates[-1], visited[-1])
    residuals = None
    if method == "aligned":
        residuals = aligned_residuals(trajectory, sigmas, visited, estimates, path)
    elif method in CORRECTED:
        residuals = direct_residuals(trajectory, sigmas, estimates)
        if settings.kept_in == torch.float32:  # half precision has said so
            _check_comes_back(corrected_picture(trajectory, sigmas, estimates, residuals), trajectory[0])
    return run.x, {
        "trajectory": trajectory,
        "residuals": residuals,
        "aligned": method == "aligned",
        "maps": maps,
        "reconstruction_psnr": _plain_psnr(trajectory, run, evaluations, len(sigmas) - 1 + (method == "direct"))
        if settings.measure_reconstruction
        else None,
    }


def _check_comes_back(corrected: torch.Tensor, picture: torch.Tensor) -> None:
    """Raise ValueError if the inversion does not bring the picture back as exactly as its report says."""
    error = (corrected - picture).square().mean((1, 2, 3)).sqrt()
    if (error > EXACTLY).any():  # what is not finite has words of its own
        raise ValueError(
            "model: its estimates are so large that the picture is lost in their rounding. Load the model in bf16 or fp32, "
            "and lower the weights of LoRAs and patches."
        )


def _map_store(model: ModelPatcher, settings: InversionSettings) -> MapStore | None:
    keeps = settings.map_memory > 0 and settings.method in ON_THE_GRID and is_unet(model.model.diffusion_model)
    return MapStore(settings.map_memory, attention_state(model)) if keeps else None


class _HookSchedule:
    """Sets hooks to the keyframes that a sampler on its way down the same levels would be at.

    The host moves on from one keyframe of a schedule to the next and never back, as noise levels sink.
    """

    def __init__(self, patcher: ModelPatcher, conditionings: list[list[dict]], sigmas: torch.Tensor):
        groups = [entry["hooks"] for entries in conditionings for entry in entries if entry.get("hooks") is not None]
        self.patcher = patcher
        self.hooks = list({id(hook): hook for group in groups for hook in group.hooks}.values())
        self.options = {"sample_sigmas": sigmas}
        self.sigmas = sigmas.sort(descending=True).values.cpu()  # the host compares them one by one

    def go_to(self, sigma: float) -> None:
        """To be called ahead of the evaluation at this noise level."""
        if all(hook.hook_keyframe.is_empty() for hook in self.hooks):
            return
        for hook in self.hooks:
            hook.reset()
            for passed in self.sigmas[self.sigmas > sigma * (1 + 1e-4)]:
                hook.hook_keyframe.prepare_current_keyframe(curr_t=passed, transformer_options=self.options)
        # The host notices changes that it makes itself.
        self.patcher.cached_hook_patches.clear()
        self.patcher.patch_hooks(None)


class _Evaluations:
    """The UNet on the way up. What it draws on the trajectory is kept in `maps`. `last`: the last level it visits."""

    def __init__(self, passes: UNetPasses, hooks: _HookSchedule, maps: MapStore | None, last: int):
        self.passes = passes
        self.hooks = hooks
        self.maps = maps
        self.last = last
        self.recorded: tuple[int, torch.Tensor] | None = None

    def denoise(self, x: torch.Tensor, sigma: float, level: int = 0) -> torch.Tensor:
        """See `editing.inversion.Denoise`."""
        self.hooks.go_to(sigma)
        if self.maps is None or level == 0 or not self.maps.will_keep(level, self.last):
            return self.passes.denoise(x, sigma)
        self.recorded = level, x
        denoised = self.passes.denoise_and_record(x, sigma, partial(self.maps.add, level))
        self.maps.trim()
        return denoised

    def keep_maps_of(self, x: torch.Tensor, level: int) -> None:
        """Forget what was drawn at a level elsewhere than at `x`, which the trajectory goes on from."""
        if self.recorded is not None and self.recorded[0] == level and not torch.equal(self.recorded[1], x):
            self.maps.drop(level)


def _plain_psnr(trajectory: torch.Tensor, run: Run, evaluations: _Evaluations, done: int) -> torch.Tensor:
    """How well plain DDIM redraws the pictures from the end of their trajectory, see `latent_psnr`: [B].

    It takes N UNet calls with the source text as the positive, and no guidance. `done`: those before it.
    """
    grid = run.sigmas.tolist()

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        step = len(grid) - grid.index(sigma)
        denoised = evaluations.denoise(x, sigma)
        running.show(REDRAWING.format(step=step, steps=len(grid) - 1))
        run.advance(done + step - 1, denoised, x)
        return denoised

    return latent_psnr(reconstruct(trajectory[-1].to(run.sigmas), run.sigmas, denoise).cpu(), trajectory[0].float())


def reconstruction_report(inversion: Inversion) -> str:
    """One line: the PSNR of each picture if it was measured, and whether the sampler corrects what is lost."""
    corrected = inversion.residuals is not None
    if inversion.reconstruction_psnr is None:
        return EXACT if corrected else NOT_MEASURED
    figures = ", ".join(f"{psnr:.1f}" for psnr in inversion.reconstruction_psnr.tolist())
    return (MEASURED_EXACT if corrected else MEASURED).format(figures=figures)
