"""The nodes that make pairs and distil an edit, as the executor runs them."""

from __future__ import annotations

import json

import comfy.model_management
import folder_paths
import numpy as np
import pytest
import torch
from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel, UpscaleModelLoader
from PIL import Image
from pix2pix_zero.distillation.learning import Settings, Training
from pix2pix_zero.distillation.pairs import Pairs
from pix2pix_zero.editing import writing
from pix2pix_zero.editing.writing import TEMPORARY
from pix2pix_zero.host.distilled import demo_students, pair_sets
from pix2pix_zero.host.networks.students import load_student, make_student, save_student
from pix2pix_zero.nodes.distillation import Pix2PixZeroDemoDistilled, Pix2PixZeroDistill
from pix2pix_zero.nodes.pairs import Pix2PixZeroFolderPicture, Pix2PixZeroSavePair
from safetensors import safe_open
from safetensors.torch import load_file

SIDE = 32
WISH = {
    "dataset": "swap",
    "name": "swap",
    "size": "small",
    "steps": 60,
    "batch": 4,
    "crop": 256,
    "learning_rate": 2e-3,
    "seed": 0,
    "resume": True,
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """ComfyUI's folders in an empty place."""
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "upscale_models", ([str(tmp_path / "upscale")], {".safetensors"})
    )
    return tmp_path


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    """IMAGE [1, H, W, 3] of whole bytes, smooth enough to be learnt."""
    noise = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")
    return (smooth.movedim(1, -1) * 255).round() / 255


def swapped(image: torch.Tensor) -> torch.Tensor:
    """The edit that is learnt: red and blue change places."""
    return image.flip(-1)


def save(run_node, source, edited, **inputs) -> int:
    """As the executor calls a node over lists."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
    return run_node(Pix2PixZeroSavePair, source=[source], edited=[edited], dataset=["swap"], **lists)[0]


def fill(run_node, count: int = 50) -> None:
    sources = torch.cat([picture(seed) for seed in range(count)])
    assert save(run_node, sources, swapped(sources)) == count


def names(folder, kind: str) -> list[str]:
    return sorted(path.name for path in (folder / "output" / "pix2pix_zero" / "pairs" / "swap" / kind).iterdir())


def pixels(path) -> torch.Tensor:
    with Image.open(path) as file:
        return torch.from_numpy(np.array(file.convert("RGB"))).float()[None] / 255


class TestPictureOfAFolder:
    @pytest.fixture
    def folder(self, folders):
        place = folders / "input" / "cats"
        place.mkdir()
        for number, name in enumerate(("10.png", "2.png", "b.PNG", "a.webp")):
            Image.new("RGB", (8, 4), (number * 20, 0, 0)).save(place / name, lossless=True)
        (place / "notes.txt").write_text("no picture")
        (place / ".2.png.part.png").write_bytes(b"")
        return place

    def test_pictures_come_in_the_order_of_their_names_with_numbers_counted(self, folder, run_node):
        seen = [run_node(Pix2PixZeroFolderPicture, folder="cats", index=index) for index in range(4)]
        assert [name for _, name, _ in seen] == ["2", "10", "a", "b"]
        assert [count for _, _, count in seen] == [4] * 4
        assert [round(image[0, 0, 0, 0].item() * 255) for image, _, _ in seen] == [20, 0, 60, 40]
        assert seen[0][0].shape == (1, 4, 8, 3)

    def test_pictures_are_turned_upright_and_deep_ones_scaled(self, folder, run_node):
        turned = Image.new("RGB", (8, 4), (255, 0, 0))
        exif = turned.getexif()
        exif[0x0112] = 6  # turn by a quarter
        turned.save(folder / "0.png", exif=exif)
        assert run_node(Pix2PixZeroFolderPicture, folder="cats", index=0)[0].shape == (1, 8, 4, 3)
        Image.fromarray(np.full((4, 8), 51 * 257, np.uint16)).save(folder / "0.png")
        assert run_node(Pix2PixZeroFolderPicture, folder="cats", index=0)[0].unique().tolist() == pytest.approx([0.2])

    def test_the_run_past_the_last_picture_says_that_all_are_done(self, folder, run_node):
        with pytest.raises(ValueError, match="^index: 'cats' has 4 pictures, numbered 0 to 3"):
            run_node(Pix2PixZeroFolderPicture, folder="cats", index=4)

    @pytest.mark.parametrize("name", ["../output", "/", "cats/../..", "..\\output", "nothing"])
    def test_folders_outside_input_are_refused(self, name, folder, run_node):
        with pytest.raises(ValueError, match="^folder: "):
            run_node(Pix2PixZeroFolderPicture, folder=name, index=0)

    def test_a_link_that_leads_out_of_input_is_refused(self, folder, folders, run_node):
        (folders / "secret").mkdir()
        (folders / "input" / "link").symlink_to(folders / "secret")
        with pytest.raises(ValueError, match="^folder: 'link' is not inside"):
            run_node(Pix2PixZeroFolderPicture, folder="link", index=0)

    def test_a_broken_picture_and_an_empty_folder_are_named(self, folder, folders, run_node):
        (folder / "0.png").write_bytes(b"no picture")
        with pytest.raises(ValueError, match="^folder: 0.png in 'cats' cannot be read"):
            run_node(Pix2PixZeroFolderPicture, folder="cats", index=0)
        (folders / "input" / "empty").mkdir()
        with pytest.raises(ValueError, match="^folder: there is no picture in 'empty'"):
            run_node(Pix2PixZeroFolderPicture, folder="empty", index=0)

    def test_the_cache_notices_another_picture_in_its_place(self, folder):
        stamps = {Pix2PixZeroFolderPicture.fingerprint_inputs(folder="cats", index=index) for index in range(4)}
        assert len(stamps) == 4
        (folder / "1.png").write_bytes((folder / "2.png").read_bytes())
        assert Pix2PixZeroFolderPicture.fingerprint_inputs(folder="cats", index=0) not in stamps

    def test_the_widget_counts_up(self):
        index = Pix2PixZeroFolderPicture.INPUT_TYPES()["required"]["index"][1]
        assert json.loads(json.dumps(index["control_after_generate"])) == "increment"


class TestSaveEditPair:
    def test_pictures_area_and_caption_are_kept_as_they_were(self, folders, run_node):
        sources, area = torch.cat([picture(0), picture(1)]), torch.zeros(1, SIDE, SIDE)
        area[:, :8] = 1
        count = save(run_node, sources, swapped(sources), edited_area=area, caption="red\nblue", keep_background=False)
        assert count == 2
        base = folders / "output" / "pix2pix_zero" / "pairs" / "swap"
        assert names(folders, "source") == names(folders, "mask")
        for name in names(folders, "source"):
            source, edited = pixels(base / "source" / name), pixels(base / "edited" / name)
            assert torch.equal(edited, swapped(source)) and any(torch.equal(source[0], one) for one in sources)
            assert torch.equal(pixels(base / "mask" / name)[..., 0], area)
        captions = {path.read_text(encoding="utf-8").strip() for path in (base / "edited").glob("*.txt")}
        assert captions == {"red", "blue"}

    def test_outside_the_edited_area_the_source_is_kept(self, folders, run_node):
        area = torch.zeros(1, SIDE, SIDE)
        area[:, :8] = 1
        save(run_node, picture(0), swapped(picture(0)), edited_area=area)
        base = folders / "output" / "pix2pix_zero" / "pairs" / "swap"
        edited = pixels(next((base / "edited").glob("*.png")))
        assert torch.equal(edited[:, 8:], picture(0)[:, 8:])
        assert torch.equal(edited[:, :8], swapped(picture(0))[:, :8])

    def test_a_pair_saved_twice_is_one_pair_and_one_left_out_is_none(self, folders, run_node):
        assert [save(run_node, picture(0), swapped(picture(0))) for _ in range(2)] == [1, 1]
        assert save(run_node, picture(1), swapped(picture(1)), keep=False) == 1
        both = torch.cat([picture(2), picture(3)])
        assert save(run_node, both, swapped(both), keep=[False, True]) == 2

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({"edited": picture(1, 16, 16)}, "edited: picture 1 is 16x16, its source 32x32"),
            ({"edited": picture(1) * float("nan")}, "edited: it holds NaN"),
            ({"edited_area": [torch.zeros(3, SIDE, SIDE)]}, "edited_area: it brings 3 masks for 1"),
            ({"caption": ["one\ntwo"]}, "caption: it brings 2 lines for 1"),
            ({"keep": [True, False]}, "keep: it brings 2 values for 1"),
            ({"dataset": ["../outside"]}, "dataset: '../outside' cannot be a name"),
            ({"dataset": [" "]}, "dataset: it is empty"),
            ({"dataset": ["CON"]}, "dataset: Windows cannot"),
        ],
    )
    def test_what_does_not_pair_up_is_refused_and_nothing_is_written(self, inputs, message, folders, run_node):
        arguments = {"source": [picture(0)], "edited": [picture(1)], "dataset": ["swap"], **inputs}
        arguments = {name: value if isinstance(value, list) else [value] for name, value in arguments.items()}
        with pytest.raises(ValueError, match=f"^{message}"):
            run_node(Pix2PixZeroSavePair, **arguments)
        assert not list(folders.rglob("*.png"))

    def test_a_full_disk_is_told_and_leaves_no_half_pair(self, folders, run_node, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", full)
        with pytest.raises(ValueError, match="^dataset: .*No space left on device"):
            save(run_node, picture(0), swapped(picture(0)))
        assert not [path for path in folders.rglob("*") if path.suffix == ".png" or path.name.startswith(TEMPORARY)]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """One training of 60 steps, which several tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.mktemp("distilled")
        for name in ("input", "output"):
            (base / name).mkdir()
            patch.setattr(folder_paths, f"{name}_directory", str(base / name))
        folder = ([str(base / "upscale")], {".safetensors"})
        patch.setitem(folder_paths.folder_names_and_paths, "upscale_models", folder)
        sources = torch.cat([picture(seed) for seed in range(50)])
        pair_sets.save_pairs("swap", pair_sets.pair_up([sources], [swapped(sources)]), True)
        with torch.inference_mode():
            outputs = Pix2PixZeroDistill.execute(**{**WISH, "steps": 250, "description": "red to blue"})
        yield base, outputs.result


class TestDistillEdit:
    def test_the_student_has_learnt_the_edit_on_pictures_it_has_not_seen(self, distilled):
        _, (model, _, report, losses) = distilled
        source = picture(1000)
        with torch.inference_mode():
            (edited,) = ImageUpscaleWithModel.execute(model, source).result
        unchanged = (source - swapped(source)).abs().mean()
        assert (edited - swapped(source)).abs().mean() < 0.35 * unchanged
        assert losses["loss"][-1] < 0.5 * losses["loss"][0] and len(losses["loss"]) == 25
        assert report.startswith("swap: error inside the edited area ") and "Warning: 50 pairs are few. 300" in report

    def test_the_stock_nodes_load_the_file_and_apply_it_as_the_student_is(self, distilled, monkeypatch):
        base, _ = distilled
        folder = ([str(base / "upscale")], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "upscale_models", folder)
        assert folder_paths.get_filename_list("upscale_models") == ["pix2pix_zero/swap_00001.safetensors"]
        (model,) = UpscaleModelLoader.execute("pix2pix_zero/swap_00001.safetensors").result
        source = picture(7, 44, 60)  # of no size that it was trained on, nor a multiple of 8
        with torch.inference_mode():
            (edited,) = ImageUpscaleWithModel.execute(model, source).result
            own = load_student(base / "upscale" / "pix2pix_zero" / "swap_00001.safetensors")(source.movedim(-1, 1))
        assert edited.shape == source.shape
        torch.testing.assert_close(edited, own.clamp(0, 1).movedim(1, -1), atol=1e-5, rtol=0)
        assert (edited - source).abs().mean() > 0.02

    def test_the_file_is_small_half_precision_and_says_what_it_is(self, distilled):
        base, _ = distilled
        path = base / "upscale" / "pix2pix_zero" / "swap_00001.safetensors"
        assert path.stat().st_size < 1.5e6
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
        with safe_open(path, "pt") as file:
            facts = file.metadata()
        assert facts["description"] == "red to blue" and facts["sharpness"] == "0.0"
        assert facts["dataset"] == "swap" and facts["pairs"] == "50" and facts["pictures"] == "32x32"
        assert json.loads(facts["agreement"])["inside"] > 0

    def test_the_strip_shows_held_out_pairs_with_the_worst_framed_first(self, distilled):
        _, (_, strip, _, _) = distilled
        red = (strip[0] - torch.tensor([0.85, 0.1, 0.1])).abs().amax(-1) < 0.05
        rows = red.any(1).nonzero()
        assert strip.ndim == 4 and strip.shape[0] == 1
        assert red.float().mean() > 0.005 and rows.max() < strip.shape[1] / 2
        columns = red.any(0).nonzero()
        assert columns.min() > 0.6 * strip.shape[2]  # the third picture: the student's

    def test_nothing_is_left_of_a_finished_training(self, distilled):
        base, _ = distilled
        assert not list((base / "output").rglob("*.safetensors")) and not list(base.rglob(f"{TEMPORARY}*"))

    def test_cancelled_and_resumed_it_ends_where_a_whole_training_does(self, folders, run_node, monkeypatch):
        fill(run_node)
        run_node(Pix2PixZeroDistill, **WISH)
        calls = []

        def interrupt():
            calls.append(None)
            if len(calls) == 23:
                raise comfy.model_management.InterruptProcessingException

        with monkeypatch.context() as patch:
            patch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                run_node(Pix2PixZeroDistill, **WISH)
        assert len(list((folders / "output" / "pix2pix_zero" / "training").iterdir())) == 1
        with pytest.raises(ValueError, match="^resume: .* had batch 4. Set that back"):
            run_node(Pix2PixZeroDistill, **{**WISH, "batch": 2})
        run_node(Pix2PixZeroDistill, **WISH)
        whole, resumed = (
            load_file(folders / "upscale" / "pix2pix_zero" / f"swap_0000{number}.safetensors") for number in (1, 2)
        )
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())

    def test_a_damaged_state_is_named_and_dropped_when_resume_is_off(self, folders, run_node):
        fill(run_node)
        path = folders / "output" / "pix2pix_zero" / "training" / "swap_swap_small.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"damaged")
        with pytest.raises(ValueError, match="^resume: .*damaged"):
            run_node(Pix2PixZeroDistill, **WISH)
        run_node(Pix2PixZeroDistill, **{**WISH, "steps": 20, "resume": False})
        assert not path.exists()

    def test_the_vae_gives_features_and_stays_as_it_was(self, folders, run_node):
        from pix2pix_zero.demo_model.loader import load_demo_model

        fill(run_node)
        vae = load_demo_model()[2]
        before = {name: value.clone() for name, value in vae.first_stage_model.state_dict().items()}
        run_node(Pix2PixZeroDistill, **{**WISH, "name": "plain", "steps": 20})
        run_node(Pix2PixZeroDistill, **{**WISH, "name": "features", "steps": 20}, vae=vae)
        after = vae.first_stage_model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        plain, with_features = (
            load_file(folders / "upscale" / "pix2pix_zero" / f"{name}_00001.safetensors")
            for name in ("plain", "features")
        )
        assert any(not torch.equal(value, with_features[name]) for name, value in plain.items())
        with pytest.raises(ValueError, match="^vae: it is a object and no VAE"):
            run_node(Pix2PixZeroDistill, **{**WISH, "name": "none"}, vae=object())

    def test_pairs_larger_than_the_crop_are_cut(self, folders, run_node):
        sources = torch.cat([picture(seed, 44, 60) for seed in range(50)])
        save(run_node, sources, swapped(sources))
        run_node(Pix2PixZeroDistill, **{**WISH, "steps": 20, "crop": 32})

    def test_too_few_pairs_and_sets_that_do_not_exist_are_refused(self, folders, run_node):
        with pytest.raises(ValueError, match="^dataset: there is no 'swap'; there is none yet"):
            run_node(Pix2PixZeroDistill, **WISH)
        fill(run_node, 49)
        with pytest.raises(ValueError, match="^dataset: 'swap' has 49 pairs. At least 50"):
            run_node(Pix2PixZeroDistill, **WISH)
        with pytest.raises(ValueError, match="^dataset: there is no 'other'; there are swap"):
            run_node(Pix2PixZeroDistill, **{**WISH, "dataset": "other"})
        with pytest.raises(ValueError, match="^name: '../x' cannot be a name"):
            run_node(Pix2PixZeroDistill, **{**WISH, "name": "../x"})

    def test_damaged_and_unequal_pairs_are_named(self, folders, run_node):
        fill(run_node)
        source = folders / "output" / "pix2pix_zero" / "pairs" / "swap" / "source"
        first = sorted(source.iterdir())[0]
        whole = first.read_bytes()
        first.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"^dataset: .*{first.name}"):
            run_node(Pix2PixZeroDistill, **WISH)
        Image.new("RGB", (16, 16)).save(first)
        with pytest.raises(ValueError, match=f"^dataset: .*pair {first.stem} has unequal pictures, 16x16 and 32x32"):
            run_node(Pix2PixZeroDistill, **WISH)

    def test_a_full_disk_keeps_the_training(self, folders, run_node, monkeypatch):
        fill(run_node)

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(writing, "write_whole", full)
            with pytest.raises(ValueError, match="^name: .*No space left on device.*the training is kept"):
                run_node(Pix2PixZeroDistill, **{**WISH, "steps": 20})
        assert not [path for path in (folders / "upscale").rglob("*") if path.is_file()]
        run_node(Pix2PixZeroDistill, **{**WISH, "steps": 20})
        assert [path.name for path in (folders / "upscale").rglob("*.safetensors")] == ["swap_00001.safetensors"]


class TestSizes:
    @pytest.mark.parametrize("size", ["small", "large"])
    def test_a_student_begins_as_the_identity_at_any_size_and_loads_as_what_it_is(self, tmp_path, size):
        student, pictures = make_student(size), torch.rand(1, 3, 44, 60)
        with torch.no_grad():
            torch.testing.assert_close(student(pictures), pictures, atol=1e-6, rtol=0)
            for parameter in student.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
            own = student(pictures)
        save_student(student, tmp_path / "student.safetensors", {})
        with torch.no_grad():
            loaded = load_student(tmp_path / "student.safetensors")(pictures)
        torch.testing.assert_close(loaded, own.clamp(0, 1), atol=2e-2, rtol=0)  # the file is in half precision

    def test_large_learns(self):
        pair, student = (picture(0), swapped(picture(0))), make_student("large")
        settings = Settings(steps=4, batch=2, learning_rate=1e-3)
        run = Training(student, as_pairs([pair, pair]), settings)
        before = run.held_out_error()
        run.run()
        assert run.held_out_error() != before


def as_pairs(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Pairs:
    """Pairs in memory of IMAGEs [1, H, W, 3]."""
    sources, edited = (torch.cat(column).movedim(-1, 1).mul(255).byte() for column in zip(*pairs))
    areas = torch.full((len(pairs), 1, *sources.shape[-2:]), 255, dtype=torch.uint8)
    return Pairs([str(number) for number in range(len(pairs))], sources, edited, areas)


def test_a_student_that_ships_is_loaded_by_its_edit(tmp_path, monkeypatch, run_node):
    save_student(make_student(), tmp_path / "cat2dog.safetensors", {})
    monkeypatch.setattr(demo_students, "FOLDER", tmp_path)
    (model,) = run_node(Pix2PixZeroDemoDistilled, edit="cat2dog")
    with torch.inference_mode():
        (same,) = ImageUpscaleWithModel.execute(model, picture(0)).result
    torch.testing.assert_close(same, picture(0), atol=2e-3, rtol=0)  # it was not trained
    with pytest.raises(ValueError, match="^edit: there is no '../x'. Choose one of cat2dog"):
        run_node(Pix2PixZeroDemoDistilled, edit="../x")


def test_the_defaults_of_the_node_are_those_that_a_student_needs():
    inputs = {item.id: item for item in Pix2PixZeroDistill.GET_SCHEMA().inputs}
    assert inputs["learning_rate"].default == Settings().learning_rate
    assert inputs["resume"].default is True


def test_the_public_contract():
    expected = {
        "Pix2PixZeroFolderPicture": (["folder", "index"], ["IMAGE", "STRING", "INT"]),
        "Pix2PixZeroSavePair": (
            ["source", "edited", "edited_area", "caption", "dataset", "keep", "keep_background"],
            ["INT", "STRING"],
        ),
        "Pix2PixZeroDistill": (
            [*WISH, "vae", "sharpness", "description"],
            ["UPSCALE_MODEL", "IMAGE", "STRING", "LOSS_MAP"],
        ),
    }
    for node in (Pix2PixZeroFolderPicture, Pix2PixZeroSavePair, Pix2PixZeroDistill):
        schema = node.GET_SCHEMA()
        inputs, outputs = expected[schema.node_id]
        assert [i.id for i in schema.inputs] == inputs
        assert [o.io_type for o in schema.outputs] == outputs
