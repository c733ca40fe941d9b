"""The teacher's networks as features: what their maps are, and that gradients go through them to the picture."""

from __future__ import annotations

import pytest
import torch
from pix2pix_zero.demo_model.loader import load_demo_model
from pix2pix_zero.distillation.losses import feature_loss
from pix2pix_zero.host.networks.teacher_features import EncoderFeatures, TeacherFeatures


@pytest.fixture(scope="module")
def teacher():
    model, _, vae = load_demo_model()
    with torch.inference_mode(False):
        return model, TeacherFeatures(model, EncoderFeatures(vae, model.load_device)), vae


def pictures(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_the_maps_are_those_of_the_unet_at_a_low_noise_level(teacher):
    model, features, vae = teacher
    with torch.no_grad():
        maps = features(pictures())
        shallow = features.encoder(pictures())
        latents = model.model.process_latent_in(vae.encode(pictures().movedim(1, -1)))
    for found, expected in zip(maps, shallow):
        assert torch.equal(found, expected)
    own = maps[len(shallow) :]
    base, seen = model.model, []

    def look(h, options):
        seen.append(h.clone())
        return h

    sigma = base.model_sampling.percent_to_sigma(0.95)
    assert 0 < sigma < 0.05 * base.model_sampling.percent_to_sigma(0)
    with torch.no_grad():
        base.apply_model(
            latents,
            torch.full((2,), sigma),
            c_crossattn=torch.zeros(2, 77, 64),
            transformer_options={"patches": {"input_block_patch": [look]}},
        )
    assert len(own) == len(seen) == 4
    for found, expected in zip(own, seen):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_its_gradient_in_the_picture_is_that_of_a_difference(teacher):
    _, features, _ = teacher
    target, output = pictures(1), pictures(2)
    with torch.inference_mode(False), torch.enable_grad():
        asked = output.clone().requires_grad_(True)
        feature_loss(features, asked, target).backward()
    direction = asked.grad / asked.grad.norm()
    step = 0.02
    with torch.no_grad():
        up, down = (float(feature_loss(features, output + sign * step * direction, target)) for sign in (1, -1))
    assert (up - down) / (2 * step) == pytest.approx(float(asked.grad.norm()), rel=0.05)


def test_a_model_that_is_no_unet_is_refused(teacher, monkeypatch):
    model, features, _ = teacher
    blocks = model.model.diffusion_model.input_blocks
    del model.model.diffusion_model.input_blocks
    try:
        with pytest.raises(ValueError, match="^model: its features cannot be used"):
            TeacherFeatures(model, features.encoder)
    finally:
        model.model.diffusion_model.input_blocks = blocks
