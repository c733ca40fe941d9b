"""`python dev.py bench distill --quick`, and its figures against restatements."""

import json

import pytest
import torch
from PIL import Image
from pix2pix_zero.benchmarks.distill import main, options_of
from pix2pix_zero.benchmarks.distill_parts.columns import cost
from pix2pix_zero.benchmarks.distill_parts.figures import errors
from pix2pix_zero.benchmarks.judge import load_judge
from pix2pix_zero.benchmarks.quality_parts.scenes import EDITS, TEST_SEED, draw_scenes
from pix2pix_zero.host.networks.students import make_student, save_student


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of a student that changes nothing."""
    folder = tmp_path_factory.mktemp("distill")
    save_student(make_student(), folder / "cat2dog.safetensors", {})
    threads = torch.get_num_threads()
    try:
        main(["--quick", "--students", str(folder), "--output", str(folder)])
    finally:
        torch.set_num_threads(threads)
    with Image.open(folder / "bench_distill_cat2dog.png") as sheet:
        assert sheet.size == (2 * 128, 5 * 128)
    return json.loads((folder / "bench_distill.json").read_text(encoding="utf-8"))["results"]["cat2dog"]


def test_all_columns_are_measured(results):
    assert list(results) == ["teacher", "teacher, moved", "teacher, few steps", "student", "source unchanged"]
    made = {"hit", "whole", "inside", "truth_whole", "truth_inside", "background"}
    assert set(results["source unchanged"]) == made
    assert set(results["teacher, moved"]) == made
    assert set(results["teacher"]) == made | {"seconds", "gmac"}
    assert set(results["student"]) == made | {"seconds", "gmac", "megabytes"}


def test_the_ends_of_the_scale_are_where_they_belong(results):
    assert results["teacher"]["whole"] == results["teacher"]["inside"] == 0
    assert results["source unchanged"]["background"] == 0
    assert (
        0 < results["teacher, moved"]["inside"] < results["source unchanged"]["inside"]
    )  # moved back, it is the same edit
    for figure, value in results["source unchanged"].items():  # the student is the identity, in half precision
        assert results["student"][figure] == pytest.approx(value, abs=0.2), figure


def test_a_step_of_the_teacher_costs_more_than_a_student(results):
    assert results["teacher"]["gmac"] > results["teacher, few steps"]["gmac"] > 2 * results["student"]["gmac"]
    assert results["teacher"]["seconds"] > results["teacher, few steps"]["seconds"] > results["student"]["seconds"] > 0


def test_operations_are_multiplications_with_their_addition():
    layer = torch.nn.Conv2d(4, 8, 3, padding=1)
    with torch.inference_mode():
        assert cost(layer, torch.rand(1, 4, 10, 20))["gmac"] == pytest.approx(8 * 10 * 20 * 4 * 9 / 1e9)


def test_errors_are_means_over_what_they_are_of():
    edit = EDITS["cat2dog"]
    scenes = draw_scenes(edit, 2, TEST_SEED)
    inside = (1 - scenes.outside).double()
    teacher, made = scenes.truths, scenes.sources.clone()
    made[:, :3] = 0.25
    found = errors(edit, scenes, teacher, made, load_judge())
    difference = 255 * (made.double() - teacher.double()).abs().mean(-1, keepdim=True)
    assert found["whole"] == pytest.approx(difference.mean().item(), rel=1e-4)
    assert found["inside"] == pytest.approx((difference * inside).sum().item() / inside.sum().item(), rel=1e-4)
    assert found["inside"] == found["truth_inside"]
    moved = 255 * (made.double() - scenes.sources.double()).abs().mean(-1, keepdim=True) * (1 - inside)
    assert found["background"] == pytest.approx(moved.sum().item() / (1 - inside).sum().item(), rel=1e-4)
    assert "background" not in errors(EDITS["day2night"], scenes, teacher, made, load_judge())


def test_without_a_student_it_says_how_to_train_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        options_of(["--students", str(tmp_path)])
    assert "dev.py train distilled --edit NAME" in " ".join(capsys.readouterr().err.split())


def test_an_edit_at_the_size_of_sd_15_asks_thousands_of_times_the_operations_of_a_student():
    from pix2pix_zero.benchmarks.distill_parts.full_size import gmac, times

    costs = gmac()
    assert 390 < costs["UNet"] < 410  # 0.40 TMAC, as bench cost counts it
    assert 3800 < times(costs) < 20_000
    assert times({"UNet": 1.0, "VAE": 10.0, "student": 2.0}) == (50 * 3.2 + 10) / 2
