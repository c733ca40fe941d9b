"""The whole method on the shipped demo model, scored against the scenes' ground truth."""

import pytest
import torch
from pix2pix_zero.benchmarks.demo import EDITS, Bench, draw_scenes, node_default, score
from pix2pix_zero.benchmarks.judge import load_judge
from pix2pix_zero.demo_model.loader import WEIGHTS
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.sampling import invert_latent, sample_edit
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler

FIRST_SEED = 200_000  # the benchmark's scenes start at 100 000
SCENES = 6
STEPS = 20
CFG = node_default(Pix2PixZeroKSampler, "cfg")
STRENGTH = node_default(Pix2PixZeroKSampler, "guidance_strength")


@pytest.fixture(scope="module")
def bench():
    with torch.inference_mode():
        return Bench(EDITS["cat2dog"], draw_scenes(EDITS["cat2dog"], SCENES, FIRST_SEED), STEPS, WEIGHTS)


def test_the_captioner_sees_a_cat_in_every_scene(bench):
    assert all(" cat" in caption for caption in bench.captions)


@torch.inference_mode()
def test_the_cat_becomes_a_dog_in_its_place(bench):
    source, plain, free, guided = (
        score(bench, load_judge(), pictures)
        for pictures in (
            bench.reconstructed_source,
            bench.reconstruct(),
            bench.redraw(bench.moved(), CFG, 0.0),
            bench.redraw(bench.moved(), CFG, STRENGTH),
        )
    )
    assert source["edited"] == 0
    assert guided["edited"] >= 1 - 1 / SCENES
    assert guided["background"] <= 2 * plain["background"]
    assert guided["background"] < free["background"]
    assert guided["whole"] < min(source["whole"], free["whole"])


@torch.inference_mode()
def test_a_batch_equals_single_runs(bench):
    """Three steps on trained weights: a batch is the same pictures, not just similar ones."""
    regularization = NoiseRegularization()
    pictures = bench.vae.encode(bench.scenes.sources[:2])
    together = edit_latents(bench, pictures, slice(0, 2), regularization)
    for i in range(2):
        alone = edit_latents(bench, pictures[i : i + 1], slice(i, i + 1), regularization)
        difference = bench.model.model.process_latent_in(together[i : i + 1] - alone)
        assert difference.abs().max() <= 1e-4


def edit_latents(bench, pictures, rows, regularization):
    source, edited = ([[text[rows], extras] for text, extras in texts] for texts in (bench.described, bench.moved()))
    inversion = invert_latent(bench.model, source, {"samples": pictures}, 3, 0, regularization)
    return sample_edit(bench.model, inversion, edited, source, CFG, STRENGTH)
