"""Sockets of nodes that take lists."""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def first(items: Sequence[Item], socket: str) -> Item:
    """The item of a setting that is one for all pictures. Raises ValueError, naming `socket`, for an empty list."""
    if not items:
        raise ValueError(f"{socket}: the list is empty. Connect one with at least one item.")
    return items[0]
