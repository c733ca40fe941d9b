"""Gradients with respect to the UNet's input, inside ComfyUI's executor.

Nodes run under `torch.inference_mode`, so the model's weights are inference tensors and autograd refuses to save them.
`input_gradients` leaves inference mode and swaps the few functions that would save a weight for ones that return only
the input's gradient. No resident weight is copied, and every module is afterwards what it was.
"""

import contextlib
import contextvars
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import CrossAttention, attention_pytorch

from ...attention_patches.attention import is_unet, own_attribute
from .transformer_gradients import differentiable_blocks, is_augmented

FOREIGN_ATTENTION = (
    "model: the attention that another node put into it has no derivative, so the picture cannot be guided through it. "
    "Take out that node, or start ComfyUI with --use-pytorch-cross-attention."
)

_active = contextvars.ContextVar("the weights' rules of the input_gradients in progress", default=None)


@contextlib.contextmanager
def input_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Record a graph through `model` with respect to its inputs only; its parameters are constants.

    Tensors that enter the graph must be cloned first, see `clone_inference`, and compiled modules be `uncompiled`.
    Quantized layers multiply in the precision of their input meanwhile, rotary embeddings are computed by PyTorch, and blocks
    of a diffusion transformer add to new tensors.

    Raises ValueError: also while it is active, in the user's words: a layer of the model has no derivative.
    """
    modules = list(model.modules())
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    transformer = not any(map(is_unet, modules))
    with (
        _frozen(parameters),
        _dequantized(modules),
        differentiable_blocks(modules) if transformer else contextlib.nullcontext(),
        _recording(_ConstantWeights(parameters, adds_anew=transformer)),
        _layers_checked(),
    ):
        yield


@contextlib.contextmanager
def _recording(constants: contextlib.AbstractContextManager | None) -> Iterator[None]:
    token = _active.set(constants)
    try:
        with torch.inference_mode(False), torch.enable_grad(), constants or contextlib.nullcontext():
            yield
    finally:
        _active.reset(token)


def recording_again() -> contextlib.AbstractContextManager:
    """What `input_gradients` sets up at this point, to be entered where a forward is repeated in the backward pass.

    A backward pass does not run under the function modes it was asked for in, and on CUDA in another thread.
    """
    return _recording(_active.get())


def uncompiled(model: torch.nn.Module) -> contextlib.AbstractContextManager:
    """While active, compiled modules run as they were written.

    Every call with a tap of ours in its transformer options needs it: hosts and packs compile with guards that do not
    look at those, so that compiled code would go on calling an earlier tap, and no compiler traces the exception that
    ends a pass. ValueError where PyTorch is too old for it.
    """
    if hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    if any("_orig_mod" in module._modules for module in model.modules()):
        raise ValueError(
            "model: it is compiled, and this version of PyTorch cannot run it uncompiled where a gradient is needed. "
            "Take out the node that compiles it, or update PyTorch to 2.6 or newer."
        )
    return contextlib.nullcontext()


def has_constant_weights(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether every weight is used as it lies in the model: on `device`, in the computation's dtype, unpatched.

    Any other is copied for each layer, and a graph holds the copies: with checkpointing "blocks", only one block's are
    alive at a time. `model`: the host's BaseModel, loaded.
    """
    return weights_stay_put(model.diffusion_model, device, model.get_dtype_inference())


def weights_stay_put(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """The same of any module."""
    return all(
        type(parameter) is torch.nn.Parameter and parameter.device == device and parameter.dtype == dtype
        for parameter in module.parameters()
    ) and not any(
        # What the host computes for each call, and what its dynamic VRAM moves.
        any(part.__dict__.get(name) for name in ("weight_function", "bias_function")) or "_v" in part.__dict__
        for part in module.modules()
    )


def clone_inference(value):
    """A clone of an inference tensor that autograd may save, through lists, tuples and dicts; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: clone_inference(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(clone_inference(item) for item in value)
    return value


def differentiable_attention(transformer_options: dict) -> dict:
    """Transformer options under which every attention runs on PyTorch's kernel, which has a derivative.

    sage and flash attention have none. An override that is already there still decides, with that kernel as its base,
    unless its result has no derivative. A replaced attention whose result has none is refused: ValueError.
    """
    previous = transformer_options.get("optimized_attention_override")

    def override(func: Callable, *args, **kwargs):
        if previous is not None:
            out = previous(attention_pytorch, *args, **kwargs)
            if not _severed(args, out):
                return out
        return attention_pytorch(*args, **kwargs)

    replace = {
        name: {place: _checked_replacement(patch) for place, patch in patches.items()} if "attn" in name else patches
        for name, patches in transformer_options.get("patches_replace", {}).items()
    }
    return {**transformer_options, "optimized_attention_override": override, "patches_replace": replace}


def _checked_replacement(patch: Callable):
    def replaced(*args, **kwargs):
        out = patch(*args, **kwargs)
        if _severed(args, out):
            raise ValueError(FOREIGN_ATTENTION)
        return out

    return replaced


def _severed(inputs, output) -> bool:
    """Whether a result does not depend on its inputs, as far as autograd knows, though it should."""
    return (
        torch.is_grad_enabled()
        and isinstance(output, torch.Tensor)
        and not output.requires_grad
        and any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs)
    )


def clone_skips(transformer_options: dict) -> dict:
    """Transformer options under which a ControlNet's in-place additions leave the tensors autograd has saved alone."""
    patches = transformer_options.get("patches", {})
    ours = [*patches.get("input_block_patch_after_skip", []), lambda h, options: h.clone()]
    return {**transformer_options, "patches": {**patches, "input_block_patch_after_skip": ours}}


def protect_from_patches(transformer_options: dict) -> dict:
    """Transformer options under which patches may work in place on what they have read, as FreeU and NAG do."""
    patches = {
        name: [_protected(patch) for patch in functions] if _works_on_outputs(name) else functions
        for name, functions in transformer_options.get("patches", {}).items()
    }
    return {**transformer_options, "patches": patches}


def _works_on_outputs(name: str) -> bool:
    return "block_patch" in name or "output_patch" in name


def _protected(patch: Callable):
    def protected(*args):
        if not torch.is_grad_enabled():
            return patch(*args)
        copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in args]
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
            return patch(*copies)

    return protected


@contextlib.contextmanager
def _frozen(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    # Up to ComfyUI 0.27 a UNet's parameters ask for gradients.
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            with torch.inference_mode(parameter.is_inference()):
                parameter.requires_grad_(True)


@contextlib.contextmanager
def _dequantized(modules: list[torch.nn.Module]) -> Iterator[None]:
    # Quantizing the input has no derivative. This is the host's own switch for layers that are to multiply unquantized.
    with contextlib.ExitStack() as stack:
        for module in modules:
            if module.__dict__.get("layout_type") is not None:
                stack.enter_context(own_attribute(module, "comfy_force_cast_weights", True))
        yield


@contextlib.contextmanager
def _layers_checked() -> Iterator[None]:
    # A kernel that autograd does not know cuts the graph without a word, and the gradient would be silently wrong.
    recording = _active.get()

    def check(module: torch.nn.Module, inputs, output):
        if _active.get() is not recording:  # the hook is called in every thread
            return
        if isinstance(module, CrossAttention) and _severed(
            inputs, output
        ):  # such as GLIGEN's, which no override reaches
            raise ValueError(FOREIGN_ATTENTION)
        if hasattr(module, "weight") and _severed(inputs, output):
            raise ValueError(
                f"model: its layers of the kind {type(module).__name__} have no derivative, so the picture cannot be "
                "guided through them. Load the model in another format, or start ComfyUI without --fast."
            )

    handle = torch.nn.modules.module.register_module_forward_hook(check)
    try:
        with warnings.catch_warnings():
            # A compiled module says that the hook sees it too, which does no harm.
            warnings.filterwarnings("ignore", message=".*when there are global hooks on modules")
            yield
    finally:
        handle.remove()


class _ConstantWeights(torch.overrides.TorchFunctionMode):
    """Layers differentiate with respect to their input only.

    The model's own parameters stay put until the backward pass. Any other weight comes out of a cast buffer that the
    next layer reuses, so it is cloned; without that the gradient would be silently wrong.
    `adds_anew`: what is added in place to a tensor of the graph makes a new one, since autograd may have saved the old.
    """

    CONVOLUTIONS = {F.conv2d, torch.conv2d}
    # They keep copies of their weights: few in norms, and in the others met only in patches of other packs.
    OTHERS = {
        getattr(place, name)
        for place in (F, torch)
        for name in (
            *("group_norm", "layer_norm", "batch_norm", "instance_norm", "rms_norm"),
            *("conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        )
        if hasattr(place, name)
    }
    LAYERS = {F.linear} | CONVOLUTIONS | OTHERS

    def __init__(self, parameters: list[torch.nn.Parameter], adds_anew: bool = False):
        super().__init__()
        self.adds_anew = adds_anew
        # The parameters themselves, so that none of these ids can pass to another tensor.
        self.resident = {id(parameter): parameter for parameter in parameters}

    def __torch_function__(self, func: Callable, types, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        if func is torch.Tensor.add_ and self.adds_anew and _any_requires_grad(args):
            # Only where what comes back takes the place of the old, as in `a += b`.
            func = torch.add if is_augmented(sys._getframe(1)) else func
        if not torch.is_grad_enabled() or func not in self.LAYERS:
            return _call(func, args, kwargs)
        x, *weights = args if args else (kwargs["input"],)
        named = {name: value for name, value in kwargs.items() if name != "input"}
        if not x.requires_grad or _any_requires_grad((*weights, *named.values())):
            # Nothing is kept for x, or a patch of another pack multiplies by something that depends on it.
            return _call(func, args, kwargs)
        if func is F.linear and args:
            return self._linear(*args, **kwargs)
        if (
            func in self.CONVOLUTIONS
            and args
            and not any(isinstance(value, str) for value in (*args, *kwargs.values()))
        ):
            return self._conv2d(*args, **kwargs)
        copies = {name: value if value is x else _copied(value) for name, value in kwargs.items()}
        return _call(func, (*args[:1], *map(_copied, weights)), copies)

    def _stable(self, weight: torch.Tensor) -> torch.Tensor:
        if id(weight) in self.resident:
            return weight
        return _dense(weight) if _is_quantized(weight) else weight.detach().clone()

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None):
        return _Linear.apply(x, self._stable(weight), bias)

    def _conv2d(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *geometry, **named):
        return _Conv2d.apply(x, self._stable(weight), bias, *_Geometry(*geometry, **named))


def _call(func: Callable, args: tuple, kwargs: dict):
    """func(*args, **kwargs) outside inference mode, though some arguments were made in it."""
    if _writes_to_inference(func, args, kwargs) and not _any_requires_grad((*args, *kwargs.values())):
        # PyTorch refuses this after it has written, so that it must not come to that.
        with torch.inference_mode():
            return func(*args, **kwargs)
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        if "Inference tensors cannot be saved" not in str(error):
            raise
    return func(*clone_inference(args), **clone_inference(kwargs))


IN_PLACE = ("__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "and", "or", "pow")))


def _writes_to_inference(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a function writes to an inference tensor, as the host fills cast buffers made in other calls."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") or name in IN_PLACE
    target = args[0] if in_place and args else kwargs.get("out")
    return isinstance(target, torch.Tensor) and target.is_inference()


def _any_requires_grad(values: Iterable) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _copied(value):
    if not isinstance(value, torch.Tensor):
        return value
    return _dense(value) if _is_quantized(value) else value.detach().clone()


def _is_quantized(weight: torch.Tensor) -> bool:
    return type(weight).dequantize is not torch.Tensor.dequantize


def _dense(weight: torch.Tensor) -> torch.Tensor:
    return weight.dequantize() if _is_quantized(weight) else weight


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        _keep_weight(ctx, weight)
        return F.linear(x, _dense(weight), bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient @ _dense(_kept_weight(ctx)).to(gradient.dtype), None, None


class _Geometry(NamedTuple):
    """What a convolution is given after its bias."""

    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *geometry):
        _keep_weight(ctx, weight)
        ctx.input_shape, ctx.geometry = x.shape, geometry
        return F.conv2d(x, _dense(weight), bias, *geometry)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        weight = _dense(_kept_weight(ctx))
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
