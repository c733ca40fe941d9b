"""The recipe of the demo DiT, in a few steps on a few scenes."""

import random
from functools import partial

import comfy.model_detection
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from pix2pix_zero.benchmarks.judge import load_judge
from pix2pix_zero.benchmarks.model import Model, Sampling
from pix2pix_zero.benchmarks.quality_parts.methods import this_pack
from pix2pix_zero.benchmarks.quality_parts.scenes import EDITS, TUNING_SEED, draw_scenes
from pix2pix_zero.benchmarks.quality_parts.workbench import DemoModels, Workbench
from pix2pix_zero.demo_model import train_dit
from pix2pix_zero.demo_model.eight_bits import unpacked
from pix2pix_zero.demo_model.loader import UNET_PREFIX, WEIGHTS, load_demo_model
from pix2pix_zero.demo_model.scene import Scene
from pix2pix_zero.demo_model.scene_captions import caption
from pix2pix_zero.demo_model.training import dit
from pix2pix_zero.demo_model.transformer import (
    TRANSFORMER_SETTINGS,
    TRANSFORMER_WEIGHTS,
    load_transformer,
    load_transformer_patcher,
    packed,
)
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from pix2pix_zero.host.views.feature_pictures import feature_pictures
from pix2pix_zero.nodes.demo import TRANSFORMER, Pix2PixZeroDemoModel
from safetensors.torch import load_file, save_file

import nodes as host_nodes

SMALL = dit.Settings(steps=4, batch=4, warmup=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("dit") / "latents.npy"
    dit.encode_scenes(WEIGHTS, path, 24)
    return dit.Data.load(path, WEIGHTS)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of all steps, and its checkpoint."""
    checkpoint = tmp_path_factory.mktemp("finished") / "state.safetensors"
    run = dit.Training(data, SMALL, checkpoint)
    run.run()
    return run, checkpoint


@pytest.fixture(scope="module")
def written(finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "dit.safetensors"
    dit.write_transformer(finished[0].average, WEIGHTS, path)
    return path


def test_a_run_that_was_cut_short_goes_on_to_the_same_state(data, finished, tmp_path, monkeypatch):
    step = dit.Training.one_step

    def stops(run):
        if run.step == 2:
            raise KeyboardInterrupt
        step(run)

    monkeypatch.setattr(dit.Training, "one_step", stops)
    with pytest.raises(KeyboardInterrupt):
        dit.Training(data, SMALL, tmp_path / "state.safetensors").run()
    monkeypatch.setattr(dit.Training, "one_step", step)
    again = dit.Training(data, SMALL, tmp_path / "state.safetensors")
    assert again.step == 2
    again.run()
    assert (tmp_path / "state.safetensors").read_bytes() == finished[1].read_bytes()


def test_the_checkpoint_is_refused_by_other_settings(data, finished):
    with pytest.raises(ValueError, match="batch"):
        dit.Training(data, dit.Settings(steps=4, batch=5, warmup=2), finished[1])


def test_the_velocity_error_falls(data, tmp_path):
    run = dit.Training(data, dit.Settings(steps=40, batch=4, warmup=2), tmp_path / "state.safetensors")
    batch = dit.draw(data, dit.Settings(batch=24), 10**6)

    def error():
        with torch.no_grad():
            found = run.network(batch.noisy, 1000 * batch.levels, context=batch.context, y=batch.pooled)
        return (found - batch.velocity).square().mean().item()

    first = error()
    assert first == pytest.approx(batch.velocity.square().mean().item())  # an untrained network answers 0
    for _ in range(6):
        run.one_step()
    assert error() < 0.96 * first


def test_steps_draw_different_data_and_the_same_each_time(data):
    first, again, other = (dit.draw(data, SMALL, step) for step in (0, 0, 1))
    assert torch.equal(first.noisy, again.noisy) and torch.equal(first.context, again.context)
    assert not torch.equal(first.noisy, other.noisy)


def test_a_batch_lies_on_the_straight_line_between_picture_and_noise(data):
    batch = dit.draw(data, SMALL, 3)
    clean = batch.noisy - batch.levels.view(-1, 1, 1, 1) * batch.velocity
    distances = (clean[:, None] - data.latents[None]).abs().amax((2, 3, 4)).amin(1)
    assert distances.max() < 1e-5


def test_noise_levels_are_logit_normal():
    levels = dit.noise_levels(20000, 1.3, torch.Generator().manual_seed(0))
    logits = torch.logit(levels.double())
    assert logits.mean().item() == pytest.approx(0, abs=0.01)
    assert logits.std().item() == pytest.approx(1.3, abs=0.01)
    assert ((logits / 1.3).abs() < 1).double().mean().item() == pytest.approx(0.6827, abs=0.001)


def test_texts_are_those_of_the_clip_text_encode_node(data):
    words = caption(data.scenes[0])
    rows = torch.tensor([data.vocabulary.encode(words, random.Random(0))])
    context, pooled = dit.encode_texts(data.text, rows, data.vocabulary.end, torch.ones(1, 1))
    _, clip, _ = load_demo_model()
    ((expected, extra),) = host_nodes.CLIPTextEncode().encode(clip, words)[0]
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, extra["pooled_output"], rtol=0, atol=1e-5)


def test_attention_is_the_hosts(data):
    q, k, v = torch.randn(3, 2, 7, 128).unbind()
    expected = attention_pytorch(q, k, v, 2)
    override = dit.ATTENTION["transformer_options"]["optimized_attention_override"]
    torch.testing.assert_close(override(attention_pytorch, q, k, v.unflatten(-1, (2, 64)), 2), expected)


def test_comfyui_detects_the_network_from_its_weights(written):
    found = comfy.model_detection.detect_unet_config(load_file(written), UNET_PREFIX)
    assert found == {k: v for k, v in TRANSFORMER_SETTINGS.items() if k != "num_blocks"}


def test_the_weights_take_at_most_six_megabytes(written):
    assert TRANSFORMER_WEIGHTS.stat().st_size == written.stat().st_size <= 6_000_000


def test_the_written_model_predicts_what_the_trained_one_does(data, finished, written):
    run, _ = finished
    model = load_transformer(written).model
    batch = dit.draw(data, SMALL, 7)
    with torch.no_grad():
        velocity = run.average(batch.noisy, 1000 * batch.levels, context=batch.context, y=batch.pooled)
        clean = model.apply_model(batch.noisy, batch.levels, c_crossattn=batch.context, y=batch.pooled)
    expected = batch.noisy - batch.levels.view(-1, 1, 1, 1) * velocity
    torch.testing.assert_close(clean, expected, rtol=0, atol=1e-3)  # half precision in the file


def test_packed_weights_come_back_within_half_a_step_of_their_row():
    shapes = {"x.adaLN_modulation.1.weight": (6, 40), "x.adaLN_modulation.1.bias": (6,), "x.mlp.fc1.weight": (5, 7)}
    state = {name: torch.randn(shape) * 10.0**-index for index, (name, shape) in enumerate(shapes.items())}
    state["x.adaLN_modulation.1.weight"][2] = 0  # as of a block that does nothing
    found = unpacked(packed(state))
    assert found.keys() == state.keys()
    for name, value in state.items():
        steps = value.abs().amax(-1, keepdim=True) / (254 if value.shape == (6, 40) else 1024)
        assert ((found[name].float() - value).abs() <= 1.001 * steps).all(), name


def test_damaged_weights_are_named(written, tmp_path):
    state = load_file(written)
    del state[UNET_PREFIX + "context_embedder.weight"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="fit its transformer: missing .*context_embedder.weight.*Reinstall"):
        load_transformer(tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="missing: .*none.safetensors"):
        load_transformer(tmp_path / "none.safetensors")


def test_the_node_loads_the_shipped_transformer(run_node):
    model, clip, vae = run_node(Pix2PixZeroDemoModel, objective=TRANSFORMER)
    dit = model.get_model_object("diffusion_model")
    assert type(dit).__name__ == "OpenAISignatureMMDITWrapper" and len(dit.joint_blocks) == 5
    assert clip is not None and vae is not None
    assert all(value.isfinite().all() for value in dit.state_dict().values())
    again = load_transformer_patcher(*model.cached_patcher_init[1], disable_dynamic=True)
    found = again.model.diffusion_model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in dit.state_dict().items())


def test_the_shipped_transformer_draws_what_is_asked_for():
    drawing, judge = Model(WEIGHTS, TRANSFORMER_WEIGHTS), load_judge()
    for scene in (Scene("dog", "gray"), Scene("cat", "white", glasses=True, night=True), Scene("zebra", winter=True)):
        with torch.inference_mode():
            drawn = drawing.draw(caption(scene), 4, 0, Sampling(6, 3.0, "euler", "normal"))
        answers = judge.answers(drawn)
        for name in ("subject", "glasses", "night", "winter", "style"):
            assert answers[name] == [getattr(scene, name)] * 4, (scene, name)


def test_guidance_holds_the_shape_of_the_source_more_the_stronger_it_is():
    """Cats become dogs, and with all that guidance can they stay where the cat's shape was."""
    with torch.inference_mode():
        scenes = draw_scenes(EDITS["cat2dog"], 3, TUNING_SEED)
        bench = Workbench(DemoModels.load(TRANSFORMER), EDITS["cat2dog"], scenes, 8, {})
        unguided, mildly, fully = (
            bench.timed(partial(this_pack, guidance_strength=strength), 1.5)[0] for strength in (0.0, 0.1, 1.0)
        )
        assert load_judge().answers(unguided)["subject"] == ["dog"] * 3
    moved = [(edited - bench.source).abs().mean().item() for edited in (unguided, mildly, fully)]
    assert moved[1] < 0.9 * moved[0] and moved[2] < 0.75 * moved[0]


def test_the_ksampler_draws_a_picture_with_it(written):
    with torch.inference_mode():
        drawn = Model(WEIGHTS, written).draw("a photo of a cat", 2, 0, Sampling(2, 3.0, "euler", "normal"))
    assert drawn.shape == (2, 128, 128, 3)


def test_the_command_writes_the_weights_and_goes_on_with_more_steps(data, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(dit, "Vocabulary", lambda: data.vocabulary)  # always the same, and slow to collect
    caplog.set_level("INFO")
    sizes = ["--work", str(tmp_path), "--scenes", "8", "--batch", "2"]
    train_dit.main([*sizes, "--steps", "1"])
    output = train_dit.main([*sizes, "--steps", "2"])
    assert load_transformer(output).model.diffusion_model.joint_blocks
    assert caplog.text.count("encoded 8 of 8") == 1
    assert "done: step 2" in caplog.text


def test_encoding_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(dit, "CHUNK", 2)
    drawn = []

    def render(scene):
        drawn.append(scene)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return whole(scene)

    whole, path, other = dit.render, tmp_path / "latents.npy", tmp_path / "whole.npy"
    monkeypatch.setattr(dit, "render", render)
    with pytest.raises(KeyboardInterrupt):
        dit.encode_scenes(WEIGHTS, path, 6)
    assert not path.exists()
    dit.encode_scenes(WEIGHTS, path, 6)
    assert len(drawn) == 5 + 2
    monkeypatch.setattr(dit, "render", whole)
    dit.encode_scenes(WEIGHTS, other, 6)
    assert path.read_bytes() == other.read_bytes()


@torch.inference_mode()
def test_feature_pca_refuses_it_in_words(run_node):
    model, _, _ = run_node(Pix2PixZeroDemoModel, objective=TRANSFORMER)
    text = [[torch.zeros(1, 77, 64), {"pooled_output": torch.zeros(1, 64)}]]
    inversion = invert_latent(model, text, {"samples": torch.zeros(1, 4, 16, 16)}, InversionSettings(2))
    with pytest.raises(ValueError, match="^model: this one is a flow model without a UNet"):
        feature_pictures(model, inversion, "queries", 0.5)
