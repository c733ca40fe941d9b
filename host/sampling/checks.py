"""What inversion and edits work on: which model a MODEL is, its noise levels, and what is refused, in words."""

import hashlib
import math
import os
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy import model_sampling as kinds
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ...attention_patches.attention import is_unet
from ...editing.trajectory import DIFFUSION, FLOW, Inversion, NoisePath
from ..messages import LARGE

AUTO = "auto"
SCHEDULERS = ("ddim_uniform", "simple", "normal", "sgm_uniform", "beta")
ON_THE_TABLE = SCHEDULERS[:2]  # their levels are entries of the model's table
MANY_TIMES = 4.0
NORM_GROUPS = 32  # of channels, in the normalizations of a UNet
# The side of the pictures that a UNet was trained on, by the width of the texts that it attends to; of all others the last.
SIDES = {768: 512, 1024: 768}
LARGEST_SIDE = 1024
LARGEST_VALUE = 1e5  # of a latent: about as much as fp16 holds, a thousand times what a VAE gives
USE = "Use a model that predicts eps or v: SD 1.x, SD 2.x, SDXL or one made from them."
FAINT = 1e-3  # part of a model's noisiest level, by which a grid may miss it
# By the host's class and what is in the file's name: the model that a step-distilled one was made from.
STEP_DISTILLED = (
    ("FluxSchnell", "", "FLUX.1 dev"),
    ("ZImage", "turbo", "Z-Image"),
    ("SD3", "turbo", "SD 3.5 Large"),
    ("HiDream", r"fast|dev", "HiDream-I1 Full"),
    ("Flux2", r"klein(?!.*base)", "FLUX.2 klein base"),
    ("HunyuanImage21", "distil", "HunyuanImage-2.1"),
    ("", r"schnell|turbo|lightning|hyper|distil", "the one that it was made from"),
)
BROKEN = "Load it in bf16 or fp32, and lower the weights of LoRAs and patches."
# Least part of a weight's values that are equal in one precision, where two files are the same.
SAME_VALUES = 0.75


def noise_path(model: ModelPatcher) -> NoisePath:
    """How a MODEL's latents mix picture and noise."""
    return FLOW if isinstance(model.get_model_object("model_sampling"), kinds.CONST) else DIFFUSION


def check_model(model: ModelPatcher, unet: bool = True) -> None:
    """Raise ValueError unless a MODEL diffuses on discrete, variance-preserving steps and predicts eps or v, or flows.

    `unet`: one that flows must be a UNet.
    """
    if flows(model) and (not unet or is_unet(model.model.diffusion_model)):
        return
    reason = _reason_against(model)
    if reason is not None:
        raise ValueError(f"model: {reason} {USE}")


def flows(model: ModelPatcher) -> bool:
    """Whether a MODEL, UNet or not, flows in straight lines from standard noise (rectified flow)."""
    sampling = model.get_model_object("model_sampling")
    straight = isinstance(sampling, kinds.CONST) and not isinstance(sampling, _kinds("IMG_TO_IMG_FLOW"))
    shifted = isinstance(sampling, (kinds.ModelSamplingDiscreteFlow, kinds.ModelSamplingFlux))
    scale = getattr(sampling, "noise_scale", 1.0)
    return straight and shifted and scale == 1.0


def ddim_grid(
    model: ModelPatcher, steps: int, scheduler: str = AUTO, given: torch.Tensor | None = None
) -> torch.Tensor:
    """Noise levels descending to 0, about [steps + 1], see `noise_levels`.

    `scheduler`: "ddim_uniform" counts from the cleanest level, as DDIM does (Song et al. 2021), and has more levels where
    `steps` does not divide the table; "simple" counts from the noisiest, as models that draw in few steps are trained,
    and has exactly `steps`. The levels of these two are entries of the model's table. "auto" is "normal" for models that
    flow and "ddim_uniform" for others.

    Raises ValueError for a model, UNet or not, that `check_model` refuses or that has fewer levels, for levels that do not
    fit it, and for a scheduler that does not begin at the noise of a model that flows.
    """
    check_model(model, unet=False)
    scheduler = fitting_scheduler(model, scheduler)
    levels = noise_levels(model, steps, scheduler, given)
    if given is None and noise_path(model).straight and levels[0] < (1 - FAINT) * _noisiest(model):
        others = ", ".join(SCHEDULERS[1:-1])
        raise ValueError(
            f"scheduler: {scheduler} does not begin at the noise of this flow model. Choose {others} or {SCHEDULERS[-1]}."
        )
    return levels


def fitting_scheduler(model: ModelPatcher, scheduler: str) -> str:
    """The scheduler that "auto" stands for with this MODEL, or the one that it is."""
    if scheduler != AUTO:
        return scheduler
    return "normal" if noise_path(model).straight else SCHEDULERS[0]


def noise_levels(model: ModelPatcher, steps: int, scheduler: str, given: torch.Tensor | None = None) -> torch.Tensor:
    """The host's grid of a scheduler, or the `given` SIGMAS, descending to 0, for any MODEL.

    Raises ValueError if the model has fewer levels, and for SIGMAS that do not fit it.
    """
    if given is not None:
        return _fitting_levels(given, _noisiest(model))
    sampling = model.get_model_object("model_sampling")
    table = len(sampling.sigmas)  # an LCM has 50 where others have 1000
    if not 1 <= steps <= table:
        raise ValueError(f"steps: {steps} is outside 1 to {table}, the number of the model's noise levels.")
    return comfy.samplers.calculate_sigmas(sampling, scheduler, steps)


def _fitting_levels(given: torch.Tensor, noisiest: float) -> torch.Tensor:
    levels = given.detach().float().cpu()
    if levels[-1] != 0 or (levels.diff() >= 0).any():
        raise ValueError(
            "sigmas: they must descend to 0, without a level twice. Connect those of a scheduler node with denoise 1, not "
            "flipped and not the high part of a split."
        )
    if levels[0] > (1 + FAINT) * noisiest:
        raise ValueError(
            f"sigmas: they begin at {float(levels[0]):.4g}, and the noise of this model at {noisiest:.4g}. Connect the same "
            "model to the scheduler node and to this one."
        )
    return levels


def _noisiest(model: ModelPatcher) -> float:
    return float(model.get_model_object("model_sampling").sigma_max)


def check_inversion(inversion: Inversion, model: ModelPatcher, unet: bool = True) -> None:
    """Raise ValueError as `check_model`, and unless the inversion was made with this MODEL, patched or not.

    A model that was loaded anew from the same file is the same, in another precision too.
    """
    check_model(model, unet)
    if inversion.path != noise_path(model):
        raise ValueError(
            "inversion: it was made with a model that mixes picture and noise in another way. Connect the same Model "
            "Sampling node to Invert Picture and to this node."
        )
    if inversion.model() is model.model:
        return
    if inversion.identity is None or not inversion.identity.is_of(model_identity(model)):
        raise ValueError(
            "inversion: it was made with another model. Connect the same model to Invert Picture and to this node."
        )


@dataclass(frozen=True, eq=False)
class ModelIdentity:
    """What a diffusion model is known by, in every session: its class, shapes and a sample of its weights.

    `weights`: by name, each [up to about 512 values] of the type in which the model holds them.
    """

    shapes: str
    weights: dict[str, torch.Tensor]

    def is_of(self, other: "ModelIdentity") -> bool:
        """Whether both are of one file, which may have been loaded in two precisions."""
        return self.shapes == other.shapes and all(
            _same_values(values, other.weights[name]) for name, values in self.weights.items() if name in other.weights
        )


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same values, in whose types they were rounded.

    What was rounded twice on its way may have gone the other way in some places, by a step of the coarser type.
    """
    coarse = max((a.dtype, b.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    step = torch.finfo(coarse).eps
    least = max(kind.eps * kind.smallest_normal for kind in map(torch.finfo, (a.dtype, b.dtype)))
    a, b = (values.float().to(coarse).float() for values in (a, b))
    near = torch.isclose(a, b, rtol=1.01 * step, atol=1.01 * least, equal_nan=True)
    return bool(near.all()) and float(((a == b) | a.isnan()).float().mean()) >= SAME_VALUES


def model_identity(model: ModelPatcher) -> ModelIdentity:
    """That of a MODEL. Patches such as LoRAs are left out: the model below them counts."""
    shapes = {key: tuple(weight.shape) for key, weight in model.model_state_dict("diffusion_model.").items()}
    digest = hashlib.sha256(type(model.model).__name__.encode())
    for key in sorted(shapes):
        digest.update(f"{key}{shapes[key]}".encode())
    weights = {}
    keys = sorted(key for key, shape in shapes.items() if shape)
    sampled = tuple(keys[:: max(1, len(keys) // 16)])
    below = model.get_key_patches(sampled)  # once: each call lists all weights of the model
    for key in sampled:
        weight = below[key][0][0]
        plain = type(weight) in (torch.Tensor, torch.nn.Parameter)  # a quantized one has no elements to take
        if plain and weight.is_floating_point():
            flat = weight.detach().flatten()
            weights[key] = flat[:: max(1, flat.numel() // 512)].to("cpu", copy=True)
    return ModelIdentity(digest.hexdigest(), weights)


def made_with(model: ModelPatcher) -> dict[str, Any]:
    """The fields of an `Inversion` that say which MODEL it is of. Nothing of the model is kept alive."""
    return {
        "model": weakref.ref(model.model),
        "identity": model_identity(model),
        "latent_format": model.get_model_object("latent_format"),
        "path": noise_path(model),
    }


def base_of_distilled(model: ModelPatcher) -> str:
    """The model to use in place of a flow MODEL that was distilled to draw in few steps; "" for any other.

    It is told by its class, or by the name of the file that it was loaded from.
    """
    if not flows(model):
        return ""
    loaded = getattr(model, "cached_patcher_init", None) or (None, ())
    names = " ".join(os.path.basename(item) for item in loaded[1] if isinstance(item, str)).lower()
    known = type(getattr(model.model, "model_config", None)).__name__
    for kind, pattern, base in STEP_DISTILLED:
        if known == kind and (not pattern or re.search(pattern, names)) or not kind and re.search(pattern, names):
            return base
    return ""


def has_frames(model: ModelPatcher | BaseModel) -> bool:
    """Whether the latents of a MODEL have a dimension for frames: of one that draws videos too, as Qwen-Image, Wan and Anima.

    A picture has one frame there, [B, C, 1, H, W], for the host. All that this pack computes with are [B, C, H, W].
    """
    form = model.latent_format if isinstance(model, BaseModel) else model.get_model_object("latent_format")
    return getattr(form, "latent_dimensions", 2) == 3


def framed(x: torch.Tensor, model: ModelPatcher | BaseModel) -> torch.Tensor:
    """Latents [B, C, H, W] as the host wants them for a MODEL."""
    return x.unsqueeze(2) if has_frames(model) else x


def unframed(x: torch.Tensor) -> torch.Tensor:
    """The latents [B, C, H, W] of what the host gives, with one frame or without."""
    return x.squeeze(2) if x.ndim == 5 else x


class OneFrame:
    """A guider's evaluation, called with latents [B, C, H, W] where the model's have a frame."""

    def __init__(self, model_k: Any):
        self.model_k = model_k
        self.inner_model = model_k.inner_model

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return self.model_k(x.unsqueeze(2), sigma, **arguments).squeeze(2)


def estimates(model: BaseModel, conds: list, x: torch.Tensor, timestep: torch.Tensor, options: dict) -> list:
    """The host's estimates of the clean latent for some conditionings, all [B, C, H, W]."""
    drawn = comfy.samplers.calc_cond_batch(model, conds, framed(x, model), timestep, options)
    return [unframed(estimate) for estimate in drawn]


def pixels_per_latent(model: ModelPatcher) -> int:
    """How many pixels of the picture, along a side, a latent pixel of the MODEL stands for."""
    return getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)


def best_side(model: ModelPatcher) -> int:
    """About the side, in pixels, of the pictures that a MODEL draws best."""
    config = getattr(model.model, "model_config", None)
    unet = getattr(config, "unet_config", None) or {}
    return getattr(type(config), "best_side", None) or SIDES.get(unet.get("context_dim"), LARGEST_SIDE)


def too_large(model: ModelPatcher, samples: torch.Tensor) -> Iterator[str]:
    """That a latent [B, C, H, W] is many times as large as what the MODEL draws best, as a message, if it is."""
    ratio, side = pixels_per_latent(model), best_side(model)
    height, width = (ratio * size for size in samples.shape[-2:])
    times = height * width / side**2
    if times >= MANY_TIMES:
        yield LARGE.format(width=width, height=height, times=f"{times:.0f}", side=side)


def clean_latent(model: ModelPatcher, latent_image: dict) -> torch.Tensor:
    """The samples of a LATENT [B, C, H, W], checked to be finite and of the model's kind.

    They have one frame, [B, C, 1, H, W], where the model's latents have some.
    """
    samples = latent_image.get("samples")
    if samples is None or len(samples) == 0:
        raise ValueError("latent_image: it holds no picture. Connect a VAE Encode.")
    samples = comfy.sample.fix_empty_latent_channels(model, samples)
    channels = model.get_model_object("latent_format").latent_channels
    frames = has_frames(model)
    if frames and samples.ndim == 5 and samples.shape[2] > 1:
        raise ValueError(
            f"latent_image: it is a video of {samples.shape[2]} frames in the latent, and only pictures are edited. Encode one "
            "picture at a time."
        )
    if samples.ndim != 4 + frames or samples.shape[1] != channels:
        wanted = f"[batch, {channels}, {'1, ' if frames else ''}height, width]"
        raise ValueError(
            f"latent_image: its shape is {tuple(samples.shape)}, but the model wants {wanted}. Encode the picture with the "
            "VAE that belongs to the model."
        )
    check_finite(samples, "latent_image", "Try the VAE in fp32, and check the picture.")
    if (largest := float(samples.abs().max())) > LARGEST_VALUE:
        raise ValueError(
            f"latent_image: its values reach {largest:.1e}, where those of a picture stay below 100. Look at the nodes between "
            "VAE Encode and this one, such as Latent Multiply."
        )
    _check_not_too_small(model, *samples.shape[-2:])
    return samples


def _check_not_too_small(model: ModelPatcher, height: int, width: int) -> None:
    """Raise ValueError for a latent of which a UNet with one channel in each group has a single value to normalize."""
    unet = getattr(getattr(model.model, "model_config", None), "unet_config", None) or {}
    widths = [factor * unet.get("model_channels", 0) for factor in unet.get("channel_mult", ())]
    # Halved after a level of so many channels, they are normalized before there are more of them.
    halvings = [min(level + 1, len(widths) - 1) for level, wide in enumerate(widths) if wide == NORM_GROUPS]
    halved = 2 ** max(halvings, default=0)
    if halvings and max(height, width) <= halved:
        ratio = pixels_per_latent(model)
        raise ValueError(
            f"latent_image: a picture of {ratio * width}x{ratio * height} is too small for this model. One side has to be "
            f"longer than {ratio * halved} pixels: put Crop to Edit ahead of VAE Encode."
        )


def check_finite(tensor: torch.Tensor, socket: str, advice: str) -> None:
    """Raise ValueError, naming the socket, for NaN and infinite values."""
    if not tensor.isfinite().all():
        raise ValueError(f"{socket}: it contains NaN or infinite values. {advice}")


def check_numbers(**knobs: float) -> None:
    """Raise ValueError for a knob that is NaN or infinite, which the host's own validation lets pass."""
    for name, value in knobs.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}: {value} is not a number it can work with. Enter a finite one.")


def _reason_against(model: ModelPatcher) -> str | None:
    sampling = model.get_model_object("model_sampling")
    if flows(model):
        return (
            "this one is a flow model without a UNet (such as SD3, Flux, AuraFlow, Qwen or Wan). This node edits UNets, also "
            "those that flow, such as SDXL behind ModelSamplingSD3; FlowEdit and KSampler (Pix2Pix-Zero) edit "
            "all of them."
        )
    if isinstance(sampling, _kinds("CONST", "COSMOS_RFLOW", "IMG_TO_IMG_FLOW")):
        return "this one is a flow model that does not go straight from a picture to standard noise."
    if isinstance(sampling, _kinds("StableCascadeSampling")):
        return "this one is Stable Cascade, which diffuses on a schedule and latents of its own, without a UNet's attention."
    if isinstance(sampling, _kinds("V_PREDICTION_DDPM")):
        return "this one is a video model that is trained on latents of another scale than DDIM inversion has."
    if isinstance(sampling, _kinds("X0", "IMG_TO_IMG")):
        return "this one predicts a picture and not the noise in it, so there is no noise that inversion could follow."
    if isinstance(sampling, _kinds("EDM", "ModelSamplingContinuousEDM")):
        return (
            "this one is an EDM model (such as CosXL, Playground 2.5, Cosmos or Stable Video Diffusion). It is trained on "
            "continuous noise levels, of which DDIM inversion has no grid."
        )
    if not isinstance(sampling, kinds.ModelSamplingDiscrete) or not isinstance(sampling, kinds.EPS):
        return f"its noise schedule ({type(sampling).__name__}) is not one that DDIM inversion is defined on."
    return None


def _kinds(*names: str) -> tuple[type, ...]:
    """Those of ComfyUI's classes that this version of it has."""
    return tuple(getattr(kinds, name) for name in names if hasattr(kinds, name))
