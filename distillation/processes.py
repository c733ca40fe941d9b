"""Training in several processes that torchrun has started: each takes its share of a batch, gradients are averaged."""

from __future__ import annotations

import torch
import torch.distributed as distributed
from torch import Tensor, nn


def place() -> tuple[int, int]:
    """(number of this process, how many there are): (0, 1) without torchrun."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def average_gradients(network: nn.Module) -> None:
    """Give the parameters of every process the mean of their gradients, in one message."""
    count = place()[1]
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    if count == 1 or not gradients:
        return
    message = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(message)
    message /= count
    for gradient, mean in zip(gradients, message.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


def share(indices: Tensor) -> Tensor:
    """This process's part of a batch [B] that all have drawn alike."""
    number, count = place()
    return indices[number::count]
