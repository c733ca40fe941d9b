"""Gradients with respect to the UNet's input, inside ComfyUI's executor.

Nodes run under `torch.inference_mode`, so the model's weights are inference tensors and autograd refuses to save them.
`input_gradients` leaves inference mode and swaps the few functions that would save a weight for ones that return only
the input's gradient. No module is touched, no resident weight is copied.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch

_active = contextvars.ContextVar("the weights' rules of the input_gradients in progress", default=None)


@contextlib.contextmanager
def input_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Record a graph through `model` with respect to its inputs only; its parameters are constants.

    Tensors that enter the graph must be made ordinary ones first, see `ordinary`.
    """
    resident = frozenset(id(parameter) for parameter in model.parameters())
    constants = _ConstantWeights(resident)
    token = _active.set(constants)
    try:
        with torch.inference_mode(False), torch.enable_grad(), constants:
            yield
    finally:
        _active.reset(token)


def recording_again() -> contextlib.AbstractContextManager:
    """What `input_gradients` sets up at this point, to be entered where a forward is repeated in the backward pass.

    A backward pass does not run under the function modes it was asked for in, and on CUDA in another thread.
    """
    return _again(_active.get() or contextlib.nullcontext())


@contextlib.contextmanager
def _again(constants: contextlib.AbstractContextManager) -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad(), constants:
        yield


def has_constant_weights(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether every weight is used as it lies in the model: on `device`, in the computation's dtype, unpatched.

    Any other is copied for each layer, and a graph holds the copies: take checkpointing "blocks" for such a model, so
    that only one block's are alive at a time. `model`: the host's BaseModel.
    """
    dtype = model.get_dtype_inference()
    return all(
        type(parameter) is torch.nn.Parameter and parameter.device == device and parameter.dtype == dtype
        for parameter in model.diffusion_model.parameters()
    ) and not any(
        getattr(module, "weight_function", None) or getattr(module, "bias_function", None) or hasattr(module, "_v")
        for module in model.diffusion_model.modules()
    )


def ordinary(value):
    """An inference tensor as an ordinary one (cloned), through lists and dicts; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: ordinary(item) for key, item in value.items()}
    if isinstance(value, list):
        return [ordinary(item) for item in value]
    return value


def differentiable_attention(transformer_options: dict) -> dict:
    """Transformer options under which every attention runs on PyTorch's kernel, which has a derivative.

    sage and flash attention have none. An override that is already there still decides, with that kernel as its base.
    """
    previous = transformer_options.get("optimized_attention_override")

    def override(func, *args, **kwargs):
        if previous is not None:
            return previous(attention_pytorch, *args, **kwargs)
        return attention_pytorch(*args, **kwargs)

    return {**transformer_options, "optimized_attention_override": override}


def unshared_skips(transformer_options: dict) -> dict:
    """Transformer options under which a ControlNet's in-place additions leave the tensors autograd has saved alone."""
    patches = transformer_options.get("patches", {})
    ours = [*patches.get("input_block_patch_after_skip", []), lambda h, options: h.clone()]
    return {**transformer_options, "patches": {**patches, "input_block_patch_after_skip": ours}}


class _ConstantWeights(torch.overrides.TorchFunctionMode):
    """Linear, convolution and norm layers differentiate with respect to their input only.

    `resident`: ids of the model's own parameters, whose storage stays put until the backward pass. Any other weight
    comes out of a cast buffer that the next layer reuses, so it is cloned; without that the gradient would be silently
    wrong.
    """

    NORMS = {F.group_norm, torch.group_norm, F.layer_norm, torch.layer_norm}
    CONVOLUTIONS = {F.conv2d, torch.conv2d}

    def __init__(self, resident: frozenset[int]):
        super().__init__()
        self.resident = resident

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or not (func is F.linear or func in self.CONVOLUTIONS or func in self.NORMS):
            return func(*args, **kwargs)
        if not args[0].requires_grad or func in self.NORMS:
            # Norms keep copies of their few gains and offsets; without a graph through x nothing is kept.
            constant = _copied if args[0].requires_grad else _detached
            return func(args[0], *map(constant, args[1:]), **{name: constant(value) for name, value in kwargs.items()})
        if func is F.linear:
            return self._linear(*args, **kwargs)
        return self._conv2d(*args, **kwargs)

    def _stable(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if id(weight) in self.resident else weight.detach().clone()

    def _linear(self, x, weight, bias=None):
        return _Linear.apply(x, self._stable(weight), bias)

    def _conv2d(self, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        return _Conv2d.apply(x, self._stable(weight), bias, stride, padding, dilation, groups)


def _detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def _copied(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        _keep_weight(ctx, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ _kept_weight(ctx).to(gradient.dtype), None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        _keep_weight(ctx, weight)
        ctx.input_shape, ctx.geometry = x.shape, (stride, padding, dilation, groups)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, gradient):
        weight = _kept_weight(ctx)
        return torch.nn.grad.conv2d_input(ctx.input_shape, weight, gradient, *ctx.geometry), *([None] * 6)


def _keep_weight(ctx, weight: torch.Tensor) -> None:
    # Copies are saved, so that checkpointing can drop them. A resident weight is only pointed at: it costs nothing,
    # inference tensors cannot be saved, and without it a recomputation can end before this layer.
    if isinstance(weight, torch.nn.Parameter):
        ctx.weight = weight
    else:
        ctx.save_for_backward(weight)


def _kept_weight(ctx) -> torch.Tensor:
    saved = ctx.saved_tensors
    return saved[0] if saved else ctx.weight
