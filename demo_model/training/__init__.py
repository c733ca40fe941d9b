"""Stages of the recipe that trained the demo model, in the host's terms: on the CPU where torch sees no GPU."""

import torch
from comfy.cli_args import args as _host

_host.cpu = _host.cpu or not torch.cuda.is_available()
_host.use_pytorch_cross_attention = True
