"""Stages of the recipe that trained the demo model. They run on the CPU, in the host's terms as well."""

from comfy.cli_args import args as _host

_host.cpu = True
_host.use_pytorch_cross_attention = True
