"""An SDXL checkpoint that flows, as a user loads it: every node behind ModelSamplingSD3, and the model as it was after it."""

import comfy.sample
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from families import few_transformers, picture, small_family
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.methods.plug_and_play import with_source_features
from pix2pix_zero.host.methods.prompt_to_prompt import PromptEditSettings, edit_by_prompt
from pix2pix_zero.host.sampling.checks import SCHEDULERS
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.sampling.flow_edit import FlowEditing, flow_edit_latent
from pix2pix_zero.host.sampling.invert import ON_THE_GRID, InversionSettings, invert_latent
from pix2pix_zero.host.sampling.reference import ReferenceSettings, generate_reference
from pix2pix_zero.host.views.attention_heat import HeatmapSettings, attention_heatmaps
from pix2pix_zero.host.views.feature_pictures import feature_pictures
from plug_and_play_runs import sample
from tiny_clip import WIDTH_G, WIDTH_L, tiny_clip

from nodes import CLIPTextEncode

SOURCE, TARGET = "a cat on a sofa", "a dog on a sofa"


class Checkpoint:
    """MODEL, CLIP and the encoded texts of a small SDXL checkpoint that flows."""

    def __init__(self):
        self.plain = small_family("vega", WIDTH_L + WIDTH_G, WIDTH_G, **few_transformers("vega", 1))
        self.clip = tiny_clip("sdxl")
        self.model = ModelSamplingSD3().patch(self.plain, 3.0)[0]
        self.source, self.target = (CLIPTextEncode().encode(self.clip, text)[0] for text in (SOURCE, TARGET))
        self.picture = picture(self.model)
        self.before = self.state()
        self.inversion = self.inverted()

    def inverted(self, method="direct", scheduler="auto"):
        settings = InversionSettings(3, 0, NoiseRegularization(kl_weight=1.0, steps=1), method, 0, scheduler)
        return invert_latent(self.model, self.source, self.picture, settings)

    def state(self):
        """Weights, patches and options, and what a stock sampler draws with them."""
        noise = torch.randn(self.picture["samples"].shape, generator=torch.Generator().manual_seed(5))
        texts, empty = (self.target, self.source), torch.zeros_like(noise)
        drawn = [
            comfy.sample.sample(model, noise, 3, 2.0, "euler", "normal", *texts, empty, disable_pbar=True, seed=1)
            for model in (self.model, self.plain)
        ]
        weights = {name: weight.clone() for name, weight in self.model.model.state_dict().items()}
        kept = [repr((model.patches, model.object_patches, model.model_options)) for model in (self.model, self.plain)]
        return drawn, weights, kept


@pytest.fixture(scope="module")
@torch.inference_mode()
def checkpoint():
    return Checkpoint()


def inversions(checkpoint):
    for method in ON_THE_GRID:
        for scheduler in SCHEDULERS[1:]:
            yield checkpoint.inverted(method, scheduler).trajectory


def edits(checkpoint):
    for settings in (EditSettings(2.0, 1e-3, local_blend=0.2, feature_until=0.5), EditSettings(preset="fast")):
        yield sample_edit(checkpoint.model, checkpoint.inversion, checkpoint.target, checkpoint.source, settings)[0]


def reference(checkpoint):
    texts = checkpoint.target, checkpoint.source
    made = generate_reference(checkpoint.model, *texts, checkpoint.picture, ReferenceSettings(3))
    yield made[1]
    yield sample_edit(checkpoint.model, made[0], checkpoint.target, checkpoint.source, EditSettings(5.0, 0.0))[0]


def flow_edit(checkpoint):
    texts = checkpoint.source, checkpoint.target, None
    yield flow_edit_latent(checkpoint.model, *texts, checkpoint.picture, FlowEditing(steps=3))[0]


def prompt_to_prompt(checkpoint):
    settings, inversion = PromptEditSettings(0.5, 0.5, "dog: 2", 0.3), checkpoint.inversion
    model, positive = edit_by_prompt(checkpoint.model, inversion, checkpoint.clip, SOURCE, TARGET, settings)
    for sampler in ("euler", "dpmpp_2m", "euler_ancestral"):
        yield sample(model, inversion, positive, checkpoint.source, sampler=sampler)


def plug_and_play(checkpoint):
    inversion = checkpoint.inversion
    model = with_source_features(checkpoint.model, inversion, 0.8, 0.5, 0.5)
    for sampler in ("euler", "dpmpp_2m", "euler_ancestral"):
        yield sample(model, inversion, checkpoint.target, checkpoint.source, sampler=sampler)


def heatmap(checkpoint):
    yield attention_heatmaps(checkpoint.model, checkpoint.inversion, checkpoint.clip, SOURCE, HeatmapSettings("cat"))


def feature_pca(checkpoint):
    yield feature_pictures(checkpoint.model, checkpoint.inversion, "queries", 0.5)


NODES = {
    "Invert Picture": inversions,
    "Generate Reference": reference,
    "KSampler": edits,
    "FlowEdit": flow_edit,
    "Prompt-to-Prompt": prompt_to_prompt,
    "Plug-and-Play": plug_and_play,
    "Attention Heatmap": heatmap,
    "Feature PCA": feature_pca,
}


@pytest.mark.works(family="flow")
@pytest.mark.parametrize("node", NODES)
@torch.inference_mode()
def test_every_node_draws_and_leaves_the_model_bit_for_bit_as_it_was(checkpoint, node):
    drawn, weights, kept = checkpoint.before
    results = list(NODES[node](checkpoint))
    assert all(result.isfinite().all() for result in results)
    assert all(result.shape[1:] != checkpoint.picture["samples"].shape[1:] or result.std() > 0 for result in results)
    drawn_after, weights_after, kept_after = checkpoint.state()
    assert kept_after == kept
    assert all(map(torch.equal, drawn_after, drawn))
    assert all(torch.equal(weights_after[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("method", ["direct", "fixed-point"])
@pytest.mark.parametrize("scheduler", SCHEDULERS[1:])
@torch.inference_mode()
def test_the_unedited_picture_comes_back(checkpoint, method, scheduler):
    inversion = checkpoint.inverted(method, scheduler)
    settings = EditSettings(1.5, 1e-3, feature_until=0.5)
    again = sample_edit(checkpoint.model, inversion, checkpoint.source, checkpoint.source, settings)[0]
    source = checkpoint.picture["samples"]
    assert (again - source).abs().max() <= 1e-4 * source.abs().max()
