"""The optimizer of students: Muon for the weights between feature maps, Adam for those at the picture's ends."""

from collections import defaultdict

import torch
from torch import Tensor, nn

MATRIX_RATE = 10.0  # Muon's learning rate beside Adam's
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalized before they are applied (Jordan et al., 2024). Kernels count as matrices of
    [first dimension, all others]; those of one shape are orthogonalized together, which keeps a GPU busy.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for parameters in alike.values():
                self._step_alike(parameters, group["lr"])

    def _step_alike(self, parameters: list[Tensor], rate: float) -> None:
        looked_ahead = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            looked_ahead.append(parameter.grad.lerp(state["momentum"], MOMENTUM).flatten(1))
        updates = orthogonalize(torch.stack(looked_ahead))
        rows, columns = updates.shape[1:]
        for parameter, update in zip(parameters, updates):
            parameter.sub_(update.view(parameter.shape), alpha=rate * max(1.0, rows / columns) ** 0.5)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices [..., rows, columns], up to singular values in about 0.7..1.2.

    Each Newton-Schulz step multiplies by a polynomial of x x^T. The steps are gathered in that smaller square, and applied to x
    once: 2.5 times less work for kernels of 3 x 3.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    flipped = x.shape[-2] > x.shape[-1]
    x = x.mT if flipped else x
    gram = x @ x.mT
    gathered = identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for _ in range(ITERATIONS):
        step = a * identity + b * gram + c * gram @ gram
        gathered = step @ gathered
        gram = step @ gram @ step
    x = gathered @ x
    return x.mT if flipped else x


def make_optimizers(student: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Optimizers for all weights. Each of their groups holds `peak`, the learning rate that a schedule is a part of.

    Adam takes vectors, and kernels that begin or end at a picture.
    """
    between: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in student.parameters():
        at_an_end = parameter.ndim < 2 or min(parameter.shape[:2]) <= 4
        (others if at_an_end else between).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if between:
        optimizers.append(Muon(between, MATRIX_RATE * learning_rate))
    if others:
        optimizers.append(torch.optim.AdamW(others, learning_rate, betas=(0.9, 0.99), weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
