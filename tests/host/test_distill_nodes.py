"""The nodes that distil an edit, as the executor runs them."""

from __future__ import annotations

import json

import comfy.model_management
import folder_paths
import pytest
import torch
from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel, UpscaleModelLoader
from pair_runs import fill, picture, save, swapped
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

PAIRS = 50
WISH = {
    "dataset": "swap",
    "name": "swap",
    "size": "small",
    "steps": 6,
    "batch": 4,
    "crop": 256,
    "learning_rate": 2e-3,
    "seed": 0,
    "resume": True,
}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """One training of 100 steps, which several tests look at."""
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
            outputs = Pix2PixZeroDistill.execute(**{**WISH, "steps": 100, "description": "red to blue"})
        yield base, outputs.result


class TestDistillEdit:
    def test_the_student_has_learnt_the_edit_on_pictures_it_has_not_seen(self, distilled):
        _, (model, _, report, losses) = distilled
        source = picture(1000)
        with torch.inference_mode():
            (edited,) = ImageUpscaleWithModel.execute(model, source).result
        unchanged = (source - swapped(source)).abs().mean()
        assert (edited - swapped(source)).abs().mean() < 0.35 * unchanged
        assert losses["loss"][-1] < 0.5 * losses["loss"][0] and len(losses["loss"]) == 10
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
            if len(calls) == PAIRS + 400:  # it looks before each pair that is read, too, and at each layer of a step
                raise comfy.model_management.InterruptProcessingException

        with monkeypatch.context() as patch:
            patch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                run_node(Pix2PixZeroDistill, **WISH)
        (kept,) = (folders / "output" / "pix2pix_zero" / "training").iterdir()
        with safe_open(kept, "pt") as file:
            assert 0 < json.loads(file.metadata()["state"])["step"] < WISH["steps"]
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
        run_node(Pix2PixZeroDistill, **{**WISH, "resume": False})
        assert not path.exists()

    def test_the_vae_gives_features_and_stays_as_it_was(self, folders, run_node):
        from pix2pix_zero.demo_model.loader import load_demo_model

        fill(run_node)
        vae = load_demo_model()[2]
        before = {name: value.clone() for name, value in vae.first_stage_model.state_dict().items()}
        run_node(Pix2PixZeroDistill, **{**WISH, "name": "plain"})
        run_node(Pix2PixZeroDistill, **{**WISH, "name": "features"}, vae=vae)
        after = vae.first_stage_model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        plain, with_features = (
            load_file(folders / "upscale" / "pix2pix_zero" / f"{name}_00001.safetensors")
            for name in ("plain", "features")
        )
        assert any(not torch.equal(value, with_features[name]) for name, value in plain.items())
        with pytest.raises(ValueError, match="^vae: it is a object and no VAE"):
            run_node(Pix2PixZeroDistill, **{**WISH, "name": "none"}, vae=object())

    def test_the_model_gives_features_too_and_stays_as_it_was(self, folders, run_node):
        from pix2pix_zero.demo_model.loader import load_demo_model

        fill(run_node)
        model, _, vae = load_demo_model()
        before = {name: value.clone() for name, value in model.model.state_dict().items()}
        options = repr(model.model_options)
        for name, more in (("vae", {}), ("both", {"model": model})):
            run_node(Pix2PixZeroDistill, **{**WISH, "name": name}, vae=vae, **more)
        assert repr(model.model_options) == options
        assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
        paths = [folders / "upscale" / "pix2pix_zero" / f"{name}_00001.safetensors" for name in ("vae", "both")]
        by_vae, by_both = map(load_file, paths)
        assert any(not torch.equal(value, by_both[name]) for name, value in by_vae.items())
        with safe_open(paths[1], "pt") as file:
            assert file.metadata()["features"] == "a vae and a model"
        with pytest.raises(ValueError, match="^vae: the model needs it"):
            run_node(Pix2PixZeroDistill, **WISH, model=model)

    def test_pairs_larger_than_the_crop_are_cut(self, folders, run_node):
        sources = torch.cat([picture(seed, 44, 60) for seed in range(50)])
        save(run_node, sources, swapped(sources))
        run_node(Pix2PixZeroDistill, **{**WISH, "crop": 32})

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
            patch.setattr(writing, "_name_anew", full)
            with pytest.raises(ValueError, match="^name: .*No space left on device.*the training is kept"):
                run_node(Pix2PixZeroDistill, **WISH)
        assert not [path for path in (folders / "upscale").rglob("*") if path.is_file()]
        run_node(Pix2PixZeroDistill, **WISH)
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

    def test_the_last_blocks_of_a_small_student_see_the_picture_at_the_beginning(self):
        network, pictures = make_student().network, torch.rand(1, 3, 24, 40)
        up, carried = network.m_up1[0], 12
        with torch.no_grad():
            up.weight[carried:] = 0
            half_size = network.m_down1(
                network.m_head(torch.nn.functional.pad(pictures, (0, 0, 0, 0, 0, 1), value=15 / 255))
            )
            assert half_size.shape == (1, 32, 12, 20)
            returned = network.m_up2(torch.rand(1, 40, 6, 10))
            assert (
                returned.abs().amax((0, 2, 3))[:carried].eq(0).all()
                and returned.abs().amax((0, 2, 3))[carried:].gt(0).all()
            )
            torch.testing.assert_close(up(half_size)[:, 3:6], pictures, atol=0, rtol=0)

    def test_large_learns(self):
        pair, student = (picture(0), swapped(picture(0))), make_student("large")
        settings = Settings(steps=1, batch=2, learning_rate=1e-3)
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


@pytest.mark.parametrize("edit", demo_students.demo_student_names())
def test_the_files_that_ship_say_what_they_are_and_how_near_they_come_to_their_teacher(edit):
    path = demo_students.FOLDER / f"{edit}.safetensors"
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}
    assert path.stat().st_size <= 1.5e6
    assert facts["source"] and facts["target"] and facts["teacher"] and facts["size"] == "128"
    agreement = json.loads(facts["agreement"])
    assert int(facts["pairs"]) >= 1000
    assert 0 < agreement["inside"] < 0.5 * agreement["source_inside"] and agreement["hit"] > 0.9


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
            [*WISH, "vae", "sharpness", "description", "model"],
            ["UPSCALE_MODEL", "IMAGE", "STRING", "LOSS_MAP"],
        ),
    }
    for node in (Pix2PixZeroFolderPicture, Pix2PixZeroSavePair, Pix2PixZeroDistill):
        schema = node.GET_SCHEMA()
        inputs, outputs = expected[schema.node_id]
        assert [i.id for i in schema.inputs] == inputs
        assert [o.io_type for o in schema.outputs] == outputs
