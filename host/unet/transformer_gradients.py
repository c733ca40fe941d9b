"""What stands in the way of gradients through the blocks of diffusion transformers, and how it is made way with."""

import contextlib
import dis
from collections.abc import Callable, Iterator
from types import FrameType

import comfy.model_management
import comfy.quant_ops
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import JointBlock

from ...attention_patches.attention import own_attribute

try:
    from comfy_kitchen.backends.eager import rope as eager_rope
except ImportError:  # a host that comes without it has no kernels
    eager_rope = None


@contextlib.contextmanager
def differentiable_blocks(modules: list[torch.nn.Module]) -> Iterator[None]:
    """While active, the blocks among `modules` can be differentiated, but for what they add in place, see `is_augmented`."""
    with plain_operations(), _unrepeated(modules):
        yield


# The host's kernels for rotary embeddings that it calls whatever is differentiated.
KERNELS = ("rms_rope_split_half",)


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """While active, the host computes rotary embeddings by PyTorch, whose operations have derivatives.

    To be entered for maps too that others are matched with, or rounding would set the two apart.
    """
    kernels = getattr(comfy.quant_ops, "ck", None)
    before = comfy.model_management.in_training, {name: getattr(kernels, name, None) for name in KERNELS}
    comfy.model_management.in_training = True  # the host's own switch
    try:
        for name, kernel in before[1].items():
            if kernel is not None:
                setattr(kernels, name, getattr(eager_rope, name))
        yield
    finally:
        comfy.model_management.in_training = before[0]
        for name, kernel in before[1].items():
            if kernel is not None:
                setattr(kernels, name, kernel)


@contextlib.contextmanager
def _unrepeated(modules: list[torch.nn.Module]) -> Iterator[None]:
    # SD 3's blocks are repeated in the backward pass unless they are told not to be, which those that another pack calls
    # are not, and their repetition does not know the rules for constant weights.
    with contextlib.ExitStack() as stack:
        for module in modules:
            if isinstance(module, JointBlock):
                stack.enter_context(own_attribute(module, "forward", _told_not_to_repeat(module.forward)))
        yield


def _told_not_to_repeat(forward: Callable) -> Callable:
    def told(*args, **kwargs):
        return forward(*args, **{**kwargs, "use_checkpoint": False})

    return told


def is_augmented(frame: FrameType) -> bool:
    """Whether what a frame is at is an operator, such as `+=`, and no call."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] in ("BINARY_OP", "INPLACE_ADD")
