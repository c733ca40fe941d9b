"""What comes in at the sockets of a node, checked at its entrance by the sockets' types, whoever made it."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from comfy_api.latest import io

from ..editing.directions import EditDirection
from ..editing.inputs import check_text
from ..editing.trajectory import Inversion as InvertedPicture
from ..host import inputs
from ..host.inputs import Values
from ..host.networks.captioner import Captioner as CaptionerModel
from .sockets import Captioner, Direction, Inversion

LONGEST_TEXT = 2_000_000
# Lists of files, which change while the server runs: the node itself looks its choice up.
FILES = frozenset({"direction_name", "model_name", "clip_model", "dino_model", "lpips_model", "folder", "edit"})
WINDOWS = (("start_percent", "end_percent"),)
# An optional one of these has its default, so that nothing is not among what it may be.
WIDGETS = frozenset({"FLOAT", "INT", "BOOLEAN", "STRING", "COMBO"})


def checked(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, whose `execute` from now on looks first at all that comes in.

    It raises ValueError, naming the socket, for what is not of the socket's type, a number that is none or out of range, a
    text of another CLIP, and tensors that are empty or not finite.
    """
    execute = node.execute.__func__
    signature = inspect.signature(execute)
    schema: list[io.Schema] = []

    @functools.wraps(execute)
    def execute_checked(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        if not schema:
            schema.append(node.GET_SCHEMA())  # the host's clone of the class cannot be changed
        check_inputs(schema[0], _named(signature, cls, args, kwargs))
        return execute(cls, *args, **kwargs)

    node.execute = classmethod(execute_checked)
    return node


def _named(signature: inspect.Signature, cls: type, args: tuple, kwargs: dict) -> dict[str, Any]:
    return kwargs if not args else dict(list(signature.bind(cls, *args, **kwargs).arguments.items())[1:])


def check_inputs(schema: io.Schema, given: dict[str, Any]) -> None:
    """Raise ValueError, naming the socket, for what a node with this schema cannot work on."""
    lists = {name: value if schema.is_input_list else [value] for name, value in given.items()}
    inputs.refuse_not_finite(_values(schema, lists))
    for start, end in WINDOWS:
        for first_percent, last_percent in zip(lists.get(start, ()), lists.get(end, ())):
            if first_percent > last_percent:
                raise ValueError(
                    f"{start}: {first_percent:g} is later than {end}, {last_percent:g}. Set it to an earlier one."
                )
    for model in lists.get("model", ()):
        for socket in (item.id for item in schema.inputs if item.get_io_type() == "CONDITIONING"):
            for conditioning in lists.get(socket, ()):
                inputs.check_width(model, conditioning, socket)


def _values(schema: io.Schema, lists: dict[str, Sequence]) -> Iterator[Values]:
    """All tensors that come in, once they have the right form."""
    for item in schema.inputs:
        check = CHECKS.get(item.get_io_type())
        for value in lists.get(item.id, ()) if check is not None else ():
            if value is not None or not item.optional or item.get_io_type() in WIDGETS:
                yield from check(value, item) or ()


def _number(value: Any, item: io.Input) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{item.id}: {value!r:.40} is not a number. Enter one.")
    low, high = getattr(item, "min", None), getattr(item, "max", None)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if not math.isfinite(value) or not low <= value <= high:
        between = f"between {low:g} and {high:g}" if math.isfinite(low) and math.isfinite(high) else "that is finite"
        raise ValueError(f"{item.id}: {value:g} is not a number it can work with. Enter one {between}.")


def _truth(value: Any, item: io.Input) -> None:
    if not isinstance(value, (bool, int, float)):
        raise ValueError(f"{item.id}: {value!r:.40} is neither true nor false. Connect a switch or a comparison.")


def _text(value: Any, item: io.Input) -> None:
    check_text(value, item.id, LONGEST_TEXT)


def _choice(value: Any, item: io.Input) -> None:
    if not isinstance(value, str) or item.id not in FILES and value not in item.options:
        raise ValueError(f"{item.id}: {value!r:.40} is none of its choices. Choose one of {', '.join(item.options)}.")


def _own(kind: type, maker: str) -> Callable[[Any, io.Input], None]:
    return lambda value, item: require(value, kind, item.id, maker)


def _of_the_host(values: Callable[[Any, str], Iterator[Values]]) -> Callable[[Any, io.Input], Iterator[Values]]:
    return lambda value, item: values(value, item.id)


CHECKS: dict[str, Callable[[Any, io.Input], Iterator[Values] | None]] = {
    "FLOAT": _number,
    "INT": _number,
    "BOOLEAN": _truth,
    "STRING": _text,
    "COMBO": _choice,
    "MODEL": _of_the_host(inputs.model_values),
    "CLIP": _of_the_host(inputs.clip_values),
    "VAE": _of_the_host(inputs.vae_values),
    "CONDITIONING": _of_the_host(inputs.conditioning_values),
    "LATENT": _of_the_host(inputs.latent_values),
    "IMAGE": _of_the_host(inputs.image_values),
    "MASK": _of_the_host(inputs.mask_values),
    Inversion.io_type: _own(InvertedPicture, "Invert Picture"),
    Direction.io_type: _own(EditDirection, "Edit Direction"),
    Captioner.io_type: _own(CaptionerModel, "Load Captioner (BLIP)"),
}


def require(value: object, kind: type, socket: str, maker: str) -> None:
    """Raise ValueError, naming `socket`, unless one of the pack's own objects comes in. `maker`: the node that makes it."""
    if not isinstance(value, kind):
        raise ValueError(f"{socket}: it is a {type(value).__name__} and nothing that {maker} made. Connect {maker}.")
