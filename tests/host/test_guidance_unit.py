"""`guidance_strength` means the same on every family of UNets, at every size: the part of the distance that a step closes."""

import functools

import comfy.samplers
import pytest
import torch
from families import FAMILIES, Float64UNet, small_family, texts
from pix2pix_zero.attention_patches.attention import cross_attention_sites
from pix2pix_zero.editing.guidance import distance_step, plain_step
from pix2pix_zero.host.sampling.passes import UNetPasses
from pix2pix_zero.host.unet.jobs import for_own_sampler

TIMESTEP = 500
PART = 0.002  # small enough for the distance to be nearly linear on the way
FAMILY_NAMES = ["sd15", "sd21-v", "sdxl"]
SIZES = [(8, 8), (8, 12), (16, 16)]
UNBOUNDED = 1e9


class Place:
    """A latent beside the source's, on a family of random weights.

    `here`: (gradient, distance) at it. `ours`: the same of this pack's passes.
    """

    def __init__(self, family: str, size: tuple[int, int], model, exact: Float64UNet):
        self.model, self.exact = model, exact
        self.source, self.positive = texts(family), texts(family, seed=1)
        self.sigma = float(self.model.model.model_sampling.sigmas[TIMESTEP])
        scale = (1 + self.sigma**2) ** 0.5
        generator = torch.Generator().manual_seed(1)
        self.x = scale * torch.randn(1, 4, *size, generator=generator)
        self.x_source = self.x + 0.3 * scale * torch.randn(self.x.shape, generator=generator)

    @functools.cached_property
    def here(self) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x.double().requires_grad_(True)
        distance = self.exact.distance(TIMESTEP, self.reference, x, self.positive)
        return torch.autograd.grad(distance.sum(), x)[0], distance.detach()

    @functools.cached_property
    def reference(self) -> list[torch.Tensor]:
        return self.exact.reference(TIMESTEP, self.x_source, self.source)

    @torch.no_grad()
    def distance_after(self, step: torch.Tensor) -> torch.Tensor:
        return self.exact.distance(TIMESTEP, self.reference, (self.x + step).double(), self.positive)

    def ours(self) -> tuple[torch.Tensor, torch.Tensor]:
        found = []

        def walk(model_k, noise, sigmas, extra_args, callback, disable):
            passes = UNetPasses(model_k, extra_args, self.sites())
            reference = passes.record_maps("source", self.x_source.clone(), self.sigma)
            found.extend(passes.map_gradient("positive", self.x.clone(), self.sigma, reference))
            return noise

        with torch.inference_mode():
            guider = comfy.samplers.CFGGuider(for_own_sampler(self.model))
            guider.inner_set_conds({"positive": self.positive, "negative": self.source, "source": self.source})
            empty = torch.zeros_like(self.x)
            guider.sample(empty, empty, comfy.samplers.KSAMPLER(walk), torch.tensor([self.sigma, 0.0]), seed=0)
        return found[0], found[1]

    def sites(self) -> list:
        return cross_attention_sites(self.model.model.diffusion_model)


@pytest.fixture(scope="module")
def place_of():
    """`place_of(family, size)`: a `Place`. Those of one family share their model."""

    @functools.cache
    def models(family):
        with torch.inference_mode():
            model = small_family(family)
        return model, Float64UNet(family, model)

    return functools.cache(lambda family, size: Place(family, size, *models(family)))


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_a_step_closes_the_part_of_the_distance_that_it_says(place_of, family, size):
    place = place_of(family, size)
    gradient, distance = place.here
    after = place.distance_after(distance_step(gradient, distance, PART, UNBOUNDED))
    closed = float((distance - after) / distance)
    assert closed == pytest.approx(PART, rel=0.15)


def test_the_papers_step_closes_another_part_on_every_family(place_of):
    """So one strength could not be right for all of them."""
    parts = []
    for family in FAMILY_NAMES:
        place = place_of(family, SIZES[1])
        gradient, distance = place.here
        after = place.distance_after(plain_step(gradient, place.sigma, 1e-4))
        parts.append(float((distance - after) / distance))
    assert max(parts) > 2 * min(parts)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_step_of_the_models_own_passes_is_that_of_float64(place_of, family):
    place = place_of(family, SIZES[1])
    expected = distance_step(*place.here, PART, UNBOUNDED)
    ours = distance_step(*place.ours(), PART, UNBOUNDED)
    assert float((ours - expected).norm() / expected.norm()) <= 2e-4
    assert len(place.sites()) == FAMILIES[family].sites
