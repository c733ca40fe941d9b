"""The whole method on the shipped demo model, scored against the scenes' ground truth."""

import functools

import pytest
import torch
from pix2pix_zero.benchmarks.judge import load_judge
from pix2pix_zero.benchmarks.quality_parts.figures import measure
from pix2pix_zero.benchmarks.quality_parts.methods import reconstruction, this_pack
from pix2pix_zero.benchmarks.quality_parts.scenes import EDITS, draw_scenes
from pix2pix_zero.benchmarks.quality_parts.workbench import DemoModels, Workbench, node_default
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host import running
from pix2pix_zero.host.messages import NOT_GUIDED
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler

FIRST_SEED = 400_002  # none of the benchmark's
SCENES = 4
STEPS = 8
CFG = 1.5  # of the demo's examples
STRENGTH = 0.1


@pytest.fixture(scope="module")
def open_bench():
    """`open_bench(edit)`: the scenes of one of `EDITS`, opened once for all tests."""
    with torch.inference_mode():
        models = DemoModels.load()

    @functools.cache
    @torch.inference_mode()
    def of(edit):
        return Workbench(models, EDITS[edit], draw_scenes(EDITS[edit], SCENES, FIRST_SEED), STEPS)

    return of


@pytest.fixture(scope="module")
def bench(open_bench):
    return open_bench("cat2dog")


def test_the_captioner_sees_a_cat_in_every_scene(bench):
    assert all(" cat" in caption for caption in bench.captions)


@torch.inference_mode()
def test_the_cat_becomes_a_dog_in_its_place(bench):
    """Beside what is there without each of the sampler's means to keep the picture."""
    judge = load_judge()

    def figures(latents):
        found = measure(bench, judge, bench.vae.decode(latents))
        return {name: values.mean().item() for name, values in found.items()}

    plain = figures(reconstruction(bench))
    loose = figures(this_pack(bench, CFG, guidance_strength=0.0, local_blend=0.0, feature_until=0.0))
    guided = figures(this_pack(bench, CFG, preset="paper"))
    ours = figures(this_pack(bench, CFG))
    unchanged = measure(bench, judge, bench.source)

    assert unchanged["hit"].sum() == 0
    assert ours["hit"] >= 1 - 1 / SCENES
    assert ours["background"] < 0.5 * guided["background"]
    assert ours["background"] < plain["background"]
    assert ours["whole"] < guided["whole"] < loose["whole"]
    assert ours["whole"] < 0.75 * unchanged["whole"].mean()
    assert ours["structure"] < 0.75 * loose["structure"]


@torch.inference_mode()
def test_guidance_leaves_edits_of_the_whole_light_alone_and_says_so(open_bench, monkeypatch):
    bench, judge, shown = open_bench("day2night"), load_judge(), []
    monkeypatch.setattr(running, "show", shown.append)

    def drawn(blend):
        shown.clear()
        samples = this_pack(bench, 3.0, guidance_strength=STRENGTH, local_blend=blend)
        return measure(bench, judge, bench.vae.decode(samples)), NOT_GUIDED in shown

    ours, told = drawn(node_default(Pix2PixZeroKSampler, "local_blend"))
    held_on, told_of_the_other = drawn(0.0)
    assert told and not told_of_the_other
    assert ours["hit"].mean() == 1
    assert ours["whole"].mean() < 0.9 * held_on["whole"].mean()


@pytest.mark.parametrize("edit", EDITS)
@torch.inference_mode()
def test_a_direction_of_strength_1_is_the_whole_way_to_the_other_word(open_bench, edit):
    """As far as it goes along the difference that a change of the caption's own words makes."""
    bench = open_bench(edit)
    change = (bench.wanted[0][0] - bench.described[0][0]).flatten(1)
    direction = bench.direction.tensors["cond"].flatten(1)
    way = (change * direction).sum(1) / direction.square().sum()
    assert 0.8 <= way.mean() <= 1.2


@torch.inference_mode()
def test_a_batch_equals_single_runs(bench):
    """Three steps on trained weights: a batch is the same pictures, not just similar ones."""
    regularization = NoiseRegularization()
    pictures = bench.latent[:2]
    together = edit_latents(bench, pictures, slice(0, 2), regularization)
    for i in range(2):
        alone = edit_latents(bench, pictures[i : i + 1], slice(i, i + 1), regularization)
        difference = bench.model.model.process_latent_in(together[i : i + 1] - alone)
        assert difference.abs().max() <= 1e-4


def edit_latents(bench, pictures, rows, regularization):
    source, edited = ([[text[rows], extras] for text, extras in texts] for texts in (bench.described, bench.moved))
    inversion = invert_latent(bench.model, source, {"samples": pictures}, InversionSettings(3, 0, regularization))
    return sample_edit(bench.model, inversion, edited, source, EditSettings(CFG, STRENGTH, feature_until=0.5))[0]
