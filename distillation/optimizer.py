"""AdamW over a student's weights."""

import torch
from torch import nn


def make_optimizer(student: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Each group holds `peak`, the learning rate that a schedule is a part of."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer
