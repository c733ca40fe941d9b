"""The students that ship with the demo model."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..networks.model_kinds import children
from ..networks.students import upscale_model

if TYPE_CHECKING:  # see host/networks/students.py
    from spandrel import ModelDescriptor

FOLDER = Path(__file__).parents[2] / "demo_model" / "distilled"


def demo_student_names() -> list[str]:
    """The edits that were distilled, such as cat2dog."""
    return sorted(path.stem for path in children(FOLDER) if path.suffix == ".safetensors")


def demo_student(edit: str) -> "ModelDescriptor":
    """The UPSCALE_MODEL of an edit. Raises ValueError if none of that name ships."""
    if edit not in demo_student_names():
        raise ValueError(f"edit: there is no {edit!r}. Choose one of {', '.join(demo_student_names())}.")
    return upscale_model(FOLDER / f"{edit}.safetensors")
