"""Muon for weight matrices, AdamW for the rest, and data parallelism over single-thread processes."""

import copy
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...distillation.optimizer import orthogonalize


class Muon:
    """Momentum on matrices, orthogonalized; with several ranks each one does its share and the rest is exchanged."""

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        self.parameters, self.momentum, self.weight_decay = parameters, momentum, weight_decay
        self.buffers = [torch.zeros_like(p) for p in parameters]
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        load = [0] * self.world
        self.owner = [0] * len(parameters)
        by_cost = sorted(range(len(parameters)), key=lambda k: -self._cost(parameters[k]))
        for k in by_cost:
            self.owner[k] = load.index(min(load))
            load[self.owner[k]] += self._cost(parameters[k])

    @staticmethod
    def _cost(parameter: Tensor) -> int:
        rows, columns = parameter.flatten(1).shape
        return min(rows, columns) ** 2 * max(rows, columns)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        updates = []
        for p, buffer, owner in zip(self.parameters, self.buffers, self.owner):
            buffer.lerp_(p.grad, 1 - self.momentum)
            if owner == self.rank:
                matrix = p.grad.lerp(buffer, self.momentum).flatten(1)
                rows, columns = matrix.shape
                updates.append(orthogonalize(matrix) * max(1.0, rows / columns) ** 0.5)
            else:
                updates.append(torch.zeros_like(p).flatten(1))
        if self.world > 1:
            flat = torch.cat([u.flatten() for u in updates])
            dist.all_reduce(flat)
            updates = flat.split([p.numel() for p in self.parameters])
        for p, update in zip(self.parameters, updates):
            p.mul_(1 - lr * self.weight_decay).sub_(update.view_as(p), alpha=lr)


def cosine(progress: float) -> float:
    """Part of the learning rates left after `progress` (0..1) of a run: half a wave, from 1 to 0.02."""
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def cooled(progress: float, cooling: float = 0.5) -> float:
    """The same for a run whose length may change on the way: 1, then straight to 0 in the last part, `cooling`."""
    return min(1.0, max(0.0, 1 - progress) / cooling)


class Trainer:
    """Steps a set of modules: gradient averaging over ranks, clipping, warm-up and schedule of rates, running average.

    Matrices whose name holds one of `keep_adam` (embeddings, output layers) are left to AdamW. `schedule` may be replaced.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        matrix_lr: float,
        other_lr: float,
        ema_decay: float,
        keep_adam: tuple[str, ...] = ("embed",),
        warmup: int = 60,
    ) -> None:
        self.modules, self.warmup = modules, warmup
        self.schedule: Callable[[float], float] = cosine
        self.matrix_lr, self.other_lr, self.ema_decay = matrix_lr, other_lr, ema_decay
        self.ema = {k: copy.deepcopy(m).eval().requires_grad_(False) for k, m in modules.items()}
        named = [(n, p) for m in modules.values() for n, p in m.named_parameters() if p.requires_grad]
        is_matrix = [p.ndim >= 2 and not any(k in n for k in keep_adam) for n, p in named]
        matrices = [p for (_, p), m in zip(named, is_matrix) if m]
        others = [p for (_, p), m in zip(named, is_matrix) if not m]
        self.parameters = matrices + others
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(others, other_lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.count = 0

    def step(self, loss: Tensor, progress: float) -> None:
        """One update; `progress` in 0..1 is the share of the budget already used and sets the learning rate."""
        for p in self.parameters:
            p.grad = None
        loss.backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([g.flatten() for g in grads])
        if self.world > 1:
            dist.all_reduce(flat)
            flat /= self.world
        flat *= min(1.0, 1.0 / (flat.norm().item() + 1e-6))
        for p, g in zip(self.parameters, flat.split([p.numel() for p in self.parameters])):
            p.grad = g.view_as(p)
        rate = min(1.0, (self.count + 1) / self.warmup) * self.schedule(progress)
        self.muon.step(self.matrix_lr * rate)
        self.adam.param_groups[0]["lr"] = self.other_lr * rate
        self.adam.step()
        decay = min(self.ema_decay, (1 + self.count) / (10 + self.count))
        with torch.no_grad():
            for name, module in self.modules.items():
                for a, b in zip(self.ema[name].parameters(), module.parameters()):
                    a.lerp_(b, 1 - decay)
        self.count += 1

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        tensors = {"count": torch.tensor(self.count)}
        for name, module in self.modules.items():
            tensors |= {f"network.{name}.{key}": value for key, value in module.state_dict().items()}
            tensors |= {f"average.{name}.{key}": value for key, value in self.ema[name].state_dict().items()}
        tensors |= {f"momentum.{index}": buffer for index, buffer in enumerate(self.muon.buffers)}
        for index, state in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{key}": value for key, value in state.items()}
        return {name: value.detach().contiguous() for name, value in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on where another run was when it called `state`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

        for name, module in self.modules.items():
            module.load_state_dict(part(f"network.{name}."))
            self.ema[name].load_state_dict(part(f"average.{name}."))
        for index, buffer in enumerate(self.muon.buffers):
            buffer.copy_(tensors[f"momentum.{index}"])
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in part("adam.").items():
            index, name = key.split(".")
            states.setdefault(int(index), {})[name] = value
        self.adam.load_state_dict({**self.adam.state_dict(), "state": states})
        self.count = int(tensors["count"])
