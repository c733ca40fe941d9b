"""The same weights, latents and texts through diffusers' pix2pix-zero pipeline, the authors' formulas and this pack."""

import functools
from dataclasses import replace
from unittest.mock import patch

import peer
import pytest
import torch
import torch.nn.functional as F
from comfy.model_base import ModelType, model_sampling
from diffusers import DDIMInverseScheduler, DDIMScheduler
from pix2pix_zero.benchmarks.peer_pipeline import SCHEDULE
from pix2pix_zero.editing.directions import apply_direction, edit_direction
from pix2pix_zero.editing.regularization import NoiseRegularization, draw_shifts
from pix2pix_zero.editing.trajectory import DIFFUSION, Inversion, ddim_step, predicted_eps
from pix2pix_zero.host.sampling.checks import ddim_grid
from pix2pix_zero.host.sampling.edit import PRESETS, EditSettings, sample_edit
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from small_unet import CONFIG, CONTEXT_DIM, TOKENS, SmallSD, conditioning, latent

LATENT_SCALE = 0.18215
SIZE = dict(height=16, width=24)
SEED = 3
STEPS = 4
UNREGULARIZED = NoiseRegularization(steps=0)


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def variance_preserving(inversion: Inversion) -> torch.Tensor:
    return inversion.trajectory[-1] / (1 + inversion.sigmas[-1] ** 2) ** 0.5


def invert(model, text, picture, regularization=UNREGULARIZED, method="diffusers", steps=STEPS) -> Inversion:
    with torch.inference_mode():
        return invert_latent(model, text, picture, InversionSettings(steps, SEED, regularization, method))


def edit(model, inversion, positive, negative, cfg=7.5, strength=0.1) -> torch.Tensor:
    """In the UNet's space, as the pipeline returns it."""
    settings, official = EditSettings(cfg, preset="official"), replace(PRESETS["official"], paper_step=strength)
    with torch.inference_mode(), patch.dict(PRESETS, {"official": official}):
        return sample_edit(model, inversion, positive, negative, settings)[0] * LATENT_SCALE


def their_edit(pipe, noise, source, negative, sentences, steps, cfg=7.5, strength=0.1) -> torch.Tensor:
    source_embeds, target_embeds = sentences
    return pipe(
        prompt_embeds=source,
        negative_prompt_embeds=negative,
        source_embeds=source_embeds,
        target_embeds=target_embeds,
        latents=noise.clone(),
        num_inference_steps=steps,
        height=noise.shape[-2] * pipe.vae_scale_factor,
        width=noise.shape[-1] * pipe.vae_scale_factor,
        guidance_scale=cfg,
        cross_attention_guidance_amount=strength,
        output_type="latent",
    ).images


twins = functools.cache(peer.twins)


@pytest.fixture(scope="module")
def eps_twins():
    return twins("epsilon")


@pytest.fixture
def sentences():
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(3, TOKENS, CONTEXT_DIM, generator=generator) for _ in ("source", "target")]


def moved(text: torch.Tensor, sentences) -> list:
    source, target = sentences
    direction = edit_direction([{"cond": source}], [{"cond": target}]).tensors["cond"]
    return [[apply_direction(text, direction, 1.0), {}]]


def test_one_unet_evaluation_is_the_same_function(eps_twins):
    pipe, model = eps_twins
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, *SIZE.values(), generator=generator)
    text = torch.randn(2, TOKENS, CONTEXT_DIM, generator=generator)
    timesteps = torch.tensor([481, 21])
    with torch.inference_mode():
        theirs = pipe.unet(x, timesteps, encoder_hidden_states=text).sample
        ours = model.model.diffusion_model(x, timesteps.float(), context=text, transformer_options={})
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("t", "t_next"), [(981, 961), (21, 1), (1, 21), (961, 981)])
def test_a_step_through_comfyui_model_sampling_is_the_schedulers(prediction_type, t, t_next):
    """ComfyUI turns the UNet's output into an estimate, this pack steps along it, up or down."""
    kind = {"epsilon": ModelType.EPS, "v_prediction": ModelType.V_PREDICTION}[prediction_type]
    sampling = model_sampling(SmallSD(CONFIG), kind)
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 1, 4, 5, 6, generator=generator)

    settings = dict(**SCHEDULE, prediction_type=prediction_type)
    if t_next < t:
        scheduler, label = DDIMScheduler(**settings), t
    else:
        scheduler, label = DDIMInverseScheduler(**settings), t_next
    scheduler.set_timesteps(50)
    theirs = scheduler.step(output, label, x).prev_sample

    sigma, sigma_next = (float(sampling.sigmas[level]) for level in (t, t_next))
    scaled = DIFFUSION.rescale(x, 0.0, sigma)
    denoised = sampling.calculate_denoised(torch.tensor([sigma]), output, scaled)
    ours = ddim_step(scaled, predicted_eps(scaled, denoised, sigma), sigma, sigma_next)

    assert relative_difference(DIFFUSION.rescale(ours, sigma_next, 0.0), theirs) <= 1e-5


@pytest.mark.parametrize("regularization", [UNREGULARIZED, NoiseRegularization()], ids=["plain", "regularized"])
def test_inversion_matches_diffusers_with_the_same_shifts(eps_twins, monkeypatch, regularization):
    pipe, model = eps_twins
    picture, text = latent(**SIZE, seed=1), conditioning(seed=2)
    generator = torch.Generator().manual_seed(SEED)
    rolls = STEPS * regularization.steps * regularization.rolls
    peer.share_shifts(monkeypatch, list(draw_shifts(rolls, 4, tuple(SIZE.values()), generator)))

    theirs = pipe.invert(
        image=picture["samples"] * LATENT_SCALE,
        prompt_embeds=text[0][0],
        num_inference_steps=STEPS,
        num_reg_steps=regularization.steps,
        output_type="np",
    ).latents
    ours = variance_preserving(invert(model, text, picture, regularization))

    assert relative_difference(ours, theirs) <= 1e-4


@pytest.mark.parametrize(("prediction_type", "steps"), [("epsilon", STEPS), ("v_prediction", 2)])
def test_official_edit_matches_diffusers(sentences, prediction_type, steps):
    pipe, model = twins(prediction_type)
    text, negative = conditioning(seed=2), conditioning(seed=3)
    inversion = invert(model, text, latent(**SIZE, seed=1), steps=steps)
    positive = moved(text[0][0], sentences)

    theirs = their_edit(pipe, variance_preserving(inversion), text[0][0], negative[0][0], sentences, steps)
    ours = edit(model, inversion, positive, negative)

    assert relative_difference(ours, theirs) <= 1e-4
    unguided = edit(model, inversion, positive, negative, strength=0.0)
    assert relative_difference(unguided, theirs) >= 0.02, "guidance must matter for the comparison to mean anything"


def test_each_picture_of_a_batch_is_edited_as_diffusers_edits_it_alone(eps_twins, sentences):
    pipe, model = eps_twins
    steps = 2
    text, negative = conditioning(rows=2, seed=4), conditioning(seed=3)
    inversion = invert(model, text, latent(batch=2, **SIZE, seed=1), steps=steps)
    noise = variance_preserving(inversion)

    ours = edit(model, inversion, moved(text[0][0], sentences), negative)
    theirs = [
        their_edit(pipe, noise[i : i + 1], text[0][0][i : i + 1], negative[0][0], sentences, steps) for i in range(2)
    ]

    for row, alone in zip(ours.split(1), theirs):
        assert relative_difference(row, alone) <= 1e-4


def test_official_inversion_follows_the_authors_scheduler(eps_twins):
    """ddim_inv.py and scheduler.py of pix2pixzero: 48 steps of 50, levels read one timestep early, here 8 of 10."""
    pipe, model = eps_twins
    steps, stride = 10, 100
    picture, text = latent(**SIZE, seed=1), conditioning(seed=2)
    regularization = NoiseRegularization(steps=2, rolls=3)
    generator = torch.Generator().manual_seed(SEED)
    alpha_bar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)

    x = picture["samples"].double() * LATENT_SCALE
    visited = []
    for t in list(range(1, 1000, stride))[1:-1]:
        with torch.no_grad():
            eps = pipe.unet(x.float(), t, encoder_hidden_states=text[0][0]).sample.double()
        eps = authors_regularization(eps, regularization, generator)
        here, there = alpha_bar[t - 1], alpha_bar[t - 1 + stride]
        clean = (x - (1 - here).sqrt() * eps) / here.sqrt()
        x = there.sqrt() * clean + (1 - there).sqrt() * eps
        visited.append(x)
    inversion = invert(model, text, picture, regularization, method="official", steps=steps)

    assert len(visited) == steps - 2
    levels = (1 + inversion.sigmas**2).sqrt()
    for level, theirs in zip(range(3, steps + 1), visited):
        ours = inversion.trajectory[level] / levels[level]
        assert relative_difference(ours, theirs) <= 1e-4
    for level in range(3):
        clean = inversion.trajectory[level] / levels[level]
        assert relative_difference(clean, picture["samples"] * LATENT_SCALE) <= 1e-6


def authors_regularization(eps, settings: NoiseRegularization, generator) -> torch.Tensor:
    """ddim_inv.py: the loops and losses as they stand there, in float64 and with this pack's draws."""
    for _ in range(settings.steps):
        for _ in range(settings.rolls):
            eps = eps.detach().requires_grad_(True)
            (shifts,) = draw_shifts(1, eps.shape[1], tuple(eps.shape[2:]), generator)
            loss = 0.0
            for channel in range(eps.shape[1]):
                noise = eps[:, channel : channel + 1]
                for shift in shifts[channel].tolist():
                    for axis in (2, 3):
                        loss = loss + (noise * torch.roll(noise, shift, axis)).mean() ** 2
                    noise = F.avg_pool2d(noise, 2)
            (gradient,) = torch.autograd.grad(loss, eps)
            eps = eps.detach() - settings.autocorrelation_weight * gradient / settings.rolls
        eps = eps.detach().requires_grad_(True)
        mean, variance = eps.mean(), eps.var()
        (gradient,) = torch.autograd.grad(variance + mean**2 - 1 - torch.log(variance + 1e-7), eps)
        eps = eps.detach() - settings.kl_weight * gradient
    return eps


@pytest.mark.parametrize("steps", [2, 5, 50, 100])
def test_noise_levels_are_those_of_diffusers_where_the_steps_divide_the_timesteps(eps_twins, steps):
    pipe, model = eps_twins
    pipe.scheduler.set_timesteps(steps)
    alpha_bar = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double()
    theirs = [*((1 - alpha_bar) / alpha_bar).sqrt().tolist(), 0.0]
    assert ddim_grid(model, steps).tolist() == pytest.approx(theirs, rel=1e-5)
