"""The state of a training run in one safetensors file, so that no pickle is ever read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..editing.writing import clear_leftovers, write_whole

if TYPE_CHECKING:
    from .learning import Training

FIXED = ("batch", "crop", "learning_rate", "sharpness", "seed")  # settings that a run keeps when it is resumed


def checkpoint_settings(path: Path) -> dict[str, object]:
    """What a saved run was made with: those of `FIXED`, and as `features` the name of what gave them, "" for none."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["state"]).get("settings", {})


def feature_name(features: object) -> str:
    """What gives a run its features, "" for nothing."""
    return "" if features is None else getattr(features, "name", "other features")


def write_checkpoint(path: Path, run: Training) -> None:
    """Write everything that the next step depends on, by renaming."""
    tensors: dict[str, Tensor] = {"generator": run.generator.get_state()}
    for name, module in run.networks().items():
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    for number, optimizer in enumerate(run.all_optimizers()):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer{number}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    numbers = {"step": run.step, "seconds": run.seconds, "loss": run.loss, "losses": run.losses}
    numbers["scaler"] = run._scaler.state_dict()
    numbers["settings"] = {name: getattr(run.settings, name) for name in FIXED} | {
        "features": feature_name(run.features)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent)
    write_whole(path, save(tensors, {"state": json.dumps(numbers)}))


def read_checkpoint(path: Path, run: Training) -> None:
    """Put a run where the saved one was. Raises ValueError if the file belongs to another network."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        numbers = json.loads(file.metadata()["state"])

    def part(name: str) -> dict[str, Tensor]:
        return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}

    try:
        for name, module in run.networks().items():
            module.load_state_dict(part(name))
    except RuntimeError as failure:
        raise ValueError(f"{path}: it was made by training of another size. Delete it to begin anew.") from failure
    for number, optimizer in enumerate(run.all_optimizers()):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part(f"optimizer{number}").items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    run.generator.set_state(tensors["generator"])
    run.step, run.seconds, run.loss = numbers["step"], numbers["seconds"], numbers["loss"]
    run.losses = numbers["losses"]
    run._scaler.load_state_dict(numbers["scaler"])
