"""Keep the source picture's cross-attention maps between inversion and edit, within a budget."""

import torch

FIXED_POINT_STEPS = 65535


class MapStore:
    """Cross-attention maps per noise level, at most `budget` bytes of them, as 16-bit fixed-point numbers in RAM.

    Probabilities lie in 0..1, where 16-bit fixed point errs by at most 7.6e-6; half precision errs by up to 2.4e-4.
    When the budget is full, the level kept longest gives way: an inversion ends on the noisiest levels, where the layout
    is decided. `made_with`: what identifies the model and patches that drew the maps.
    """

    def __init__(self, budget: int, made_with: object = None):
        self.budget = budget
        self.made_with = made_with
        self._levels: dict[int, dict] = {}
        self._largest = 0

    def add(self, level: int, key: object, maps: torch.Tensor) -> None:
        """Keep fp `maps` [B, heads, pixels, tokens], values in 0..1, of one site at a level."""
        self._levels.setdefault(level, {})[key] = encode(maps).to("cpu")

    def will_keep(self, level: int, last: int) -> bool:
        """Whether a level would still be held after `last`, if those to come are as large as the largest so far.

        Maps of other levels need not be added: on a GPU, bringing them to RAM takes about as long as drawing them.
        """
        return self._largest * (last - level + 1) <= self.budget

    def trim(self) -> None:
        """Drop the oldest levels until the rest fits the budget. Call it after each level."""
        self._largest = max([self._largest, *(_size(maps) for maps in self._levels.values())])
        while self._levels and self.size > self.budget:
            del self._levels[next(iter(self._levels))]

    def drop(self, level: int) -> None:
        """Forget the maps of a level, if it is kept."""
        self._levels.pop(level, None)

    def get(self, level: int, device: torch.device) -> "KeptMaps | None":
        """The maps of a level, or None if it is not kept."""
        kept = self._levels.get(level)
        return None if kept is None else KeptMaps(kept, device)

    @property
    def size(self) -> int:
        """Bytes in use."""
        return sum(map(_size, self._levels.values()))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is kept, encoded."""
        return [maps for level in self._levels.values() for maps in level.values()]


def _size(level: dict) -> int:
    return sum(maps.nbytes for maps in level.values())


class KeptMaps:
    """{key: fp32 maps} on a device; each is decoded when it is asked for, so that only one at a time takes memory."""

    def __init__(self, codes: dict, device: torch.device):
        self._codes = codes
        self._device = device

    def __contains__(self, key: object) -> bool:
        return key in self._codes

    def __getitem__(self, key: object) -> torch.Tensor:
        return decode(self._codes[key].to(self._device))


def encode(maps: torch.Tensor) -> torch.Tensor:
    """Values in 0..1 as int16, evenly spaced."""
    return (maps * FIXED_POINT_STEPS - (FIXED_POINT_STEPS + 1) // 2).round().to(torch.int16)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """The fp32 values behind `encode`."""
    return (codes.float() + (FIXED_POINT_STEPS + 1) // 2) / FIXED_POINT_STEPS
