"""The source beside an edit in one sampling: its text, and where its picture may change, in one place for all methods.

The host hands ControlNets, GLIGEN boxes and areas on between the conditionings of a guider, and what controls the edit is
not for the source, nor the other way round. So the source's are loaded with the edit's, but processed apart from them.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider

from ...editing.trajectory import Inversion
from .checks import check_finite, framed, pixels_per_latent, unframed

SOURCE = "source"


class EditGuider(CFGGuider):
    """A CFGGuider with a third conditioning, "source"."""

    def __init__(self, model: ModelPatcher):
        super().__init__(model.clone())
        self._loaded = {}  # not `self`, which the MODEL would hold in a circle
        wrapper = partial(_load_and_take_out, self._loaded)
        self.model_patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "pix2pix_zero_source", wrapper)

    def add_source(self, picture: torch.Tensor) -> None:
        """Put the source beside the other conditionings, once a sampler runs. The host cleans it up with them.

        `picture`: the model's latent [B, C, H, W] that it describes.
        """
        device = self.model_patcher.load_device
        self.conds[SOURCE] = _process(self.inner_model, self._loaded[SOURCE], picture.to(device), device)


def _load_and_take_out(
    loaded: dict, executor: Callable, model: ModelPatcher, noise_shape: list[int], conds: dict, *args, **kwargs
) -> tuple:
    """A PREPARE_SAMPLING wrapper: the source is loaded with the other conditionings, and then stands in `loaded` alone."""
    real_model, conds, models = executor(model, noise_shape, conds, *args, **kwargs)
    loaded[SOURCE] = conds[SOURCE]
    return real_model, {name: entries for name, entries in conds.items() if name != SOURCE}, models


def load_with_source(
    inversion: Inversion, executor: Callable, model: ModelPatcher, noise_shape: list[int], conds: dict, *args, **kwargs
) -> tuple:
    """A PREPARE_SAMPLING wrapper: what the source's conditioning needs, such as its ControlNet, is loaded with the model."""
    # A model may carry several edits, with a source each.
    beside = {**conds, f"{SOURCE}_{len(conds)}": comfy.sampler_helpers.convert_cond(inversion.source)}
    real_model, _, models = executor(model, noise_shape, beside, *args, **kwargs)
    return real_model, conds, models


@contextlib.contextmanager
def processed_source(guider: CFGGuider, inversion: Inversion) -> Iterator[list[dict]]:
    """The source's conditioning as a running guider's own; it is cleaned up in the end."""
    source = {SOURCE: comfy.sampler_helpers.convert_cond(inversion.source)}
    comfy.samplers.preprocess_conds_hooks(source)
    comfy.samplers.filter_registered_hooks_on_conds(source, guider.model_options)
    device = guider.model_patcher.load_device
    entries = _process(guider.inner_model, source[SOURCE], inversion.latent(0).to(device), device)
    try:
        yield entries
    finally:
        comfy.sampler_helpers.cleanup_models({SOURCE: entries}, [])


def _check_no_noise_added(noise: torch.Tensor, latent_image: torch.Tensor | None, inversion: Inversion) -> None:
    """Raise ValueError if a sampler would add `noise` [B, C, H, W] to a latent that is the inversion's noise already."""
    if latent_image is None or not noise.any():
        return
    ours = inversion.latent(-1)
    start = unframed(latent_image)[: len(ours)].to(ours)
    if (start - ours).abs().max() < 1e-3 * ours.abs().max():
        raise ValueError(
            "noise: it would be added to `noise` of the inversion node, which is all the noise there must be. Use "
            "SamplerCustomAdvanced with DisableNoise, or KSampler (Advanced) with add_noise disabled."
        )


def check_size(x: torch.Tensor, inversion: Inversion) -> None:
    """Raise ValueError unless latents [B, C, H, W] have the inverted picture's size, which some samplers change on the way."""
    size = tuple(inversion.trajectory.shape[-2:])
    if tuple(x.shape[-2:]) != size:
        raise ValueError(
            f"sampler: it draws at another size, {tuple(x.shape[-2:])} in the latent, than that of the inverted picture, {size}. "
            "Use one that keeps the size, such as euler, and enlarge the picture afterwards."
        )


def start_of(
    inversion: Inversion, sigmas: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(noise, latent) that make the host's samplers begin at a latent that is the inversion's noise, where none is added.

    They mix the two by their shares, and a latent that flows is to be all noise at its noisiest level. Further down the
    host's own latents are as it wants them. Raises ValueError if noise would be added to what is all noise already.
    """
    _check_no_noise_added(noise, latent_image, inversion)
    above = float(sigmas[0]) >= (1 - 1e-3) * float(inversion.sigmas[-1])
    if not inversion.path.straight or not above or latent_image is None or noise.any():
        return noise, latent_image
    return latent_image / sigmas[0].to(latent_image), torch.zeros_like(latent_image)


def _process(model: BaseModel, source: list[dict], picture: torch.Tensor, device: torch.device) -> list[dict]:
    picture = framed(picture, model)
    noise = torch.zeros_like(picture)
    return comfy.samplers.process_conds(model, noise, {SOURCE: source}, device, picture, seed=0)[SOURCE]


class NoiseMask:
    """A noise mask in one sampling, as Differential Diffusion and the like change it along the way.

    `mask`: of any size, None where everything may change. `sigmas`: the noise levels of that sampling, descending.
    """

    def __init__(self, mask: torch.Tensor | None, guider: CFGGuider, model_options: dict, sigmas: torch.Tensor):
        self.mask = mask
        self.change = model_options.get("denoise_mask_function")
        self.context = {"model": guider, "sigmas": sigmas}

    def at(self, sigma: float, like: torch.Tensor) -> torch.Tensor | None:
        """The mask at a noise level in the shape of `like` [B, C, H, W], or None where everything may change."""
        if self.mask is None:
            return None
        mask = _latent_mask(self.mask, like)
        if self.change is None:
            return mask
        return self.change(like.new_full((len(like),), sigma), mask, extra_options=self.context)


def limited(noise_mask: torch.Tensor | None, mask: torch.Tensor | None, latent: torch.Tensor) -> torch.Tensor | None:
    """A latent's noise mask limited to a MASK [B or 1, height, width] as well: [B, 1, H, W], 1 where the picture may change.

    Raises ValueError for NaN, and for several masks that are fewer than the pictures.
    """
    for tensor, socket in ((noise_mask, "latent_image"), (mask, "mask")):
        if tensor is not None:
            check_finite(tensor, socket, "Draw the mask again.")
            check_masks(tensor, len(latent), socket)
    both = [_latent_mask(tensor, latent)[:, :1] for tensor in (mask, noise_mask) if tensor is not None]
    return math.prod(both) if both else None


def check_masks(masks: torch.Tensor, pictures: int, socket: str) -> None:
    """Raise ValueError unless MASKs [.., height, width] are one for all pictures, or at least as many as these."""
    count = masks.shape[:-2].numel()
    if 1 < count < pictures:
        raise ValueError(
            f"{socket}: it brings {count} masks for {pictures} pictures. Give one for all, or one for each picture."
        )


def masked(inversion: Inversion, mask: torch.Tensor | None) -> Inversion:
    """The inversion `limited` to a MASK [B or 1, height, width] as well."""
    if mask is None:
        return inversion
    return replace(inversion, noise_mask=limited(inversion.noise_mask, mask, inversion.latent(0)))


def edited_area(
    model: ModelPatcher, latent: torch.Tensor, noise_mask: torch.Tensor | None, blend_mask: torch.Tensor | None
) -> torch.Tensor:
    """Where a picture could change in an edit, as a MASK [B, height, width] of the picture's size.

    `latent`: the source's, [B, C, H, W]. `noise_mask`: of any size. `blend_mask`: [B, 1, H, W] in 0..1, what a local blend
    has found. Both None where nothing limits the edit.
    """
    area = torch.ones_like(latent[:, :1])
    if noise_mask is not None:
        area = _latent_mask(noise_mask, latent)[:, :1]
    if blend_mask is not None:
        area = area * blend_mask.to(area)
    ratio = pixels_per_latent(model)
    area = torch.nn.functional.interpolate(area, scale_factor=ratio, mode="bilinear", align_corners=False)[:, 0]
    return area.to(comfy.model_management.intermediate_device())


def _latent_mask(mask: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    return comfy.utils.reshape_mask(mask.float().clamp(0, 1), latent.shape).to(latent)
