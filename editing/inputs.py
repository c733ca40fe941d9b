"""What comes in as text or picture: what it must be to be worked on, and a picture's plain colours.

Pictures are IMAGE tensors of ComfyUI, [..., height, width, channels] in 0..1.
"""

import numpy as np
import torch


def check_text(text: object, socket: str, longest: int) -> str:
    """The text. Raises ValueError, naming `socket`, if it is none, has more letters than `longest` or half characters."""
    if not isinstance(text, str):
        raise ValueError(f"{socket}: {text!r:.40} is not a text. Connect a node that writes text.")
    if len(text) > longest:
        raise ValueError(f"{socket}: it has {len(text)} letters, at most {longest} are of use. Shorten it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{socket}: letter {error.start + 1} is half a character, as a cut through an emoji leaves it. Type it again."
        ) from error
    return text


def check_image_shape(image: torch.Tensor, socket: str) -> None:
    """Raise ValueError, naming `socket`, unless this is a batch of pictures with 1 to 4 channels."""
    if not torch.is_tensor(image) or image.ndim != 4 or not image.numel() or image.shape[-1] > 4:
        found = list(image.shape) if torch.is_tensor(image) else type(image).__name__
        raise ValueError(
            f"{socket}: expected [batch, height, width, 1 to 4 channels], got {found}. Connect a node that gives pictures."
        )


def check_image(image: torch.Tensor, socket: str) -> None:
    """Raise ValueError as `check_image_shape`, and for values that are not finite."""
    check_image_shape(image, socket)
    if not torch.isfinite(image).all():
        raise ValueError(f"{socket}: it holds NaN or infinite values. Check the node that made it.")


def rgb(image: torch.Tensor) -> torch.Tensor:
    """The three colours in 0..1, float32: one or two channels count as grey, and alpha is left out, as VAE Encode does."""
    colours = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(*image.shape[:-1], 3)
    return colours.float().clamp(0, 1)


def rgb_bytes(image: torch.Tensor) -> np.ndarray:
    """The three colours as uint8."""
    return (rgb(image) * 255).round().to(torch.uint8).cpu().numpy()
