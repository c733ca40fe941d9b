"""What a user gives to a node: what comes in at its sockets, checked by their types, and the wish to cancel a long loop.

Each check raises ValueError, naming the socket, for what has the wrong form. Values that have to be finite are looked at
together by `refuse_not_finite`, so that a run waits for the GPU once. Pictures are IMAGE tensors of ComfyUI,
[..., height, width, channels] in 0..1.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

LONGEST_TEXT = 2_000_000
VALUES_AT_ONCE = 2**23  # that are looked at before the next look at whether the user has cancelled
# Lists of files, which change while the server runs: the node itself looks its choice up.
FILES = frozenset({"direction_name", "model_name", "clip_model", "dino_model", "lpips_model", "folder", "edit"})
MAY_BE_INFINITE = frozenset({"attention_mask"})  # of a conditioning's options: it is added to what a softmax takes
WINDOWS = (("start_percent", "end_percent"),)

Item = TypeVar("Item")
_looks: list[Callable[[], None]] = []


class Socket(Protocol):
    """An input of a node's schema, as ComfyUI has it. A number may have `min` and `max`, a choice `options`."""

    id: str
    optional: bool
    # Some sockets have `lazy`: nothing comes in where the node has not asked for it.

    def get_io_type(self) -> str:
        """Such as "MODEL"."""


Kinds = Mapping[str, tuple[type, str]]
"""For each type of socket that is the pack's own, the class of what comes in, and the node that makes it."""


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
        for finite, values in zip(torch.stack([all_finite(each.tensor) for each in group]).tolist(), group):
            if not finite:
                raise ValueError(f"{values.socket}: it holds NaN or infinite values. {values.advice}")


def all_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether all values are finite, a tensor of one truth on the same device. Can be cancelled."""
    if not tensor.ndim:
        return tensor.isfinite()
    longest = max(range(tensor.ndim), key=lambda dim: tensor.shape[dim])
    size = max(1, VALUES_AT_ONCE * tensor.shape[longest] // max(1, tensor.numel()))
    parts = [part.isfinite().all() for part in interruptible(tensor.split(size, longest))]
    return torch.stack(parts).all()


def check_inputs(sockets: Sequence[Socket], lists: Mapping[str, Sequence], kinds: Kinds) -> None:
    """Raise ValueError, naming the socket, for what is not of the socket's type, or a part that ends before it starts.

    `lists`: all that comes in at each socket, by its name.
    """
    refuse_not_finite(_values(sockets, lists, kinds))
    for start, end in WINDOWS:
        for first_percent, last_percent in zip(lists.get(start, ()), lists.get(end, ())):
            if first_percent > last_percent:
                raise ValueError(
                    f"{start}: {first_percent:g} is later than {end}, {last_percent:g}. Set it to an earlier one."
                )


def _values(sockets: Sequence[Socket], lists: Mapping[str, Sequence], kinds: Kinds) -> Iterator[Values]:
    """All tensors that come in, once they have the right form."""
    for socket in sockets:
        io_type = socket.get_io_type()
        for value in lists.get(socket.id, ()):
            if value is None and io_type not in WIDGETS and (socket.optional or getattr(socket, "lazy", False)):
                continue
            if io_type in WIDGETS:
                WIDGETS[io_type](value, socket)
            elif io_type in kinds:
                _check_kind(value, socket, *kinds[io_type])
            elif io_type in TENSORS:
                yield from TENSORS[io_type](value, socket.id)


def _check_kind(value: Any, socket: Socket, kind: type, maker: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{socket.id}: it is a {type(value).__name__} and nothing that {maker} made. Connect {maker}.")


def _number(value: Any, socket: Socket) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{socket.id}: {value!r:.40} is not a number. Enter one.")
    low, high = getattr(socket, "min", None), getattr(socket, "max", None)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if not math.isfinite(value) or not low <= value <= high:
        between = f"between {low:g} and {high:g}" if math.isfinite(low) and math.isfinite(high) else "that is finite"
        raise ValueError(f"{socket.id}: {value:g} is not a number it can work with. Enter one {between}.")


def _truth(value: Any, socket: Socket) -> None:
    if not isinstance(value, (bool, int, float)):
        raise ValueError(f"{socket.id}: {value!r:.40} is neither true nor false. Connect a switch or a comparison.")


def _text(value: Any, socket: Socket) -> None:
    check_text(value, socket.id, LONGEST_TEXT)


def _choice(value: Any, socket: Socket) -> None:
    if not isinstance(value, str) or socket.id not in FILES and value not in socket.options:
        raise ValueError(
            f"{socket.id}: {value!r:.40} is none of its choices. Choose one of {', '.join(socket.options)}."
        )


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
        if text is not None:
            yield Values(text, socket, "Encode the text again, with the CLIP in fp32.")
        yield from _option_values(options, socket)


def _option_values(options: Mapping[str, Any], socket: str) -> Iterator[Values]:
    """The tensors in a conditioning's options, and in the control that it brings. Its numbers are checked."""
    pending = [(name, value) for name, value in options.items() if name not in MAY_BE_INFINITE]
    while pending:
        name, value = pending.pop()
        if torch.is_tensor(value):
            yield Values(value, socket, f"That is its {name}: look at the node that set it.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{socket}: its {name} is {value}. Enter a finite number in the node that set it.")
        elif isinstance(value, (list, tuple)):
            pending += [(name, item) for item in value]
        elif isinstance(value, dict):
            pending += value.items()
        elif name == "control":
            parts = {
                part: getattr(value, part, None) for part in ("strength", "cond_hint_original", "previous_controlnet")
            }
            pending += [("control", part) for part in parts.values() if part is not None]


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


def sigmas_values(sigmas: Any, socket: str) -> Iterator[Values]:
    """The tensor of SIGMAS [N + 1], two noise levels or more."""
    advice = "Connect a scheduler node."
    if not torch.is_tensor(sigmas) or not sigmas.is_floating_point() or sigmas.ndim != 1 or len(sigmas) < 2:
        found = list(sigmas.shape) if torch.is_tensor(sigmas) else type(sigmas).__name__
        raise ValueError(f"{socket}: expected two noise levels or more, got {found}. {advice}")
    yield Values(sigmas, socket, advice)


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


# An optional one of these has its default, so that nothing is not among what it may be.
WIDGETS: dict[str, Callable[[Any, Socket], None]] = {
    "FLOAT": _number,
    "INT": _number,
    "BOOLEAN": _truth,
    "STRING": _text,
    "COMBO": _choice,
}
TENSORS: dict[str, Callable[[Any, str], Iterator[Values]]] = {
    "MODEL": model_values,
    "CLIP": clip_values,
    "VAE": vae_values,
    "CONDITIONING": conditioning_values,
    "LATENT": latent_values,
    "IMAGE": image_values,
    "MASK": mask_values,
    "SIGMAS": sigmas_values,
}


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
    if not all_finite(image):
        raise ValueError(f"{socket}: it holds NaN or infinite values. Check the node that made it.")


def rgb(image: torch.Tensor) -> torch.Tensor:
    """The three colours in 0..1, float32: one or two channels count as grey, and alpha is left out, as VAE Encode does."""
    colours = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(*image.shape[:-1], 3)
    return colours.float().clamp(0, 1)


def rgb_bytes(image: torch.Tensor) -> np.ndarray:
    """The three colours as uint8."""
    return (rgb(image) * 255).round().to(torch.uint8).cpu().numpy()


def look_with(look: Callable[[], None]) -> None:
    """Call `look` before each turn of every interruptible loop, from now on. It raises where the user has cancelled."""
    if look not in _looks:
        _looks.append(look)


def look() -> None:
    """Raise where the user has cancelled."""
    for each in _looks:
        each()


def interruptible(items: Iterable[Item]) -> Iterator[Item]:
    """The items, with a look before each at whether the user has cancelled. A turn should take well below two seconds."""
    for item in items:
        look()
        yield item
