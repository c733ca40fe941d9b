"""`python dev.py bench quality --quick`, its figures against restatements, and what the defaults may not fall behind."""

import functools
import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from pix2pix_zero.benchmarks.judge import load_judge
from pix2pix_zero.benchmarks.quality import main
from pix2pix_zero.benchmarks.quality_parts import figures, methods, report, tuning
from pix2pix_zero.benchmarks.quality_parts.diffusers_pipeline import demo_unet
from pix2pix_zero.benchmarks.quality_parts.scenes import EDITS, TEST_SEED, TUNING_SEED, draw_scenes
from pix2pix_zero.benchmarks.quality_parts.workbench import DemoModels, Workbench
from pix2pix_zero.demo_model.scene import FURS
from pix2pix_zero.demo_model.scene_captions import caption
from pix2pix_zero.host.sampling.checks import AUTO
from pix2pix_zero.nodes.demo import DIFFUSION, FLOW, TRANSFORMER

UNEDITED = set(tuning.UNEDITED)
METHODS = {method.name for method in methods.METHODS}
QUICKLY = ["--quick", "--edits", "cat2dog"]


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """The demo model: what is measured does not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DemoModels, "load", functools.cache(DemoModels.load))
        yield


@pytest.fixture(scope="module")
def models():
    with torch.inference_mode():
        return DemoModels.load(DIFFUSION, AUTO)


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("quality")
    main([*QUICKLY, "--output", str(output)])
    return output


@pytest.fixture(scope="module")
def results(folder):
    found = json.loads((folder / "bench_quality.json").read_text(encoding="utf-8"))["results"]["cat2dog"]
    return {result["method"]: result for result in found}


def test_every_method_is_measured(results):
    assert set(results) == UNEDITED | METHODS
    for result in results.values():
        for mean, low, high in result["test"].values():
            assert low <= mean <= high
            assert math.isfinite(mean)


def test_source_and_ground_truth_are_the_ends_of_the_scale(results):
    source, truth = (results[name]["test"] for name in ("source, unchanged", "ground truth"))
    assert source["background"][0] == source["hit"][0] == 0
    assert source["ssim"][0] == pytest.approx(1)
    assert truth["whole"][0] == truth["structure"][0] == 0
    assert truth["hit"][0] == 1


def test_pasted_edits_are_the_source_outside_their_area_and_nearer_to_the_render(results):
    for name, result in results.items():
        pasted = {figure: mean for figure, (mean, _, _) in result["pasted"].items()}
        assert pasted["outside"] == 0
        assert 0 <= pasted["kept"] <= 1
        if pasted["kept"] > 0.1:
            assert pasted["whole"] < pasted["whole_before"], name
    source = results["source, unchanged"]["pasted"]
    assert source["kept"][0] < 1 and source["whole"][0] > 0
    assert results["default"]["pasted"]["kept"][0] >= results["without blend"]["pasted"]["kept"][0]


def test_methods_differ_from_each_other(results):
    errors = [results[name]["test"]["whole"][0] for name in METHODS]
    assert len({round(error, 4) for error in errors}) == len(METHODS)


def test_another_setting_of_the_sampler_can_be_tried(results, tmp_path):
    main([*QUICKLY, "--methods", "default", "--set", "local_blend=0", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "bench_quality.json").read_text(encoding="utf-8"))["results"]["cat2dog"]
    assert found[-1]["test"] == results["without blend"]["test"] != results["default"]["test"]


@pytest.mark.parametrize(
    ("network", "objective", "measured"),
    [("--dit", TRANSFORMER, ["FlowEdit"]), ("--flow", FLOW, ["shapes kept", "FlowEdit"])],
)
def test_the_other_networks_are_measured_where_the_method_does_something(
    network, objective, measured, tmp_path, monkeypatch
):
    load, loaded = DemoModels.load, []
    monkeypatch.setattr(DemoModels, "load", lambda *settings: loaded.append(settings) or load(*settings))
    methods = ["shapes kept", "FlowEdit", "diffusers"]
    main([*QUICKLY, network, "--scenes", "1", "--steps", "2", "--methods", *methods, "--output", str(tmp_path)])
    assert loaded == [(objective, AUTO)]
    found = json.loads((tmp_path / "bench_quality.json").read_text(encoding="utf-8"))
    assert found["settings"][network.removeprefix("--")]
    assert [result["method"] for result in found["results"]["cat2dog"]] == [*tuning.UNEDITED, *measured]


def test_a_setting_the_sampler_does_not_have_is_refused():
    with pytest.raises(SystemExit):
        main(["--quick", "--set", "loca_blend=0"])


def test_the_sheets_hold_every_row(folder):
    with Image.open(folder / "bench_quality_cat2dog.png") as sheet:
        assert sheet.height == 128 * (3 + len(METHODS))
    with Image.open(folder / "bench_quality.png") as curves:
        assert len(curves.convert("RGB").getcolors(1 << 20)) > len(METHODS)


def test_no_scene_is_both_tuned_and_tested_on():
    assert TUNING_SEED + 10_000 < TEST_SEED


@pytest.mark.parametrize("name", EDITS)
def test_nothing_differs_outside(name):
    scenes = draw_scenes(EDITS[name], 3, TEST_SEED)
    assert (scenes.sources * scenes.outside).equal(scenes.truths * scenes.outside)
    assert not scenes.sources.equal(scenes.truths)
    assert EDITS[name].whole_picture or scenes.outside.mean((1, 2, 3)).min() > 0.3


@pytest.mark.parametrize("name", EDITS)
def test_edited_captions_describe_the_ground_truth(name):
    """But for the fur, which zebras and pencil sketches do not show."""
    edit, left_out = EDITS[name], {"a", "an", *FURS}
    for scene in draw_scenes(edit, 8, TEST_SEED).drawn:
        edited, truth = caption(scene).replace(*edit.swap), caption(replace(scene, **edit.after))
        assert caption(scene) != edited
        assert [w for w in edited.split() if w not in left_out] == [w for w in truth.split() if w not in left_out]


def test_demo_weights_mean_the_same_to_diffusers(models):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, 64, generator=generator)
    timesteps = torch.tensor([481, 21])
    with torch.inference_mode():
        ours = models.model.model.diffusion_model(x, timesteps.float(), context=text, transformer_options={})
        theirs = demo_unet()(x, timesteps, encoder_hidden_states=text).sample
    assert (ours - theirs).abs().max() <= 1e-4


def test_background_figures_see_only_the_background():
    sources = torch.full((1, 64, 64, 3), 0.4)
    outside = torch.zeros(1, 64, 64, 1)
    outside[:, :, :40] = 1
    pictures = sources + 0.1 * outside
    pictures[:, :, 40:] = 1.0
    found = figures.background_figures(pictures, sources, outside)
    assert found["background"].item() == pytest.approx(25.5, rel=1e-5)
    assert found["psnr"].item() == pytest.approx(20, rel=1e-5)


def test_structure_error_tells_another_pose_from_another_coat(judge):
    scenes = draw_scenes(EDITS["cat2dog"], 4, TEST_SEED)
    moved = scenes.sources.roll(12, dims=2)
    darker = 0.9 * scenes.sources
    same, pose, light = (figures.structure_error(judge, p, scenes.sources) for p in (scenes.sources, moved, darker))
    assert same.abs().max() <= 1e-6
    assert (pose > 2 * light).all()


def test_interval_of_a_mean_narrows_with_the_scenes():
    generator = torch.Generator().manual_seed(1)
    for count in (25, 400):
        values = torch.randn(count, generator=generator)
        low, high = figures.interval(values)
        error = values.std().item() / count**0.5
        assert (high - low) == pytest.approx(2 * 1.96 * error, rel=0.15)
        assert low < values.mean() < high
    assert figures.interval(torch.ones(5)) == (1, 1)


@pytest.mark.parametrize(
    ("points", "seen", "chosen"),
    [
        ([(1, 0.5, 3.0), (2, 0.95, 9.0), (3, 1.0, 8.0), (4, 1.0, 12.0)], 1.0, 3),
        ([(1, 0.2, 3.0), (2, 0.9, 9.0), (3, 0.6, 5.0)], 1.0, 2),
        ([(1, 0.5, 3.0), (2, 0.875, 5.0), (3, 1.0, 8.0)], 0.875, 2),
    ],
    ids=["least error of those that edit", "most edited where none does", "the judge is blind to one true picture"],
)
def test_the_knob_is_frozen_where_enough_is_edited(points, seen, chosen):
    curve = [(value, {"hit": [hit] * 3, "whole": [whole] * 3}) for value, hit, whole in points]
    assert tuning.choose(curve, tuning.ENOUGH * seen) == chosen


def test_enough_is_edited_where_the_judge_sees_as_much_as_in_the_true_pictures(models, judge):
    """It does not see glasses on one of these eight, the sketch of a black cat, in the true picture either."""
    bench = Workbench(models, EDITS["add_glasses"], draw_scenes(EDITS["add_glasses"], 8, TUNING_SEED), 4)
    with torch.inference_mode():
        truth = methods.Method("ground truth", "none", (0.0,), lambda bench, _: bench.vae.encode(bench.scenes.truths))
        result, _ = tuning.compare(truth, bench, bench, judge, lambda line: None)
    assert result.test["hit"][0] == 7 / 8
    assert result.enough == pytest.approx(0.95 * 7 / 8)
    assert report.missed(result) == ""


@pytest.fixture(scope="module")
def cats(models):
    edit = EDITS["cat2dog"]
    with torch.inference_mode():
        return Workbench(models, edit, draw_scenes(edit, 4, TEST_SEED), methods.FAST_STEPS)


def test_the_fast_edit_stays_good(cats, judge):
    """Once, of the unchanged source's error to the ground truth it had 0.70, of its structure error 0.21, and of plain DDIM's
    background error 0.31."""
    with torch.inference_mode():
        edited, _ = cats.timed(methods.fast, 1.5)
        plain = cats.vae.decode(methods.reconstruction(cats))
        fast, ddim, source = (figures.measure(cats, judge, pictures) for pictures in (edited, plain, cats.source))
    assert fast["hit"].mean() == 1
    assert fast["whole"].mean() <= 0.8 * source["whole"].mean()
    assert fast["structure"].mean() <= 0.25 * source["structure"].mean()
    assert fast["background"].mean() <= 0.36 * ddim["background"].mean()
