"""Guided edits beside what other nodes and packs do to a model or a text: each keeps its full effect."""

import functools

import pytest
import torch
from composed_run import directional_derivative, edit, guided_step, invert, soft_model, stock_edit
from guided_pass import latents
from patch_catalogue import CATALOGUE, random, texts_of
from small_unet import SHALLOW, changed

pytestmark = pytest.mark.usefixtures("narrow_unet")

UNEVEN = {"area", "masks", "mask bounds"}  # where each text counts by its share at a place


@pytest.fixture(scope="module")
def made():
    """`made(deep)`: a MODEL, the same in float64, and an edit without a patch, each made once."""

    @functools.cache
    def make(deep):
        model = soft_model()
        return model, soft_model(torch.float64), edit(model, invert(model), strength=0.0)

    return make


@pytest.fixture
def models(made, name):
    """Few transformers, but for a patch that acts on those of the outer level."""
    deep = name == "HyperTile"
    with changed({} if deep else SHALLOW):
        yield made(deep)


@pytest.mark.parametrize("name", CATALOGUE)
def test_without_guidance_a_patch_does_what_it_does_in_the_stock_sampler(models, name):
    model, _, unpatched = models
    source, positive, negative = texts_of(CATALOGUE[name])
    with torch.inference_mode():
        patched = CATALOGUE[name].model(model)
    inversion = invert(patched, source)
    ours, stock = (run(patched, inversion, positive, negative) for run in (edit, stock_edit))
    assert torch.equal(ours, stock)
    assert (ours - unpatched).abs().max() > 1e-3 * ours.std(), "the patch must matter"


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_guided_step_has_the_patch_in_its_estimate_and_its_gradient(models, name):
    """The estimate is the stock guider's; the gradient has the slope of the distance in float64."""
    model, double, _ = models
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
