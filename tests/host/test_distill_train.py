"""Training outside of ComfyUI, in one process and in two that torchrun starts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pix2pix_zero.distillation.pairs import PairFolder
from pix2pix_zero.host.distilled.learn import main
from safetensors import safe_open
from safetensors.torch import load_file

PROGRAM = Path(__file__).resolve().parents[2] / "host" / "distilled" / "learn.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Black and white pictures and their inverse: every pixel counts alike, in a share of a batch as in all of it."""
    folder = PairFolder(tmp_path_factory.mktemp("pairs"))
    folder.begin()
    generator = np.random.default_rng(0)
    for number in range(50):
        picture = torch.from_numpy(generator.integers(0, 2, (4, 4, 1))).float()
        picture = picture.repeat_interleave(8, 0).repeat_interleave(8, 1).expand(-1, -1, 3)
        folder.write(f"{number:02}", picture, 1 - picture)
    return folder.folder


@pytest.fixture(scope="module")
def train(pairs, quick_environment) -> Callable:
    """`train(out, *options, processes)`: run the program, in two processes of torchrun's or in one."""
    python = str(quick_environment.python)

    def run(out: Path, *options: str, processes: bool = False) -> None:
        command = [python, *(TORCHRUN if processes else []), str(PROGRAM), "--pairs", str(pairs), "--out", str(out)]
        command += ["--device", "cpu", "--batch", "4", *options]
        variables = quick_environment.variables(PYTHON_EXEC=python)  # what torchrun starts them with
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(done.stderr)

    return run


def train_here(pairs: Path, out: Path, *options: str) -> None:
    """The program without a process of its own."""
    main(["--pairs", str(pairs), "--out", str(out), "--device", "cpu", "--batch", "4", *options])


def test_two_processes_learn_what_one_does(train, tmp_path):
    alone, together = tmp_path / "alone.safetensors", tmp_path / "together.safetensors"
    train(alone, "--steps", "12", "--description", "inverts")
    train(together, "--steps", "12", processes=True)
    found, expected = load_file(together), load_file(alone)
    moved = max(float((value - other).abs().max()) for value, other in zip(expected.values(), found.values()))
    assert moved < 2e-3  # of half precision and the order of sums
    with safe_open(alone, "pt") as file:
        facts = file.metadata()
    assert facts["description"] == "inverts" and facts["pairs"] == "50" and facts["steps"] == "12"
    assert json.loads(facts["agreement"])["inside"] > 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 2 + [".training"] * 2


def test_with_more_steps_it_goes_on_where_it_ended(pairs, tmp_path):
    file = tmp_path / "resumed.safetensors"
    for steps in (1, 3):
        train_here(pairs, file, "--steps", str(steps))
    with safe_open(file.with_suffix(".training"), "pt") as state:
        found = json.loads(state.metadata()["state"])
    assert found["step"] == 3 and len(found["losses"]) == 1  # noted every tenth step, from the first on


def test_what_does_not_do_is_said_in_words(pairs, tmp_path):
    with pytest.raises(SystemExit, match="there are no pairs in it"):
        train_here(tmp_path / "none", tmp_path / "student.safetensors")
    assert not (tmp_path / "student.safetensors").exists()
