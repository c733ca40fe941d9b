"""The source's text in a sampling of an edit: loaded with the edit's, processed apart from it, and compared with it.

The host hands ControlNets, GLIGEN boxes and areas on between the conditionings of a guider, and what controls the edit is
not for the source, nor the other way round.
"""

import contextlib
from collections.abc import Iterator

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_base import BaseModel

from ...editing.trajectory import Inversion

SOURCE = "source"
# Of inpainting and pix2pix models: the further channels of the UNet's input.
FURTHER_CHANNELS = ("concat_latent_image", "concat_mask")


class EditGuider(comfy.samplers.CFGGuider):
    """A CFGGuider with a third conditioning, "source", that describes the picture given as the latent image."""

    def inner_sample(self, noise, latent_image, device, *args, **kwargs):
        picture = self.inner_model.process_latent_in(latent_image) if torch.any(latent_image) else latent_image
        self._source = _process(self.inner_model, self.conds.pop(SOURCE), picture, device)
        return super().inner_sample(noise, latent_image, device, *args, **kwargs)

    def add_source(self) -> None:
        """Put the source beside the other conditionings, once a sampler runs. The host cleans it up with them."""
        self.conds[SOURCE] = self._source


def load_with_source(inversion: Inversion, executor, model, noise_shape, conds: dict, *args, **kwargs) -> tuple:
    """A PREPARE_SAMPLING wrapper: what the source's conditioning needs, such as its ControlNet, is loaded with the model."""
    # A model may carry several edits, with a source each.
    beside = {**conds, f"{SOURCE}_{len(conds)}": comfy.sampler_helpers.convert_cond(inversion.source)}
    real_model, _, models = executor(model, noise_shape, beside, *args, **kwargs)
    return real_model, conds, models


@contextlib.contextmanager
def processed_source(guider: comfy.samplers.CFGGuider, inversion: Inversion) -> Iterator[list[dict]]:
    """The source's conditioning as a running guider's own; it is cleaned up in the end."""
    source = {SOURCE: comfy.sampler_helpers.convert_cond(inversion.source)}
    comfy.samplers.preprocess_conds_hooks(source)
    comfy.samplers.filter_registered_hooks_on_conds(source, guider.model_options)
    device = guider.model_patcher.load_device
    entries = _process(guider.inner_model, source[SOURCE], inversion.trajectory[0].to(device), device)
    try:
        yield entries
    finally:
        comfy.sampler_helpers.cleanup_models({SOURCE: entries}, [])


def _process(model: BaseModel, source: list[dict], picture: torch.Tensor, device: torch.device) -> list[dict]:
    noise = torch.zeros_like(picture)
    return comfy.samplers.process_conds(model, noise, {SOURCE: source}, device, picture, seed=0)[SOURCE]


def beside_the_source(conditioning: list, source: list, socket: str) -> list:
    """A CONDITIONING of an edit with the further input channels of `source` where it names none of its own.

    A text that is the source's own counts as a description of the picture even as the negative: else a model with
    aesthetic scores (SDXL's refiner) would be told that it describes an ugly one, and the two would not cancel.
    Raises ValueError if it cannot be told which part of the source an entry stands beside.
    """
    completed = []
    for i, (text, options) in enumerate(conditioning):
        beside = [source[i]] if len(source) == len(conditioning) else source
        added = {}
        if not any(name in options for name in FURTHER_CHANNELS):
            added = _common_channels([options for _, options in beside], socket)
        if any(same_tensor(text, other) for other, _ in beside):
            added["prompt_type"] = "positive"
        completed.append([text, {**added, **options}])
    return completed


def _common_channels(sources: list[dict], socket: str) -> dict[str, torch.Tensor]:
    for name in FURTHER_CHANNELS:
        if not all(same_tensor(options.get(name), sources[0].get(name)) for options in sources):
            raise ValueError(
                f"{socket}: the parts of the inversion's caption are for different pictures to inpaint, and it has another "
                "number of parts. Combine it from as many texts as the caption."
            )
    return {name: sources[0][name] for name in FURTHER_CHANNELS if name in sources[0]}


def same_tensor(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether both are the same values, or both are None."""
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b.to(a)))
