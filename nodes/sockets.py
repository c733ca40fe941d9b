"""What may come in at a socket, whoever made it."""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def first(items: Sequence[Item], socket: str) -> Item:
    """The item of a setting that is one for all pictures. Raises ValueError, naming `socket`, for an empty list."""
    if not items:
        raise ValueError(f"{socket}: the list is empty. Connect one with at least one item.")
    return items[0]


def require(value: object, kind: type, socket: str, maker: str) -> None:
    """Raise ValueError, naming `socket`, unless one of the pack's own objects comes in. `maker`: the node that makes it."""
    if not isinstance(value, kind):
        raise ValueError(f"{socket}: it is a {type(value).__name__} and nothing that {maker} made. Connect {maker}.")
