"""Small workflows for the tests of `cluster`, which no server runs."""

import json
from pathlib import Path

SOURCE = {"class_type": "LoadImage", "inputs": {"image": "a.png"}, "_meta": {"title": "Source"}}
BLUR = {"class_type": "ImageBlur", "inputs": {"image": ["1", 0], "sigma": 1.5}, "_meta": {"title": "soft"}}
SAVE = {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}}
PAIR = {"class_type": "Pix2PixZeroSavePair", "inputs": {"source": ["1", 0], "edited": ["2", 0], "dataset": "mine"}}
EDIT = {"1": SOURCE, "2": BLUR, "3": SAVE}


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "w.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(**inputs: object) -> dict:
    """The workflow with other inputs of its edit."""
    return {**EDIT, "2": {**BLUR, "inputs": {**BLUR["inputs"], **inputs}}}


def names(folder: Path) -> list[str]:
    """The files in a folder and below, but for its lock."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    )
