"""The nodes that walk a folder and keep pairs, as the executor runs them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pair_runs import SIDE, names, picture, pixels, save, swapped
from PIL import Image
from pix2pix_zero.editing.writing import TEMPORARY
from pix2pix_zero.nodes.pairs import Pix2PixZeroFolderPicture, Pix2PixZeroSavePair


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
