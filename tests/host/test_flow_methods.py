"""The sister methods on UNets with a flow objective: as a flow, the demo model draws what it draws where it diffuses."""

from dataclasses import replace

import pytest
import torch
from comfy_extras import nodes_custom_sampler as stock
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from pix2pix_zero.benchmarks.quality_parts.scenes import EDITS, draw_scenes
from pix2pix_zero.benchmarks.quality_parts.workbench import DemoModels, Workbench, one_of, row_of
from pix2pix_zero.demo_model.flow_view import as_flow
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.sampling.flow_edit import FlowEditing, flow_edit_latent
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent, inverted_noise
from pix2pix_zero.host.views.attention_heat import mean_attention
from pix2pix_zero.host.views.feature_pictures import KINDS, feature_pictures
from pix2pix_zero.nodes.prompt_to_prompt import Pix2PixZeroPromptToPrompt
from pix2pix_zero.pictures.noise_report import report_noise
from plug_and_play_runs import patch, sample
from small_unet import conditioning, latent, loaded_small_model

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")

STEPS = 4
SMALL = InversionSettings(4, method="direct", scheduler="normal", map_memory=0)


class Pair:
    """The demo model, itself as a flow, and a scene with both its inversions."""

    def __init__(self):
        models = DemoModels.load()
        self.bench = Workbench(models, EDITS["cat2dog"], draw_scenes(EDITS["cat2dog"], 2, 400_000), STEPS)
        self.models = models.model, as_flow(models.model)
        picture = {"samples": self.bench.latent, "noise_mask": None}
        settings = InversionSettings(STEPS, scheduler="simple", map_memory=0)
        self.inversions = [invert_latent(kind, self.bench.described, picture, settings) for kind in self.models]

    def both(self, draw, limited=False):
        """(what `draw(model, inversion)` gives for the flow, the same for the model that diffuses)."""
        mask = torch.zeros(1, 1, *self.bench.latent.shape[-2:])
        mask[..., :8] = 1.0
        inversions = [replace(each, noise_mask=mask) if limited else each for each in self.inversions]
        drawn = [draw(*pair) for pair in zip(self.models, inversions)]
        return drawn[1], drawn[0]


@pytest.fixture(scope="module")
@torch.inference_mode()
def pair():
    return Pair()


def difference(one, other):
    return (one - other).abs().max()


@pytest.mark.works("Plug-and-Play", family=("sd15", "flow"))
@pytest.mark.parametrize("limited", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_plug_and_play_draws_the_same(pair, sampler, limited):
    bench = pair.bench

    def draw(model, inversion):
        patched = patch(model, inversion, 0.5, 0.7, negative_alpha=0.6)
        return sample(patched, inversion, bench.wanted, bench.described, 3.0, sampler)

    flowing, diffusing = pair.both(draw, limited)
    assert difference(flowing, diffusing) <= 1e-4
    assert difference(diffusing, bench.latent) > 1


@pytest.mark.works("Prompt-to-Prompt", family=("sd15", "flow"))
@pytest.mark.parametrize("limited", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("options", [{}, {"local_blend": 0.3, "reweight": "dog: 1.5"}], ids=["plain", "blended"])
def test_prompt_to_prompt_draws_the_same(pair, options, limited):
    bench = pair.bench

    @torch.inference_mode()
    def draw(model, inversion):
        source = one_of(inversion, 0)
        texts = bench.captions[0], bench.wanted_captions[0]
        patched, positive = Pix2PixZeroPromptToPrompt.execute(
            model, source, bench.clip, *texts, 0.4, 0.6, **options
        ).result
        return sample(patched, source, positive, row_of(bench.described, 0), 3.0)

    flowing, diffusing = pair.both(draw, limited)
    assert difference(flowing, diffusing) <= 1e-4
    assert difference(diffusing, bench.latent[:1]) > 1


@pytest.mark.parametrize("preset", ["fast", "low memory", "paper"])
@torch.inference_mode()
def test_every_preset_of_the_guided_sampler_draws_the_same(pair, preset):
    settings = EditSettings(1.5, 0.1, (0.0, 0.7), preset, local_blend=0.2, feature_until=0.3)

    def draw(model, inversion):
        return sample_edit(model, inversion, pair.bench.moved, pair.bench.described, settings)[0]

    flowing, diffusing = pair.both(draw)
    assert difference(flowing, diffusing) <= 1e-4
    assert difference(diffusing, pair.bench.latent) > 1


@pytest.mark.works("FlowEdit", family=("sd15", "flow"))
@pytest.mark.parametrize("preset", ["default", "whole picture"])
@torch.inference_mode()
def test_flow_edit_draws_the_same(pair, preset):
    texts, picture = (pair.bench.described, pair.bench.moved, None), {"samples": pair.bench.latent}
    settings = FlowEditing(STEPS, cfg=1.5, preset=preset)
    flowing, diffusing = pair.both(lambda model, _: flow_edit_latent(model, *texts, picture, settings)[0])
    assert difference(flowing, diffusing) <= 1e-4
    assert difference(diffusing, pair.bench.latent) > 1


@pytest.mark.works("Feature PCA", family=("sd15", "flow"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percent", [0.0, 0.55, 1.0])
def test_feature_pca_shows_the_same(pair, kind, percent):
    flowing, diffusing = pair.both(lambda model, inversion: feature_pictures(model, inversion, kind, percent))
    assert difference(flowing, diffusing) <= 1e-3


@pytest.mark.works("Attention Heatmap", family=("sd15", "flow"))
@torch.inference_mode()
def test_attention_to_the_words_is_the_same(pair):
    flowing, diffusing = pair.both(lambda model, inversion: mean_attention(model, inversion, 77, (0.1, 0.8), "all"))
    assert difference(flowing, diffusing) <= 1e-4 * diffusing.max()


@torch.inference_mode()
def test_the_noise_report_says_the_same(pair):
    flowing, diffusing = pair.both(
        lambda model, inversion: report_noise({"samples": inverted_noise(inversion, model)}, inversion, None)[1]
    )
    assert flowing == diffusing


@pytest.fixture(scope="module", params=[1.0, 3.0], ids=["shift 1", "shift 3"])
@torch.inference_mode()
def flowing(request):
    """A UNet behind ModelSamplingSD3, whose noisiest latents hold nothing of the picture."""
    return ModelSamplingSD3().patch(loaded_small_model(), request.param)[0]


@torch.inference_mode()
def small_inversion(model):
    inversion = invert_latent(model, conditioning(), latent(), SMALL)
    assert inversion.sigmas[-1] == 1
    return inversion


def test_stock_samplers_begin_at_the_inverted_noise(flowing):
    """Without features, a stock sampler behind Plug-and-Play redraws the picture as plain Euler does."""
    inversion = small_inversion(flowing)
    drawn = sample(patch(flowing, inversion, 0.0, 0.0), inversion, conditioning(), conditioning(), cfg=1.0)
    x, levels = inversion.trajectory[-1], inversion.sigmas.flip(0)
    with torch.inference_mode():
        for sigma, lower in zip(levels, levels[1:]):
            velocity = flowing.model.diffusion_model(x, 1000 * sigma[None], context=conditioning()[0][0])
            x = x + (lower - sigma) * velocity
    assert difference(drawn, flowing.model.process_latent_out(x)) <= 1e-4 * x.abs().max()


def test_two_stages_draw_what_one_does(flowing):
    inversion = small_inversion(flowing)
    patched = patch(flowing, inversion)
    whole = sample(patched, inversion)
    high, low = stock.SplitSigmas.execute(inversion.sigmas.flip(0), 2).result
    half = sample(patched, inversion, sigmas=high)
    assert difference(sample(patched, inversion, noise=half, sigmas=low), whole) <= 1e-4 * whole.abs().max()
