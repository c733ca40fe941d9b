"""Long loops of plain code that a user can cancel, whatever program they run in."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_looks: list[Callable[[], None]] = []


def look_with(look: Callable[[], None]) -> None:
    """Call `look` before each turn of every interruptible loop, from now on. It raises where the user has cancelled."""
    if look not in _looks:
        _looks.append(look)


def interruptible(items: Iterable[Item]) -> Iterator[Item]:
    """The items, with a look before each at whether the user has cancelled. A turn should take well below two seconds."""
    for item in items:
        for look in _looks:
            look()
        yield item
