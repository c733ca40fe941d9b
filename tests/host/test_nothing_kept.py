"""A guided step leaves no tensor behind once its gradient is taken."""

import gc
import weakref

import pytest
import torch
from guided_pass import latents, loaded_model
from pix2pix_zero.attention_patches import attention
from pix2pix_zero.attention_patches.attention import cross_attention_sites
from pix2pix_zero.host.sampling.source import EditGuider
from pix2pix_zero.host.unet.map_jobs import Checkpointing
from pix2pix_zero.host.unet.memory import MODES
from plain_unet import PlainUNet, guider_gradient
from small_unet import conditioning

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")


def live_tensors() -> int:
    gc.collect()
    return sum(type(thing) is torch.Tensor for thing in gc.get_objects())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_guided_steps_keep_nothing(mode, dtype):
    """PyTorch does not free a checkpointed graph that a backward pass was told to retain: 0.3 GB a step at 512x512."""
    model = loaded_model(weight_dtype=dtype, compute_dtype=dtype)
    text, (x_source, x) = conditioning(seed=1), latents(model)
    counts = []
    for _ in range(3):
        guider_gradient(model, text, x_source, x, checkpointing=Checkpointing(mode, 1))
        counts.append(live_tensors())
    assert counts[-1] == counts[1]


def test_a_gradient_that_overflows_is_taken_again_at_a_smaller_scale(monkeypatch):
    model = loaded_model(weight_dtype=torch.float16, compute_dtype=torch.float16)
    text, (x_source, x) = conditioning(seed=1), latents(model)
    scales = []
    settle = attention.GradientScale.settle

    def too_large(scale):
        settle(scale)
        scale.value *= 2.0**14
        scales.append(scale.value)

    monkeypatch.setattr(attention.GradientScale, "settle", too_large)
    gradient, _ = guider_gradient(model, text, x_source, x, sites=cross_attention_sites(model.model.diffusion_model))
    expected, _ = PlainUNet(model).gradient(text[0][0], x_source, x)
    assert len(scales) >= 2 and scales[1] == scales[0] / 64
    assert float((gradient - expected).norm() / expected.norm()) <= 0.01


def test_the_model_of_an_edit_goes_with_its_guider():
    """The host counts models without a ModelPatcher, so none may wait for the garbage collector."""
    guider = EditGuider(loaded_model())
    patcher = weakref.ref(guider.model_patcher)
    gc.disable()
    try:
        del guider
        assert patcher() is None
    finally:
        gc.enable()
