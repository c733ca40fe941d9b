"""The PIE-Bench reader and its table on a data set drawn on the spot, edited with the demo model."""

import json
import math
from dataclasses import asdict, fields

import folder_paths
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pix2pix_zero.benchmarks import pie
from pix2pix_zero.benchmarks.pie_parts import pie_data, pie_figures, pie_methods
from pix2pix_zero.demo_model.scene import sample_scene
from pix2pix_zero.demo_model.scene_renders import render, subject_mask
from pix2pix_zero.host.networks import model_kinds
from pix2pix_zero.host.networks.edit_figures import Judges, mean_figures
from scipy.ndimage import correlate1d
from tiny_judges import make_clip_folder, make_dino_folder, make_lpips_file

SHOWN = ["default", "fast", "prompt-to-prompt", "plug-and-play", "word-swap", "sdedit"]


def encode_runs(mask):
    """Pairs (first pixel, number of pixels), as the benchmark writes a mask."""
    runs, inside = [], False
    for place, value in enumerate(mask.flatten().tolist()):
        if value and not inside:
            runs += [place, 0]
        if value:
            runs[-1] += 1
        inside = bool(value)
    return runs


def decode_by_pixel(runs, height, width):
    """The benchmark's rule applied to one pixel after the other."""
    mask = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            place = y * width + x
            covered = any(s <= place < s + n for s, n in zip(runs[::2], runs[1::2]))
            mask[y, x] = covered or y in (0, height - 1) or x in (0, width - 1)
    return mask


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two edits of category 1 and one of category 8, in the benchmark's layout."""
    folder = tmp_path_factory.mktemp("pie")
    entries = {}
    for number, category in enumerate("118"):
        scene = sample_scene(100_000 + number, subject="cat")
        path = folder / "annotation_images" / f"{category}_edit" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(scene)).save(path, quality=95)
        entries[f"00000{number}"] = {
            "image_path": path.relative_to(folder / "annotation_images").as_posix(),
            "original_prompt": "a [cat] in a green meadow",
            "editing_prompt": "a [dog] in a green meadow",
            "editing_instruction": "Turn the cat into a dog",
            "editing_type_id": category,
            "blended_word": "cat dog" if category == "1" else "",
            "mask": encode_runs(subject_mask(scene)),
        }
    (folder / "mapping_file.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def judge_models(tmp_path_factory):
    base = tmp_path_factory.mktemp("judges")
    make_clip_folder(base / "clip")
    make_dino_folder(base / "dino")
    make_lpips_file(base / "lpips.safetensors")
    before = folder_paths.folder_names_and_paths.get(model_kinds.METRICS_FOLDER)
    folder_paths.folder_names_and_paths[model_kinds.METRICS_FOLDER] = ([str(base)], {".safetensors"})
    yield ["--clip", "clip", "--dino", "dino", "--lpips", "lpips.safetensors"]
    folder_paths.folder_names_and_paths[model_kinds.METRICS_FOLDER] = before


@pytest.fixture(scope="module")
def drawn(data, judge_models, tmp_path_factory):
    """All methods on one edit of each category: (mean figures, output folder)."""
    output = tmp_path_factory.mktemp("output")
    means = pie.main(
        ["--data", str(data), "--checkpoint", "demo", "--steps", "2", "--cfg", "1.5", "--category", "8",
         "--output", str(output), *judge_models]
    )  # fmt: skip
    return means, output


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_decoded_as_pixel_by_pixel(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(5, 14, size=2)
    runs = encode_runs(rng.random((height, width)) < rng.random())
    np.testing.assert_array_equal(pie_data.decode_mask(runs, height, width), decode_by_pixel(runs, height, width))


def test_runs_may_overlap_and_go_beyond_the_last_pixel():
    runs = [20, 9, 25, 30, 60, 1000]
    np.testing.assert_array_equal(pie_data.decode_mask(runs, 8, 9), decode_by_pixel(runs, 8, 9))


@pytest.mark.parametrize("runs", [[3], [-1, 2], [72, 1]])
def test_refuses_runs_that_do_not_fit_the_picture(runs):
    with pytest.raises(ValueError, match="does not fit its picture of 9x8"):
        pie_data.decode_mask(runs, 8, 9)


def test_reads_the_benchmarks_layout(data):
    cases = pie_data.read_cases(data)
    assert [case.key for case in cases] == ["000000", "000001", "000002"]
    assert cases[0].source_text == "a cat in a green meadow" and cases[0].target_text == "a dog in a green meadow"
    assert cases[0].blended_words == ("cat", "dog") and cases[2].blended_words == ()
    assert cases[0].source().shape == (1, 128, 128, 3)
    inner = cases[0].mask()[0, 1:-1, 1:-1].numpy()
    np.testing.assert_array_equal(inner, subject_mask(sample_scene(100_000, subject="cat"))[1:-1, 1:-1])
    assert [case.key for case in pie_data.read_cases(data, ("8",))] == ["000002"]
    assert [case.key for case in pie_data.read_cases(data, limit=2)] == ["000000", "000001"]


def test_says_what_is_wrong_with_the_data(data, tmp_path):
    with pytest.raises(ValueError, match="^--data: .*is not PIE-Bench.*mapping_file.json"):
        pie_data.read_cases(tmp_path)
    with pytest.raises(ValueError, match="^--category: "):
        pie_data.read_cases(data, ("5",))


def test_every_method_draws_a_picture_of_its_own(drawn, data):
    means, output = drawn
    assert list(means) == SHOWN
    pictures = [np.asarray(Image.open(output / name / "annotation_images" / "8_edit" / "2.jpg")) for name in SHOWN]
    assert {picture.shape for picture in pictures} == {(128, 128, 3)}
    distinct = {picture.tobytes() for picture, name in zip(pictures, SHOWN) if name != "fast"}
    assert len(distinct) == len(SHOWN) - 1  # of two steps, fast guides as many as default
    for figures in means.values():
        assert all(math.isfinite(value) for value in asdict(figures).values())


def test_figures_are_those_of_the_benchmarks_formulas(drawn, data):
    """On pictures blacked out inside the mask: their plain mean, and SSIM on mirrored pixels, in float64."""
    means, output = drawn
    (case,) = pie_data.read_cases(data, ("8",))
    outside = 1 - case.mask()[0].double().numpy()[..., None]
    edited = np.asarray(Image.open(output / "default" / "annotation_images" / case.name)) / 255
    a, b = case.source()[0].double().numpy() * outside, edited * outside
    figures = means["default"]
    assert figures.mse == pytest.approx(((a - b) ** 2).mean(), rel=1e-4)
    assert figures.psnr == pytest.approx(10 * math.log10(1 / ((a - b) ** 2).mean()), rel=1e-5)

    distance = np.arange(-5, 6)
    window = np.exp(-(distance**2) / (2 * 1.5**2)) / np.exp(-(distance**2) / (2 * 1.5**2)).sum()

    def mean(x):
        return correlate1d(correlate1d(x, window, axis=0, mode="mirror"), window, axis=1, mode="mirror")

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    ssim = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert figures.ssim == pytest.approx(ssim.mean(), abs=1e-5)


class PixelJudge:
    """Stands for every network: sees exactly what the table gives it."""

    def keys(self, pictures, value_range=1.0):
        self.value_range = value_range
        return pictures.flatten(1, 2) * value_range + 1

    def similarity(self, pictures, texts):
        return 100 * pictures.mean(dim=(1, 2, 3))[:, None]

    def distance(self, source, edited):
        return (source - edited).abs().sum(dim=(1, 2, 3))


def test_networks_see_the_pictures_as_the_benchmark_shows_them():
    generator = torch.Generator().manual_seed(0)
    source, edited = (torch.rand(1, 12, 13, 3, generator=generator) for _ in range(2))
    mask = torch.zeros(1, 12, 13)
    mask[:, 2:6, 3:7] = 1
    judge = PixelJudge()
    judges = Judges(judge, judge, judge)
    figures = pie_figures.pie_figures(source, edited, mask, "a dog", judges)
    assert judge.value_range == 255
    assert figures.clip_whole == pytest.approx(100 * edited.mean().item(), rel=1e-5)
    assert figures.clip_edited == pytest.approx(100 * (edited * mask[..., None]).mean().item(), rel=1e-5)
    black = (source - edited).abs() * (1 - mask[..., None])
    assert figures.lpips == pytest.approx(black.sum().item(), rel=1e-5)

    def angles(picture, scale):
        tokens = F.normalize(picture[0].reshape(-1, 3).double() * scale + 1, dim=-1)
        return tokens @ tokens.T

    for scale in (255, 1):
        expected = ((angles(source, scale) - angles(edited, scale)) ** 2).mean().item()
        figures = pie_figures.pie_figures(source, edited, mask, "a dog", judges, scale)
        assert figures.structure == pytest.approx(expected, rel=1e-4)


def test_a_mask_over_everything_leaves_only_what_looks_at_the_whole():
    picture = torch.rand(1, 12, 12, 3)
    judge = PixelJudge()
    figures = pie_figures.pie_figures(picture, picture, torch.ones(1, 12, 12), "a dog", Judges(judge, judge, judge))
    known = {name for name, value in asdict(figures).items() if not math.isnan(value)}
    assert known == {"structure", "clip_whole", "clip_edited"}
    assert mean_figures([figures, pie_figures.PieFigures(psnr=20.0)]).psnr == 20.0


def test_the_table_has_the_benchmarks_scales(capsys):
    figures = pie_figures.PieFigures(0.04922, 21.53, 0.13898, 0.012732, 0.7705, 23.31, math.nan)
    lines = pie_figures.table({"mine": figures}).splitlines()
    assert lines[1].split() == ["mine", "49.22", "21.53", "138.98", "127.32", "77.05", "23.31", "-"]
    assert [field.name for field in fields(pie_figures.PieFigures)] == list(pie_figures.TITLES)
    published = next(line for line in lines if "Direct + pix2pix-zero" in line)
    assert published.split()[-7:-1] == lines[1].split()[1:-1]


def test_a_stopped_run_goes_on_and_pictures_of_others_are_judged(drawn, data, judge_models, monkeypatch, tmp_path):
    means, output = drawn
    monkeypatch.setattr(pie, "METHODS", {name: None for name in SHOWN})
    run = ["--data", str(data), "--checkpoint", "demo", "--category", "8", "--output", str(output), *judge_models]
    again = pie.main([*run, "--steps", "2", "--cfg", "1.5"])
    assert again == means
    with pytest.raises(ValueError, match="^--output: .*drawn with --steps 2, --cfg 1.5. .*--redo"):
        pie.main(run)

    strips = tmp_path / "theirs" / "8_edit"
    strips.mkdir(parents=True)
    edited = Image.open(output / "sdedit" / "annotation_images" / "8_edit" / "2.jpg")
    strip = Image.new("RGB", (4 * 128, 128))
    strip.paste(edited, (3 * 128, 0))
    strip.save(strips / "2.jpg", format="PNG")
    judged = pie.main(
        ["--data", str(data), "--judge", f"theirs={strips.parent}", "--category", "8", "--output", str(tmp_path),
         *judge_models]
    )  # fmt: skip
    assert list(judged) == ["theirs"]
    assert judged["theirs"] == means["sdedit"]
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["pictures"]["theirs"]["000002"]["psnr"] == pytest.approx(means["sdedit"].psnr)


@pytest.mark.parametrize("preset", ["default", "fast", "official"])
def test_presets_are_those_of_the_sampler(preset, monkeypatch):
    monkeypatch.setattr(pie_methods, "pix2pix_zero", lambda edit, *how: how)
    assert pie_methods.METHODS[preset](None)[0] == preset


def test_annotated_words_are_blended_and_doubled_as_the_benchmarks_authors_do(data):
    annotated, _, plain = pie_data.read_cases(data)
    assert pie_methods._annotated_words(annotated) == {
        "local_blend": 0.3,
        "blend_words": "cat, dog",
        "reweight": "dog: 2",
    }
    assert pie_methods._annotated_words(plain) == {}


def test_prompt_to_prompt_takes_the_annotated_words(data, tmp_path):
    options = ["--data", str(data), "--checkpoint", "demo", "--methods", "prompt-to-prompt", "--limit", "1"]
    means = pie.main([*options, "--steps", "2", "--cfg", "1.5", "--output", str(tmp_path)])
    assert means["prompt-to-prompt"].psnr > 15
    assert math.isnan(means["prompt-to-prompt"].structure)


def test_asks_for_a_checkpoint_or_pictures(data, capsys, tmp_path):
    with pytest.raises(SystemExit):
        pie.parse(["--data", str(data)])
    assert "--checkpoint: name one" in capsys.readouterr().err
    with pytest.raises(ValueError, match="^--checkpoint: there is no file nothing.safetensors"):
        pie.main(["--data", str(data), "--checkpoint", "nothing.safetensors", "--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
