"""One call of ComfyUI's `apply_model`, and the smaller calls it can be made of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType

import torch

from ..methods.plug_and_play import PICTURES

GLIGEN_PATCHES = "middle_patch"


@dataclass
class UNetCall:
    """A call held back by a wrapper around `apply_model`. `first`: number of the picture that its rows start with."""

    executor: Callable
    x: torch.Tensor
    arguments: dict
    transformer_options: dict
    first: int = 0

    @property
    def model(self):
        return self.executor.class_obj

    @property
    def uuids(self) -> list:
        """Of the conditioning entries in the batch, in order."""
        return self.transformer_options["uuids"]

    @property
    def pictures(self) -> int:
        """Rows of each entry."""
        return len(self.x) // len(self.uuids)

    def __call__(self, x: torch.Tensor, transformer_options: dict, convert=lambda value: value) -> torch.Tensor:
        arguments = {name: convert(value) for name, value in self.arguments.items()}
        c_concat, c_crossattn, control = (arguments.pop(name) for name in ("c_concat", "c_crossattn", "control"))
        return self.executor(x, arguments.pop("t"), c_concat, c_crossattn, control, transformer_options, **arguments)

    def parts(self, rows: int) -> Iterator["UNetCall"]:
        """Calls of at most `rows` rows that make up this one: itself, or some of one entry's pictures each.

        GLIGEN's patches hold boxes for each row and are divided too; a call stays whole with others at their place that
        are not functions, since what those hold cannot be told.
        """
        options = self.transformer_options
        middle = options.get("patches", {}).get(GLIGEN_PATCHES, [])
        if len(self.x) <= rows or not all(isinstance(patch, FunctionType) for patch in middle):
            yield self
            return
        *_, total = options.get(PICTURES, (self.pictures,))
        for i, (uuid, branch) in enumerate(zip(self.uuids, options["cond_or_uncond"])):
            for start in range(0, self.pictures, rows):
                stop = min(start + rows, self.pictures)
                here = slice(i * self.pictures + start, i * self.pictures + stop)
                yield UNetCall(
                    self.executor,
                    self.x[here],
                    _rows(self.arguments, here, len(self.x)),
                    {
                        **options,
                        "uuids": [uuid],
                        "cond_or_uncond": [branch],
                        "sigmas": _rows(options["sigmas"], slice(start, stop), self.pictures),
                        "patches": _patches_of_rows(options.get("patches", {}), here, len(self.x)),
                        PICTURES: (self.first + start, self.first + stop, total),
                    },
                    self.first + start,
                )


def _patches_of_rows(patches: dict, here: slice, total: int) -> dict:
    if GLIGEN_PATCHES not in patches:
        return patches
    return {**patches, GLIGEN_PATCHES: [_function_of_rows(patch, here, total) for patch in patches[GLIGEN_PATCHES]]}


def _function_of_rows(function: FunctionType, here: slice, total: int) -> FunctionType:
    """A function like another, but of the tensors that it closes over it has some rows."""
    cells = tuple(CellType(_rows(cell.cell_contents, here, total)) for cell in function.__closure__ or ())
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _rows(value, here: slice, total: int):
    """The rows of tensors that have `total` of them, through lists, tuples and dicts; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value[here] if value.ndim and len(value) == total else value
    if isinstance(value, dict):
        return {name: _rows(item, here, total) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rows(item, here, total) for item in value)
    return value
