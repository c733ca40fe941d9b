"""A smaller run of the recipe that trained the demo weights."""

import itertools
import re
from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from pix2pix_zero.demo_model import loader
from pix2pix_zero.demo_model.train import Recipe, train
from pix2pix_zero.demo_model.training import autoencoder, decoder, diffusion, parallel
from pix2pix_zero.demo_model.training.diffusion import stratified_timesteps

SMALL = Recipe(
    renders=100,
    ranks=1,
    autoencoder_minutes=0.06,
    autoencoder_batch=4,
    decoder_renders=8,
    decoder_steps=2,
    decoder_batch=2,
    diffusion_minutes=0.08,
    diffusion_batch=4,
    warmup=5,
    captioner_renders=64,
    captioner_steps=2,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    work = tmp_path_factory.mktemp("training")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # A clock that goes on by a tenth of a second whenever it is read: as many steps on every machine, however busy.
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks) / 10)
    by_style = decoder.held_out_by_style
    with ExitStack() as patches:
        for stage in (autoencoder, diffusion, parallel):
            patches.enter_context(patch.object(stage, "time", clock))
        patches.enter_context(patch.object(decoder, "held_out_by_style", lambda _: by_style(1)))
        weights = train(work, SMALL)
    yield weights, (work / "train.log").read_text()
    torch.set_num_threads(threads)


def test_the_autoencoder_improves(run):
    psnr = [float(value) for value in re.findall(r"autoencoder.*PSNR ([\d.]+)", run[1])]
    assert psnr[-1] > psnr[0] + 1


def test_the_noise_predictor_improves(run):
    error = [float(value) for value in re.findall(r"diffusion.*v error ([\d.]+)", run[1])]
    assert error[-1] < error[0] - 0.02


def test_the_result_loads_like_the_shipped_weights(run):
    model, clip, vae = loader.load_demo_model(run[0])
    assert vae.decode(torch.zeros(1, 4, 16, 16)).shape == (1, 128, 128, 3)


def test_finished_stages_are_not_repeated(run):
    folder = run[0].parent
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path != run[0]}
    train(folder, SMALL)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path != run[0]}


def test_noise_levels_are_spread_and_never_off_the_end(monkeypatch):
    drawn = stratified_timesteps(10, 1000)
    assert [level // 100 for level in drawn.tolist()] == list(range(10))
    monkeypatch.setattr(torch, "rand", lambda count: torch.full((count,), 1 - 2**-24))
    assert stratified_timesteps(24, 1000).max() == 999
