"""What inversion and edits cannot work on, and why not, in words: models, latents, texts, masks."""

import hashlib
import math
import weakref
from typing import Any

import comfy.sample
import torch
from comfy import model_sampling as kinds
from comfy.model_patcher import ModelPatcher

from ...editing.trajectory import Inversion

USE = "Use a model that predicts eps or v: SD 1.x, SD 2.x, SDXL or one made from them."


def check_diffusion(model: ModelPatcher) -> None:
    """Raise ValueError unless a MODEL diffuses on discrete, variance-preserving steps and predicts eps or v."""
    reason = _reason_against(model.get_model_object("model_sampling"))
    if reason is not None:
        raise ValueError(f"model: {reason} {USE}")


def check_inversion(inversion: Inversion, model: ModelPatcher) -> None:
    """Raise ValueError as `check_diffusion`, and unless the inversion was made with this MODEL, patched or not.

    A model that was loaded anew from the same file is the same.
    """
    check_diffusion(model)
    if inversion.model() is model.model:
        return
    if not inversion.fingerprint or inversion.fingerprint != model_fingerprint(model):
        raise ValueError(
            "inversion: it was made with another model. Connect the same model to Invert Picture and to this node."
        )


def model_fingerprint(model: ModelPatcher) -> str:
    """Identity of a diffusion model, the same in every session: class, shapes, a sample of the weights.

    Patches such as LoRAs are left out: the model below them counts. The sample is hashed in half precision, so that a
    model loaded in another precision is the same, as far as its weights are.
    """
    shapes = {key: tuple(weight.shape) for key, weight in model.model_state_dict("diffusion_model.").items()}
    digest = hashlib.sha256(type(model.model).__name__.encode())
    for key in sorted(shapes):
        digest.update(f"{key}{shapes[key]}".encode())
    floating = sorted(key for key, shape in shapes.items() if shape)
    for key in floating[:: max(1, len(floating) // 16)]:
        weight = model.get_key_patches(key)[key][0][0]
        if type(weight) in (torch.Tensor, torch.nn.Parameter):  # a quantized one has no elements to take
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 512)].to("cpu", torch.float16)
            digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return f"{type(model.model).__name__}-{digest.hexdigest()[:16]}"


def made_with(model: ModelPatcher) -> dict[str, Any]:
    """The fields of an `Inversion` that say which MODEL it is of. Nothing of the model is kept alive."""
    return {
        "model": weakref.ref(model.model),
        "fingerprint": model_fingerprint(model),
        "latent_format": model.get_model_object("latent_format"),
    }


def pixels_per_latent(model: ModelPatcher) -> int:
    """How many pixels of the picture, along a side, a latent pixel of the MODEL stands for."""
    return getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)


def clean_latent(model: ModelPatcher, latent_image: dict) -> torch.Tensor:
    """The samples of a LATENT [B, C, H, W], checked to be finite and of the model's kind."""
    samples = latent_image.get("samples")
    if samples is None or len(samples) == 0:
        raise ValueError("latent_image: it holds no picture. Connect a VAE Encode.")
    samples = comfy.sample.fix_empty_latent_channels(model, samples)
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"latent_image: its shape is {tuple(samples.shape)}, but the model wants [batch, {channels}, height, width]. "
            "Encode the picture with the VAE that belongs to the model."
        )
    check_finite(samples, "latent_image", "Try the VAE in fp32, and check the picture.")
    return samples


def check_finite(tensor: torch.Tensor, socket: str, advice: str) -> None:
    """Raise ValueError, naming the socket, for NaN and infinite values."""
    if not tensor.isfinite().all():
        raise ValueError(f"{socket}: it contains NaN or infinite values. {advice}")


def check_numbers(**knobs: float) -> None:
    """Raise ValueError for a knob that is NaN or infinite, which the host's own validation lets pass."""
    for name, value in knobs.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}: {value} is not a number it can work with. Enter a finite one.")


def check_conditioning(conditioning: list, batch: int, socket: str) -> None:
    """Raise ValueError unless every text of a CONDITIONING is finite and has one row, or one per picture of the batch."""
    if not conditioning:
        raise ValueError(f"{socket}: it is empty. Connect an encoded text.")
    for text, options in conditioning:
        if text is not None and len(text) not in (1, batch):
            raise ValueError(
                f"{socket}: it holds {len(text)} texts for {batch} pictures. Give one text, or one per picture."
            )
        for values in (text, options.get("pooled_output"), options.get("mask")):
            if isinstance(values, torch.Tensor):
                check_finite(values, socket, "Encode the text again, with the CLIP in fp32.")


def check_whole_sampling(conditioning: list, model: ModelPatcher, sigmas: torch.Tensor, socket: str) -> None:
    """Raise ValueError if a CONDITIONING says nothing at one of the noise levels that the UNet is told.

    `sigmas`: in any order; a level of 0 is never told.
    """
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    windows = [
        (to_sigma(options.get("start_percent", 0.0)), to_sigma(options.get("end_percent", 1.0)))
        for _, options in conditioning
    ]
    for sigma in sigmas.tolist():
        if sigma > 0 and not any(last <= sigma <= first for first, last in windows):
            raise ValueError(
                f"{socket}: it is limited to a part of the sampling (ConditioningSetTimestepRange?) and says nothing at noise "
                f"level {sigma:.2f}. Use a text for all of it, or combine it with one for the rest."
            )


def _reason_against(sampling) -> str | None:
    if isinstance(sampling, _kinds("CONST", "COSMOS_RFLOW", "IMG_TO_IMG_FLOW")):
        return (
            "this one is a flow model (such as SD3, Flux, AuraFlow, Qwen or Wan). It mixes picture and noise along straight "
            "lines, on which DDIM inversion and its noise levels are not defined."
        )
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
