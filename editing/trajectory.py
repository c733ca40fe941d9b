"""The source picture on the sampler's grid, from the clean latent to noise, and between its levels."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType

import torch

from .map_store import MapStore


@dataclass(frozen=True, eq=False)
class Inversion(list):
    """A source picture at every level of the sampler's grid: what the P2PZ_INVERSION socket carries.

    A *level* is an index on the grid, 0 for the clean picture and N for the noisiest. `trajectory`: [N+1, B, C, H, W] fp32
    latents in the model's space, `trajectory[i]` at `sigmas[i]`. `sigmas`: [N+1] ascending from 0. `source`: the
    conditioning that describes the picture. `model`: the model it was made with. `noise_mask`: [.., H, W] in 0..1, where
    the picture may change. `residuals`: [N, B, C, H, W], what `direct_residuals` gives, or None to sample by plain DDIM.
    `maps`: the source's cross-attention maps, as far as they were kept, keyed by (entry of `source`, attention site).
    `reconstruction_psnr`: [B], how well plain DDIM redraws the picture, see `latent_psnr`, or None if that was not tried.
    `fingerprint`: the model's identity when `model` is gone, "" if it has none. `latent_format`: the host's object that
    tells how its latents are scaled.

    As a list it is that of the tensors it holds: ComfyUI's cache counts those that it finds in lists, and nothing else.
    """

    trajectory: torch.Tensor
    sigmas: torch.Tensor
    source: list
    model: ReferenceType
    noise_mask: torch.Tensor | None = None
    residuals: torch.Tensor | None = None
    maps: MapStore | None = None
    reconstruction_psnr: torch.Tensor | None = None
    fingerprint: str = ""
    latent_format: Any = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        held = (self.trajectory, self.sigmas, self.noise_mask, self.residuals, self.reconstruction_psnr)
        yield from (tensor for tensor in held if tensor is not None)
        yield from () if self.maps is None else self.maps.tensors

    def __len__(self) -> int:
        return sum(1 for _ in self)

    # Two inversions are the same only where they are one, as anything that holds tensors.
    __eq__, __ne__ = object.__eq__, object.__ne__
    __hash__ = object.__hash__

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def batch(self) -> int:
        """Number of pictures."""
        return self.trajectory.shape[1]

    def place_of(self, sigma: float) -> float:
        """Where a noise level lies on the grid, a whole number if it is one of its levels; linear in sigma between them.

        Above the noisiest level it goes on as between the last two.
        """
        above = self._level_above(sigma)
        low, high = self.sigmas[above - 1 : above + 1].tolist()
        return float(above) if abs(sigma - high) <= 1e-4 * high else above - 1 + (sigma - low) / (high - low)

    def latent_at(self, sigma: float) -> torch.Tensor:
        """The source's latent at any noise level: [B, C, H, W].

        Between two levels DDIM moves along a straight line in sigma (`ddim.step`), so this is where its own step would
        have come by. Above the noisiest level the last step goes on.
        """
        place = self.place_of(sigma)
        level = min(int(place), self.steps - 1)
        return torch.lerp(self.trajectory[level], self.trajectory[level + 1], place - level)

    def estimate_at(self, sigma: float) -> torch.Tensor:
        """The clean estimate with which DDIM goes down the source's trajectory from any noise level: [B, C, H, W]."""
        above = self._level_above(sigma)
        low, high = self.sigmas[above - 1 : above + 1].tolist()
        return torch.lerp(self.trajectory[above - 1], self.trajectory[above], -low / (high - low))

    def lowest_sigma(self, share: float) -> float:
        """The noise level down to which the first `share` of the steps goes, 0..1: inf for none, 0 for all."""
        steps = round(share * self.steps)
        if steps == 0:
            return float("inf")
        return 0.0 if steps == self.steps else float(self.sigmas[-steps]) * (1 - 1e-4)

    def _level_above(self, sigma: float) -> int:
        """The level that a noise level is on, or the next noisier one; never above the grid."""
        return int(torch.searchsorted(self.sigmas, sigma * (1 - 1e-4)).clamp(1, self.steps))
