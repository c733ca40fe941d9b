"""A small SD 1.x-shaped UNet with random weights, wrapped as ComfyUI's loaders wrap real ones."""

import contextlib
import functools
from collections.abc import Iterator

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from pix2pix_zero.benchmarks.small_sd import SETTINGS, SmallSD

CONTEXT_DIM = SETTINGS["context_dim"]
TOKENS = 7
GAINS = {"out": 0.1}
CONFIG = dict(
    SETTINGS,
    model_channels=64,
    transformer_depth=[1, 2],
    transformer_depth_middle=2,
    transformer_depth_output=[1, 1, 2, 2],
    dtype=torch.float32,
)
# One transformer wherever there are any, and none at the outer level: half the work, where their number does not matter.
SHALLOW = {"transformer_depth": [0, 1], "transformer_depth_middle": 1, "transformer_depth_output": [0, 0, 1, 1]}
# The decoder's alone, for what only has to be there: what the sister methods take of the source is there.
SHALLOWEST = {**SHALLOW, "transformer_depth": [0, 0], "transformer_depth_middle": -1}
# A quarter of the weights, where no size of theirs matters.
NARROW = {"model_channels": 32}


@functools.cache  # to draw them takes longer than all the rest
def _weights(seed, shapes):
    generator, values = torch.Generator().manual_seed(seed), []
    for name, shape in shapes:
        value = torch.randn(shape, generator=generator)
        if value.ndim > 1:
            value *= GAINS.get(name.split(".", 1)[0], 1.0) * value[0].numel() ** -0.5
            value *= 2.0 if ".attn2.to_q" in name or ".attn2.to_k" in name else 1.0
        elif name.endswith("weight"):
            value = 1 + 0.02 * value
        else:
            value *= 0.02
        values.append(value)
    return values


@contextlib.contextmanager
def changed(settings: dict[str, object]) -> Iterator[None]:
    """While active, models are made with these in the place of those in `CONFIG`, as `SHALLOW` or `NARROW`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setitem(CONFIG, name, value)
        yield


def small_model(model_type=comfy.model_base.ModelType.EPS, seed=0, weight_dtype=torch.float32, compute_dtype=None):
    """A MODEL whose predictions change slowly with its input, so that rounding does not grow along a trajectory."""
    config = SmallSD({**CONFIG, "dtype": weight_dtype})
    config.manual_cast_dtype = compute_dtype
    model = comfy.model_base.BaseModel(config, model_type=model_type, device="cpu")
    parameters = dict(model.diffusion_model.named_parameters())
    values = _weights(seed, tuple((name, parameter.shape) for name, parameter in parameters.items()))
    for parameter, value in zip(parameters.values(), values):
        parameter.data = value.clone().to(weight_dtype)
    return comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def loaded_small_model(**options):
    """A loaded `small_model` whose weights are inference tensors, as in the executor."""
    with torch.inference_mode():
        model = small_model(**options)
        comfy.model_management.load_models_gpu([model])
        return model


def conditioning(rows=1, seed=0, tokens=TOKENS):
    """A CONDITIONING of random text embeddings."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(rows, tokens, CONTEXT_DIM, generator=generator), {}]]


def latent(batch=1, height=8, width=8, seed=0):
    """A LATENT of random values in the VAE's space."""
    generator = torch.Generator().manual_seed(seed)
    return {"samples": torch.randn(batch, 4, height, width, generator=generator) / 0.18215}
