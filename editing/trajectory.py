"""DDIM between a picture and its noise: the step, the source's own trajectory, and the maps that are kept along it.

Deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0) in sigma space, in both directions. A variance-preserving
latent `x_vp` at noise level `alpha_bar` is held as `x = x_vp * sqrt(1 + sigma^2)` with
`sigma = sqrt((1 - alpha_bar) / alpha_bar)`. In these coordinates DDIM is one line whatever the model predicts:
`x(sigma') = denoised + eps * sigma'` with `eps = (x - denoised) / sigma`.

A flow model mixes picture and noise along a straight line, `x = (1 - sigma) * picture + sigma * noise` (Liu et al. 2023,
Lipman et al. 2023). The same line then is Euler's step along its velocity `(x - denoised) / sigma`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ReferenceType

import torch

FIXED_POINT_STEPS = 65535
# Where so little is left of the picture, nothing can be told by it, and the noise in a latent is the latent itself.
FAINT = 0.05


@dataclass(frozen=True)
class NoisePath:
    """How picture and noise mix on the way from one to the other: `x = picture(sigma) * clean + sigma * noise`.

    `straight`: as in flow models, where `sigma` goes from 0 to 1 and `picture` is 1 - sigma. Else as in models that
    diffuse, in sigma space, where `picture` is 1. Both are the same way, up to a factor: what diffuses at sigma flows at
    sigma / (1 + sigma).
    """

    straight: bool = False

    def picture(self, sigma: float) -> float:
        """The share of the clean picture in a latent."""
        return 1.0 - sigma if self.straight else 1.0

    def total(self, sigma: float) -> float:
        """Picture and noise of a latent together, each by its factor."""
        return self.picture(sigma) + sigma

    def share(self, sigma: float) -> float:
        """The part of noise in that: where the latent lies on the straight line, in 0..1."""
        return sigma / self.total(sigma)

    def noise_to_picture(self, sigma: float) -> float:
        """Noise in a latent to each part of picture: the noise level in sigma space. Finite where no picture is left."""
        return sigma / max(self.picture(sigma), FAINT)

    def power(self, sigma: float) -> float:
        """The variance of a latent whose picture and noise have variance 1."""
        return self.picture(sigma) ** 2 + sigma**2

    def angle(self, sigma: float) -> float:
        """The angle between picture and noise in a variance-preserving latent, in radians, 0 for the clean picture."""
        return math.atan2(sigma, self.picture(sigma))

    def rescale(self, x: torch.Tensor, sigma_from: float, sigma_to: float) -> torch.Tensor:
        """The same variance-preserving latent, written at another noise level: what the UNet sees stays the same."""
        return x * (self.power(sigma_to) / self.power(sigma_from)) ** 0.5

    def noise_in(self, x: torch.Tensor, denoised: torch.Tensor, sigma: float) -> torch.Tensor:
        """The noise map that an estimate leaves of `x`. `sigma` > 0."""
        return (x - self.picture(sigma) * denoised) / sigma

    def step(self, x: torch.Tensor, noise: torch.Tensor, sigma_from: float, sigma_to: float) -> torch.Tensor:
        """`x` at another noise level, taken to hold this noise map. A flow model's `sigma_from` is below 1."""
        ratio = self.picture(sigma_to) / self.picture(sigma_from)
        return ratio * x + noise * (sigma_to - ratio * sigma_from)

    def step_by(
        self, x: torch.Tensor, seen: torch.Tensor, denoised: torch.Tensor, levels: tuple[float, float, float]
    ) -> torch.Tensor:
        """`x` after a step down by an estimate that was made at `seen`, which is `x` or beside it.

        `levels`: of the estimate, of `x`, and the one it goes to.
        """
        told, sigma, sigma_to = levels
        if told == sigma or self.picture(sigma) < FAINT:
            return ddim_step(x, predicted_eps(seen, denoised, told), sigma, sigma_to)
        return self.step(x, self.noise_in(seen, denoised, told), sigma, sigma_to)


DIFFUSION, FLOW = NoisePath(), NoisePath(straight=True)


def predicted_eps(x: torch.Tensor, denoised: torch.Tensor, sigma: float) -> torch.Tensor:
    """What `ddim_step` goes along: a diffusing model's noise map, whatever it predicts, a flow's velocity. `sigma` > 0."""
    return (x - denoised) / sigma


def ddim_step(x: torch.Tensor, eps: torch.Tensor, sigma_from: float, sigma_to: float) -> torch.Tensor:
    """One DDIM step along `eps` from one noise level to another, up or down."""
    return x + eps * (sigma_to - sigma_from)


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
    def levels(self) -> int:
        """How many levels are kept."""
        return len(self._levels)

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


class Generated(NamedTuple):
    """What a picture was generated with: the guidance scale, and the conditioning of the negative text."""

    cfg: float
    negative: list


@dataclass(frozen=True, eq=False)
class Inversion(list):
    """A source picture at every level of the sampler's grid: what the P2PZ_INVERSION socket carries.

    A *level* is an index on the grid, 0 for the clean picture and N for the noisiest. `trajectory`: [N+1, B, C, H, W]
    latents in the model's space, fp32, or fp16 where memory is short, `trajectory[i]` at `sigmas[i]`.
    `sigmas`: [N+1] ascending from 0. `source`: the
    conditioning that describes the picture. `model`: the model it was made with. `noise_mask`: [.., H, W] in 0..1, where
    the picture may change. `residuals`: [N, B, C, H, W], what `direct_residuals` gives, or None to sample by plain DDIM.
    `maps`: the source's cross-attention maps, as far as they were kept, keyed by (entry of `source`, attention site).
    `reconstruction_psnr`: [B], how well plain DDIM redraws the picture, see `latent_psnr`, or None if that was not tried.
    `identity`: what tells the model when `model` is gone, None if nothing does. `latent_format`: the host's object that
    tells how its latents are scaled. `path`: how its latents mix picture and noise. `generated`: of a picture that was
    generated rather than inverted. `aligned`: an edit is evaluated beside the latents that the inversion was evaluated at,
    see `seen_level`.

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
    identity: Any = None
    latent_format: Any = None
    path: NoisePath = DIFFUSION
    generated: Generated | None = None
    aligned: bool = False

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

    def latent(self, level: int) -> torch.Tensor:
        """The source's latent at a level, negative from the noisiest: [B, C, H, W], in fp32 if it is kept in fp16."""
        latent = self.trajectory[level]
        return latent.float() if latent.dtype == torch.float16 else latent

    def seen_level(self, level: int) -> int:
        """The level that the step down from `level` is evaluated on: that which the inversion's step up was evaluated on.

        The sampler's own, where the inversion is not aligned. So is the last step's: on the clean picture it is undefined.
        """
        return max(level - 1, 1) if self.aligned else level

    def seen_from(self, x: torch.Tensor, level: int) -> torch.Tensor:
        """Where the step down from `x` at `level` is evaluated: as far from the source at `seen_level` as `x` is at `level`.

        The distance is that of variance-preserving latents, which the UNet sees.
        """
        seen = self.seen_level(level)
        if seen == level:
            return x
        levels = float(self.sigmas[level]), float(self.sigmas[seen])
        return self.latent(seen).to(x) + self.path.rescale(x - self.latent(level).to(x), *levels)

    def place_of(self, sigma: float) -> float:
        """Where a noise level lies on the grid, a whole number if it is one of its levels; linear in sigma between them.

        Above the noisiest level it goes on as between the last two.
        """
        above = self._level_above(sigma)
        low, high = self.sigmas[above - 1 : above + 1].tolist()
        return float(above) if abs(sigma - high) <= 1e-4 * high else above - 1 + (sigma - low) / (high - low)

    def latent_at(self, sigma: float) -> torch.Tensor:
        """The source's latent at any noise level: [B, C, H, W].

        Between two levels DDIM moves along a straight line in sigma (`ddim_step`), so this is where its own step would
        have come by. Above the noisiest level the last step goes on.
        """
        place = self.place_of(sigma)
        level = min(int(place), self.steps - 1)
        return torch.lerp(self.latent(level), self.latent(level + 1), place - level)

    def estimate_at(self, sigma: float) -> torch.Tensor:
        """The clean estimate with which DDIM goes down the source's trajectory from any noise level: [B, C, H, W]."""
        above = self._level_above(sigma)
        low, high = self.sigmas[above - 1 : above + 1].tolist()
        return torch.lerp(self.latent(above - 1), self.latent(above), -low / (high - low))

    def lowest_sigma(self, share: float) -> float:
        """The noise level down to which the first `share` of the steps goes, 0..1: inf for none, 0 for all."""
        steps = round(share * self.steps)
        if steps == 0:
            return float("inf")
        return 0.0 if steps == self.steps else float(self.sigmas[-steps]) * (1 - 1e-4)

    def _level_above(self, sigma: float) -> int:
        """The level that a noise level is on, or the next noisier one; never above the grid."""
        return int(torch.searchsorted(self.sigmas, sigma * (1 - 1e-4)).clamp(1, self.steps))
