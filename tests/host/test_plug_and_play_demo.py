"""Plug-and-Play on the demo model: what the pictures look like."""

import pytest
import torch
from pix2pix_zero.benchmarks.judge import load_judge
from pix2pix_zero.benchmarks.quality_parts.figures import measure
from pix2pix_zero.benchmarks.quality_parts.scenes import EDITS, draw_scenes
from pix2pix_zero.benchmarks.quality_parts.workbench import DemoModels, Workbench
from plug_and_play_runs import patch, sample


@pytest.fixture(scope="module")
def bench():
    edit = EDITS["cat2dog"]
    with torch.inference_mode():
        bench = Workbench(DemoModels.load(), edit, draw_scenes(edit, 4, 400_000), 12)
        bench.inversion()
        return bench


@torch.inference_mode()
def draw(bench, model, positive, cfg):
    return bench.vae.decode(sample(model, bench.inversion(), positive, bench.described, cfg))


def test_the_source_text_brings_the_demo_pictures_back_better_than_plain_sampling(bench):
    injected = patch(bench.model, bench.inversion())
    plain, ours = (draw(bench, m, bench.described, 1.0) - bench.source for m in (bench.model, injected))
    assert ours.abs().mean() < 0.7 * plain.abs().mean()


def test_the_demo_cats_become_dogs_where_they_sit(bench):
    injected, judge = patch(bench.model, bench.inversion(), 0.6, 0.5), load_judge()
    plain, ours = (measure(bench, judge, draw(bench, m, bench.wanted, 2.5)) for m in (bench.model, injected))
    assert ours["hit"].mean() >= 0.8
    assert ours["background"].mean() < 0.5 * plain["background"].mean()
    assert ours["whole"].mean() < 0.6 * plain["whole"].mean()
