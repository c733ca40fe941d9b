"""The folder of results of `cluster`: what is there is whole, and done."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from cluster_workflows import changed, names, written
from PIL import Image
from pix2pix_zero.cluster.results import Results
from pix2pix_zero.cluster.workflow import ClusterError, read_workflow
from pix2pix_zero.editing import writing
from pix2pix_zero.editing.writing import TEMPORARY


def test_pictures_are_kept_under_their_name_and_key_and_known_again(tmp_path, workflow):
    out, key = tmp_path / "out", workflow.key(b"p")
    with Results(out, workflow) as results:
        assert key not in results
        results.commit(key, Path("my-cat.jpg"), [{"edited": b"1"}, {"edited": b"2"}])
        assert key in results
    first = f"my-cat-{key[:16]}.png"
    assert names(out) == ["manifest.json", first, f"my-cat-{key[:16]}_2.png"]
    assert (out / first).read_bytes() == b"1"
    with Results(out, workflow) as results:
        assert key in results and workflow.key(b"q") not in results


def test_pairs_are_kept_in_the_layout_of_save_edit_pair(tmp_path, pairs_workflow):
    from pix2pix_zero.distillation.pairs import PairFolder

    out, key = tmp_path / "out", pairs_workflow.key(b"p")
    png = (tmp_path / "x.png").as_posix()
    Image.new("RGB", (4, 4)).save(png)
    content = Path(png).read_bytes()
    with Results(out, pairs_workflow) as results:
        results.commit(
            key, Path("a.png"), [{"source": content, "edited": content, "mask": content, "caption": b"dog\n"}]
        )
    assert PairFolder(out).keys() == [key] and len(PairFolder(out).read()) == 1
    assert names(out) == sorted(
        ["manifest.json", f"edited/{key}.txt", *(f"{kind}/{key}.png" for kind in ("edited", "mask", "source"))]
    )
    with Results(out, pairs_workflow) as results:
        assert key in results


def test_half_a_pair_is_not_there_and_what_a_killed_run_left_goes(tmp_path, pairs_workflow):
    out, key = tmp_path / "out", pairs_workflow.key(b"p")
    with Results(out, pairs_workflow):
        (out / "source" / f"{key}.png").write_bytes(b"1")
        (out / "edited" / f"{TEMPORARY}1").write_bytes(b"1")
    with Results(out, pairs_workflow) as results:
        assert key not in results
    assert not list(out.rglob(f"{TEMPORARY}*"))


def test_another_workflow_is_refused_and_changes_nothing(tmp_path, workflow):
    out = tmp_path / "out"
    with Results(out, workflow) as results:
        results.fail("k", Path("a.png"), ["w"])
    before = names(out)
    with (
        pytest.raises(ClusterError, match="made by another workflow"),
        Results(out, read_workflow(written(tmp_path, changed(sigma=2)))),
    ):
        pass
    assert names(out) == before
    (out / "manifest.json").write_text("{")
    with pytest.raises(ClusterError, match="made by another workflow"), Results(out, workflow):
        pass


def test_a_folder_of_other_pictures_is_refused(tmp_path, workflow):
    (tmp_path / "mine.png").touch()
    with pytest.raises(ClusterError, match="already holds pictures"), Results(tmp_path, workflow):
        pass


def test_two_runs_into_one_folder_are_refused_until_the_first_has_ended(tmp_path, workflow):
    out = tmp_path / "out"
    with Results(out, workflow):
        with pytest.raises(ClusterError, match="another run writes"), Results(out, workflow):
            pass
    with Results(out, workflow):
        pass


def test_a_full_disk_leaves_nothing_half_written_and_the_next_run_goes_on(tmp_path, pairs_workflow, monkeypatch):
    out, key = tmp_path / "out", pairs_workflow.key(b"p")
    pair = {"source": b"s", "edited": b"e", "mask": b"m"}

    def full(source, target):
        if Path(target).parent.name == "edited":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.rename(source, target)

    with Results(out, pairs_workflow) as results:
        with (
            monkeypatch.context() as patch,
            pytest.raises(ClusterError, match="No space left on device.*Nothing is half-written"),
        ):
            patch.setattr(writing.os, "replace", full)
            results.commit(key, Path("a.png"), [pair])
        assert key not in results
    assert not list(out.rglob(f"{TEMPORARY}*")) and not list((out / "edited").iterdir())
    with Results(out, pairs_workflow) as results:
        assert key not in results
        results.commit(key, Path("a.png"), [pair])
        assert key in results


def test_what_failed_is_listed_and_forgotten_by_the_next_run(tmp_path, workflow):
    out = tmp_path / "out"
    with Results(out, workflow) as results:
        results.fail("k", Path("a.png"), ["one", "two", "drei ä"])
    assert json.loads((out / "failed.jsonl").read_text("utf-8")) == {
        "picture": "a.png",
        "key": "k",
        "words": ["one", "two", "drei ä"],
    }
    with Results(out, workflow):
        assert not (out / "failed.jsonl").exists()


def test_what_was_left_out_is_not_made_again_even_if_the_last_line_was_cut_off(tmp_path, pairs_workflow):
    out, keys = tmp_path / "out", [pairs_workflow.key(content) for content in (b"p", b"q")]
    with Results(out, pairs_workflow) as results:
        for key in keys:
            results.commit(key, Path("a.png"), [])
    path = out / "left_out.jsonl"
    path.write_text(path.read_text()[:-9])
    with Results(out, pairs_workflow) as results:
        assert keys[0] in results and keys[1] not in results
        results.commit(keys[1], Path("a.png"), [])
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == keys
