"""The source's conditioning in a sampling of an edit: loaded with those of the sampling, and processed apart from them.

The host hands ControlNets on between the conditionings of a guider, and what controls the edit is not for the source.
"""

import contextlib
from collections.abc import Iterator

import comfy.sampler_helpers
import comfy.samplers
import torch

from ...editing.inversion import Inversion

SOURCE = "pix2pix_zero_source"


def load_with_source(inversion: Inversion, executor, model, noise_shape, conds: dict, *args, **kwargs) -> tuple:
    """A PREPARE_SAMPLING wrapper: what the source's conditioning needs, such as its ControlNet, is loaded with the model."""
    source = comfy.sampler_helpers.convert_cond(inversion.source)
    # A model may carry several edits, with a source each.
    beside = {**conds, f"{SOURCE}_{len(conds)}": source}
    real_model, _, models = executor(model, noise_shape, beside, *args, **kwargs)
    return real_model, conds, models


@contextlib.contextmanager
def processed_source(guider, inversion: Inversion) -> Iterator[list[dict]]:
    """The source's conditioning as a running guider's own; it is cleaned up in the end."""
    source = {SOURCE: comfy.sampler_helpers.convert_cond(inversion.source)}
    comfy.samplers.preprocess_conds_hooks(source)
    comfy.samplers.filter_registered_hooks_on_conds(source, guider.model_options)
    device = guider.model_patcher.load_device
    picture = inversion.trajectory[0].to(device)
    noise = torch.zeros_like(picture)
    model = guider.inner_model
    entries = comfy.samplers.process_conds(model, noise, source, device, latent_image=picture, seed=0)[SOURCE]
    try:
        yield entries
    finally:
        comfy.sampler_helpers.cleanup_models({SOURCE: entries}, [])
