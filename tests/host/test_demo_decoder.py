"""The recipe of the demo's decoder in a few steps, and the decoder that ships."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pix2pix_zero.demo_model import train_decoder as program
from pix2pix_zero.demo_model.autoencoder import LightAutoencoder, psnr
from pix2pix_zero.demo_model.eight_bits import in_eight_bits, unpacked
from pix2pix_zero.demo_model.loader import WEIGHTS, load_demo_model
from pix2pix_zero.demo_model.scene import STYLES
from pix2pix_zero.demo_model.scene_renders import render
from pix2pix_zero.demo_model.training import decoder
from pix2pix_zero.demo_model.training.optimizer import cooled
from pix2pix_zero.demo_model.training.packing import AUTOENCODER_PREFIX, packed_autoencoder
from pix2pix_zero.demo_model.training.renders import training_scene, training_scene_of_hard_styles
from safetensors.torch import load_file

SMALL = decoder.Settings(steps=4, batch=2)


@pytest.fixture(scope="module")
def renders(tmp_path_factory):
    path = tmp_path_factory.mktemp("decoder") / "renders.npy"
    np.save(path, np.stack([render(training_scene_of_hard_styles(index)) for index in range(10)]))
    return path


@pytest.fixture(scope="module")
def held_out():
    return decoder.held_out_by_style(16)


def training(renders, checkpoint, settings=SMALL):
    torch.manual_seed(0)
    return decoder.Training(LightAutoencoder(), renders, checkpoint, settings)


@pytest.fixture(scope="module")
def finished(renders, tmp_path_factory):
    run = training(renders, tmp_path_factory.mktemp("finished") / "state.safetensors")
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    run.run({})
    return run, before


def test_the_decoder_begins_without_its_fine_part():
    network, latent = LightAutoencoder(), torch.randn(1, 4, 3, 5)
    assert torch.equal(network.decode(latent), network.decode_coarse(latent))
    assert network.decode(latent).shape == (1, 3, 24, 40)


def test_every_weight_of_the_decoder_learns_and_none_of_the_encoder(finished):
    run, before = finished
    changed = {name for name, value in run.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("decoder.")}


def test_a_run_that_was_cut_short_goes_on_to_the_same_weights(renders, finished, tmp_path):
    first = training(renders, tmp_path / "state.safetensors")
    for _ in range(2):
        first.one_step()
    first.save()
    again = training(renders, tmp_path / "state.safetensors")
    assert again.trainer.count == 2
    again.run({})
    for which in ("network", "averaged"):
        found, expected = (
            (x.network if which == "network" else x.averaged()).state_dict() for x in (again, finished[0])
        )
        assert all(torch.equal(found[name], value) for name, value in expected.items()), which


def test_a_run_goes_on_with_other_steps_but_not_with_other_settings(renders, finished):
    checkpoint = finished[0].checkpoint
    assert training(renders, checkpoint, replace(SMALL, steps=6)).trainer.count == 4
    with pytest.raises(ValueError, match=r"state.safetensors was begun with other settings: \{'batch': 3\}"):
        training(renders, checkpoint, replace(SMALL, batch=3))


def test_the_rates_stay_and_then_fall_to_nothing():
    assert [cooled(progress) for progress in (0, 0.5, 0.75, 1, 1.2)] == [1, 1, 0.5, 0, 0]


def test_hard_styles_are_four_of_five_and_nothing_else_changes():
    scenes = [training_scene_of_hard_styles(index) for index in range(10)]
    assert [scene.style for scene in scenes].count("flat") == 2 and {scene.style for scene in scenes} == set(STYLES)
    assert all(
        replace(scene, style="flat") == replace(training_scene(i), style="flat") for i, scene in enumerate(scenes)
    )


def test_kernels_in_eight_bits_come_back_within_half_a_step_of_their_row():
    kernel = torch.randn(5, 3, 2, 2) * torch.tensor([1e-3, 1.0, 7.0, 0.0, 50.0]).view(5, 1, 1, 1)
    found = unpacked(in_eight_bits("x", kernel))
    assert found.keys() == {"x"}
    steps = kernel.abs().amax((1, 2, 3), keepdim=True) / 254
    assert ((found["x"] - kernel).abs() <= 1.001 * steps).all()


def test_a_kernel_without_scales_is_missing_and_scales_without_a_kernel_are_left_over():
    stored = in_eight_bits("x", torch.randn(2, 3)) | in_eight_bits("y", torch.randn(2, 3))
    del stored["x.row_scales"], stored["y"]
    assert unpacked(stored).keys() == {"y.row_scales"}


def test_the_packed_autoencoder_is_the_trained_one(finished):
    state = finished[0].averaged().state_dict()
    stored = {k.removeprefix(AUTOENCODER_PREFIX): v for k, v in unpacked(packed_autoencoder(state)).items()}
    assert stored.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(stored[name].float(), value, rtol=1e-3, atol=value.abs().max().item() / 250)


def test_the_program_writes_weights_with_a_new_decoder_and_everything_else_as_it_was(tmp_path, held_out, monkeypatch):
    few = {style: pixels[: program.SHOWN] for style, pixels in held_out.items()}
    monkeypatch.setattr(decoder, "held_out_by_style", lambda _: few)
    program.main(["--work", str(tmp_path), "--renders", "10", "--processes", "1", "--steps", "1", "--batch", "2"])
    written, shipped = load_file(tmp_path / "decoder" / "weights.safetensors"), load_file(WEIGHTS)
    assert written.keys() == shipped.keys()
    kept = {name for name in shipped if torch.equal(written[name], shipped[name])}
    assert {name for name in shipped if not name.startswith("first_stage_model.decoder.")} <= kept
    load_demo_model(tmp_path / "decoder" / "weights.safetensors")
    figures = json.loads((tmp_path / "decoder" / "decoder.json").read_text())
    assert figures["steps"] == 1 and figures["psnr"].keys() == set(STYLES)
    assert (tmp_path / "decoder" / "sheet.png").is_file()


@pytest.mark.parametrize("style", STYLES)
def test_the_shipped_decoder_is_crisp_in_every_style(held_out, style):
    pixels = held_out[style]
    network = decoder.load_autoencoder(WEIGHTS)
    assert psnr(decoder.reconstruct(network, pixels), pixels).item() > 35
