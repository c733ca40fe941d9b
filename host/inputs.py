"""What ComfyUI's own sockets may bring: conditionings, latents, pictures, masks, models, each checked in one place.

Each check raises ValueError, naming the socket, for what has the wrong form, and hands over the tensors whose values are to
be finite. These are looked at together by `refuse_not_finite`, so that a run waits for the GPU once.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import comfy.model_base
import torch
from comfy.ldm.modules.attention import SpatialTransformer

from ..attention_patches.attention import is_unet, layers
from ..editing.inputs import check_image_shape

EMBEDDED = 256  # numbers that SDXL makes of each size it is told, beside the pooled text
SIZES = ((comfy.model_base.SDXL, 6), (comfy.model_base.SDXLRefiner, 5))


class Values(NamedTuple):
    """A tensor that must hold finite numbers, the socket it came in at, and what to do if it does not."""

    tensor: torch.Tensor
    socket: str
    advice: str


def refuse_not_finite(found: Iterable[Values]) -> None:
    """Raise ValueError, naming the socket, for NaN and infinite values. Waits once for each device."""
    by_device: dict[torch.device, list[Values]] = defaultdict(list)
    for values in found:
        if values.tensor.is_floating_point():
            by_device[values.tensor.device].append(values)
    for group in by_device.values():
        for finite, values in zip(torch.stack([each.tensor.isfinite().all() for each in group]).tolist(), group):
            if not finite:
                raise ValueError(f"{values.socket}: it holds NaN or infinite values. {values.advice}")


def conditioning_values(conditioning: Any, socket: str) -> Iterator[Values]:
    """The tensors of a CONDITIONING: pairs of a text [B, tokens, width], or None, and a dict of options."""
    if not isinstance(conditioning, (list, tuple)) or not all(map(_is_entry, conditioning)):
        raise ValueError(
            f"{socket}: it is a {type(conditioning).__name__} and no conditioning. Connect CLIP Text Encode."
        )
    if not conditioning:
        raise ValueError(f"{socket}: it is empty. Connect a text that CLIP Text Encode has encoded.")
    for text, options in conditioning:
        if text is not None and (text.ndim != 3 or not text.numel()):
            raise ValueError(
                f"{socket}: it holds no text of [batch, tokens, width], but shape {list(text.shape)}. Connect CLIP Text Encode."
            )
        mask = options.get("mask")
        if torch.is_tensor(mask) and not mask.numel():
            raise ValueError(f"{socket}: its mask has no pixels. Draw it again.")
        for values in (text, options.get("pooled_output"), mask):
            if torch.is_tensor(values):
                yield Values(values, socket, "Encode the text again, with the CLIP in fp32, and draw its mask again.")


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        return False
    text, options = entry
    return (text is None or torch.is_tensor(text)) and isinstance(options, dict)


def latent_values(latent: Any, socket: str) -> Iterator[Values]:
    """The tensors of a LATENT: its samples [B, C, H, W], at least 1 x 1, and its noise mask."""
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not torch.is_tensor(samples) or not samples.is_floating_point():
        raise ValueError(f"{socket}: it holds no samples. Connect VAE Encode or another node that gives a latent.")
    if not samples.numel() or samples.ndim < 3:
        raise ValueError(
            f"{socket}: its shape is {list(samples.shape)}, but a latent is [batch, channels, height, width]. Connect VAE "
            "Encode or another node that gives a latent."
        )
    yield Values(samples, socket, "Try the VAE in fp32, and check the picture.")
    mask = latent.get("noise_mask")
    if mask is not None:
        yield from mask_values(mask, socket, "its noise mask: ")


def image_values(image: Any, socket: str) -> Iterator[Values]:
    """The tensor of an IMAGE [B, H, W, 1 to 4 channels]."""
    check_image_shape(image, socket)
    yield Values(image, socket, "Check the node that made it.")


def mask_values(mask: Any, socket: str, words: str = "") -> Iterator[Values]:
    """The tensor of a MASK [B, H, W] or [H, W]; of bool too."""
    if not torch.is_tensor(mask) or mask.ndim not in (2, 3, 4) or not mask.numel():
        found = list(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
        raise ValueError(f"{socket}: {words}expected a mask [batch, height, width], got {found}. Draw it again.")
    yield Values(mask, socket, "Draw it again.")


def model_values(model: Any, socket: str) -> Iterator[Values]:
    """Nothing; a MODEL has no values to look at."""
    if not hasattr(model, "get_model_object"):
        raise ValueError(f"{socket}: it is a {type(model).__name__} and no model. Connect Load Checkpoint.")
    return iter(())


def clip_values(clip: Any, socket: str) -> Iterator[Values]:
    """Nothing; a CLIP has no values to look at."""
    if clip is None:
        raise ValueError(
            f"{socket}: there is none. If it comes from a checkpoint loader, the file has no text encoder."
        )
    if not hasattr(clip, "tokenize"):
        raise ValueError(f"{socket}: it is a {type(clip).__name__} and no CLIP. Connect Load Checkpoint or Load CLIP.")
    return iter(())


def vae_values(vae: Any, socket: str) -> Iterator[Values]:
    """Nothing; a VAE has no values to look at."""
    if vae is None or not hasattr(vae, "encode"):
        raise ValueError(f"{socket}: it is a {type(vae).__name__} and no VAE. Connect Load Checkpoint or Load VAE.")
    return iter(())


def check_width(model: Any, conditioning: list, socket: str) -> None:
    """Raise ValueError if the UNet of a MODEL cannot read the texts of a CONDITIONING: those of another CLIP."""
    unet = model.model.diffusion_model
    width = _text_width(unet) if is_unet(unet) else None
    pooled_width = next(
        (model.model.adm_channels - EMBEDDED * n for kind, n in SIZES if type(model.model) is kind), None
    )
    advice = "Encode the text with the CLIP that belongs to the model."
    for text, options in conditioning:
        if text is None and width is not None:
            raise ValueError(f"{socket}: it has no text, which the model reads. {advice}")
        if text is not None and width is not None and text.shape[-1] != width:
            raise ValueError(
                f"{socket}: its text has {text.shape[-1]} values for each token, the model reads {width}. {advice}"
            )
        if pooled_width is None or "unclip_conditioning" in options:
            continue
        pooled = options.get("pooled_output")
        if not torch.is_tensor(pooled) or pooled.ndim != 2 or pooled.shape[-1] != pooled_width:
            raise ValueError(
                f"{socket}: it has no pooled text of {pooled_width} values, which the model reads. {advice}"
            )


def _text_width(unet: torch.nn.Module) -> int | None:
    """The width of the texts that a UNet attends to."""
    for layer in layers(unet):
        if isinstance(layer.module, SpatialTransformer):
            for block in layer.module.transformer_blocks:
                keys = getattr(getattr(block, "attn2", None), "to_k", None)
                if keys is not None:
                    return getattr(keys, "in_features", None)
    return None
