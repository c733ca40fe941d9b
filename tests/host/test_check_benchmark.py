"""The check of a user's own checkpoint: what its table says of the demo model and of one that is broken."""

import math
import re

import pytest
import torch
from PIL import Image
from pix2pix_zero.benchmarks import check
from pix2pix_zero.demo_model.scene import sample_scene
from pix2pix_zero.demo_model.scene_captions import caption
from pix2pix_zero.demo_model.scene_renders import render
from pix2pix_zero.host.networks.edit_figures import EditFigures


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("check") / "cat.png"
    Image.fromarray(render(sample_scene(5, subject="cat"))).save(path)
    return path


@pytest.fixture(scope="module")
def checked(picture):
    output, text = picture.parent / "out", caption(sample_scene(5, subject="cat"))
    settings = ["--steps", "6", "--caption", text, "--output", str(output)]
    rows = check.main(["--checkpoint", "demo", "--picture", str(picture), *settings])
    return {row.name: row for row in rows}, output


def test_the_table_tells_what_came_back_and_what_changed(checked):
    rows, output = checked
    assert rows["unedited"].figures.psnr > 40, "the demo model's inversion is exact"
    assert rows["unedited"].changed == 1
    for name in ("edit", "edit, guided", "edit, preset fast"):
        assert 0 < rows[name].changed < 1 and rows[name].figures.psnr > 25, "the background stays"
    assert rows["edit, preset paper"].changed == 1, "nothing but guidance holds the picture there"
    assert all(row.seconds > 0 for row in rows.values())
    pictures = {path.stem: Image.open(path).size for path in output.glob("*.png")}
    assert pictures == dict.fromkeys(
        ["source", "unedited", "edit", "edit_guided", "edit_preset_fast", "edit_preset_paper"], (128, 128)
    )


def test_the_report_names_what_a_bug_report_has_to(checked):
    rows, output = checked
    text = (output / "check.md").read_text(encoding="utf-8")
    for said in (
        "ComfyUI-Pix2PixZero",
        torch.__version__,
        "cross-attention layers",
        "128x128 of a picture of 128x128, 6 steps, cfg 1.5",
        "cat to dog",
    ):
        assert said in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert {line.count("|") for line in table} == {9}, "Markdown draws it as a table"


def test_what_was_not_measured_is_a_dash():
    row = check.Row("edit", 1.25, 2**29, EditFigures(psnr=30.123), math.nan)
    assert re.split(r"\s*\|\s*", check.table([row]).splitlines()[2].strip("| ")) == [
        "edit", "30.1 dB", "-", "-", "-", "-", "1.2", "0.50 GiB",
    ]  # fmt: skip


def test_a_checkpoint_that_is_not_there_is_named(picture):
    with pytest.raises(ValueError, match="--checkpoint: there is no file nothing.safetensors"):
        check.main(["--checkpoint", "nothing.safetensors", "--picture", str(picture)])
