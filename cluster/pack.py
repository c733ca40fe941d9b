"""`python cluster pack`: a data set of *Save Edit Pair* as other trainers read it."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..distillation.held_out import is_held_out
from .workflow import ClusterError

PAIRS_A_SHARD = 1000


@dataclass(frozen=True)
class Pair:
    """The files of a pair, and its caption."""

    key: str
    source: Path
    edited: Path
    mask: Path | None
    caption: str


def pack(folder: Path, out: Path, format: str, caption: str = "") -> int:
    """Write a data set to a new folder, all of it or nothing. `format`: of `FORMATS`; `caption`: for pairs without one.

    Raises ClusterError: there are no pairs, a caption is needed and missing, the folder exists or cannot be written.
    """
    pairs = _pairs(folder, caption)
    if out.exists():
        raise ClusterError(f"--out: {out} exists already. Name a new folder, or delete this one.")
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        part.mkdir(parents=True)
        FORMATS[format](pairs, part)
        part.rename(out)
    except OSError as failure:
        raise ClusterError(
            f"--out: {out} cannot be written ({failure.strerror or failure}). Make room and try again."
        ) from failure
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{len(pairs)} pairs in {out}")
    return 0


def _pairs(folder: Path, caption: str) -> list[Pair]:
    pairs = []
    for edited in sorted((folder / "edited").glob("*.png")):
        source, mask, text = (
            folder / "source" / edited.name,
            folder / "mask" / edited.name,
            edited.with_suffix(".txt"),
        )
        if source.is_file() and not edited.name.startswith("."):
            words = text.read_text(encoding="utf-8").strip() if text.is_file() else caption
            pairs.append(Pair(edited.stem, source, edited, mask if mask.is_file() else None, words))
    if not pairs:
        raise ClusterError(
            f"--pairs: there are no pairs in {folder}. Make them with Save Edit Pair or `cluster pairs`."
        )
    return pairs


def _webdataset(pairs: list[Pair], out: Path) -> None:
    """Tar files of samples KEY.source.png, KEY.edited.png, KEY.mask.png and KEY.txt."""
    for number in range(0, len(pairs), PAIRS_A_SHARD):
        with tarfile.open(out / f"pairs-{number // PAIRS_A_SHARD:06d}.tar", "w") as tar:
            for pair in pairs[number : number + PAIRS_A_SHARD]:
                files = {"source.png": pair.source, "edited.png": pair.edited, "mask.png": pair.mask}
                for name, path in files.items():
                    if path:
                        _add(tar, f"{pair.key}.{name}", path.read_bytes())
                if pair.caption:
                    _add(tar, f"{pair.key}.txt", pair.caption.encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without a time or an owner: the same pairs give the same file
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _img2img_turbo(pairs: list[Pair], out: Path) -> None:
    """Folders A and B and captions, for training and, the tenth that Distill Edit holds out too, for testing."""
    lacking = sum(not pair.caption for pair in pairs)
    if lacking:
        raise ClusterError(
            f"--caption: {lacking} pairs have no caption, and img2img-turbo needs one. Give one for them."
        )
    held_out = [pair for pair in pairs if is_held_out(pair.key)] or pairs[:1]
    for split, chosen in (("train", [pair for pair in pairs if pair not in held_out] or pairs), ("test", held_out)):
        for name, path in (("A", "source"), ("B", "edited")):
            (out / f"{split}_{name}").mkdir()
            for pair in chosen:
                shutil.copyfile(getattr(pair, path), out / f"{split}_{name}" / f"{pair.key}.png")
        captions = {f"{pair.key}.png": pair.caption for pair in chosen}
        (out / f"{split}_prompts.json").write_text(json.dumps(captions, indent=1), encoding="utf-8")


FORMATS: dict[str, Callable[[list[Pair], Path], None]] = {"webdataset": _webdataset, "img2img-turbo": _img2img_turbo}
