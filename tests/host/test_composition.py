"""Guided edits beside what other nodes and packs do to a model or a text: each keeps its full effect."""

import pytest
import torch
from composed_run import directional_derivative, edit, guided_step, invert, soft_model, stock_edit
from guided_pass import latents
from patch_catalogue import CATALOGUE, random, texts_of

UNEVEN = {"area", "masks", "mask bounds"}  # where each text counts by its share at a place


@pytest.fixture(scope="module")
def model():
    return soft_model()


@pytest.fixture(scope="module")
def double():
    return soft_model(torch.float64)


@pytest.fixture(scope="module")
def unpatched(model):
    return edit(model, invert(model), strength=0.0)


@pytest.mark.parametrize("name", CATALOGUE)
def test_without_guidance_a_patch_does_what_it_does_in_the_stock_sampler(model, unpatched, name):
    source, positive, negative = texts_of(CATALOGUE[name])
    with torch.inference_mode():
        patched = CATALOGUE[name].model(model)
    inversion = invert(patched, source)
    ours, stock = (run(patched, inversion, positive, negative) for run in (edit, stock_edit))
    assert torch.equal(ours, stock)
    assert (ours - unpatched).abs().max() > 1e-3 * ours.std(), "the patch must matter"


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_guided_step_has_the_patch_in_its_estimate_and_its_gradient(model, double, name):
    """The estimate is the stock guider's; the gradient has the slope of the distance in float64."""
    patch = CATALOGUE[name]
    texts = texts_of(patch)
    with torch.inference_mode():
        patched, reference = patch.model(model), patch.model(double)
        x_source, x = latents(model)
    stock, estimate, gradient, distance = guided_step(patched, texts, x_source, x)
    assert (estimate - stock).norm() <= 1e-4 * stock.norm()
    assert gradient.abs().max() > 0
    if name in UNEVEN:
        return
    direction = random(*x.shape, seed=3).double()
    size = 1e-2 if patch.rough else 1e-4
    texts = texts_of(patch)  # schedules start anew
    slope, expected = directional_derivative(reference, texts[:2], x_source.double(), x.double(), direction, size)
    assert float(distance) == pytest.approx(float(expected), rel=1e-4)
    along = float((gradient.double() * direction).sum())
    assert along == pytest.approx(float(slope), abs=1e-4 * float(gradient.norm() * direction.norm()))
