"""A second device, simulated on the CPU, that shows mistakes which only a GPU would.

Its tensors hold real numbers and every operation on them is carried out, but one that mixes tensors of both devices raises,
as CUDA's do: `to` and `copy_` are the ways across. It is called "meta:0", since autograd knows no other device than the CPU
and "meta" in every build of PyTorch; tensors of the real meta device have no index, and are left alone.

What it cannot show: streams, autograd's thread for each device, and a derivative of one's own that ends on the wrong one.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OTHER = torch.device("meta", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten

# The numbers that are drawn differ between devices, and so would pictures.
RANDOM = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "rand_like", "randn_like"} | {
    f"{name}_" for name in ("normal", "uniform", "random", "bernoulli", "exponential")
}
# What makes the host wait until the device has come so far, beside copies.
WAITING = {"item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "unique"}
# Beside pointwise operations of two, those that take a number for a tensor on the device from a tensor on the CPU.
TAKING_NUMBERS = {
    aten.where,
    aten.masked_fill,
    aten.masked_fill_,
    aten.fill,
    aten.fill_,
    aten.index_put,
    aten.index_put_,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class OtherTensor(torch.Tensor):
    """A tensor on the other device. `inner`: its values, on the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OtherTensor":
        inference = inner.is_inference()
        if inference != torch.is_inference_mode_enabled():
            with torch.inference_mode(inference):
                return cls.__new__(cls, inner)
        size, strides, offset = inner.size(), inner.stride(), inner.storage_offset()
        tensor = torch.Tensor._make_wrapper_subclass(cls, size, strides, offset, dtype=inner.dtype, device=OTHER)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: the other device is gone, but a tensor on it is not.")

    def numpy(self, **_):
        raise TypeError("can't convert a tensor of the other device to numpy. Use Tensor.cpu() first.")

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __repr__(self, **_) -> str:
        return f"OtherTensor({self.inner!r})"


@contextlib.contextmanager
def other_device() -> Iterator["OtherDevice"]:
    """While active, there is a device `OTHER`."""
    with OtherDevice() as device, _Literals():
        yield device


class _Literals(TorchFunctionMode):
    """Numbers that PyTorch makes tensors of, which it leaves empty on anything called "meta"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            device = kwargs.get("device", args[0].device if func is torch.Tensor.new_tensor else None)
            if device is not None and torch.device(device) == OTHER:
                return func(*args, **{**kwargs, "device": CPU}).to(OTHER)
        elif func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], OtherTensor):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = tuple(torch.tensor(place) if isinstance(place, (list, range)) else place for place in places)
            return func(args[0], places, *args[2:])
        return func(*args, **kwargs)


class OtherDevice(TorchDispatchMode):
    """See `other_device`. `waits`: how often the host has waited for the device, by operation."""

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there, here, devices = [], [], []
        for value in _leaves((*args, *kwargs.values())):
            if isinstance(value, OtherTensor):
                there.append(value)
            elif isinstance(value, torch.Tensor):
                here.append(value)
            elif isinstance(value, torch.device):
                devices.append(value)
        if not there and OTHER not in devices:
            return func(*args, **kwargs)
        if (devices or here) and _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        target = devices[0] if devices else OTHER
        if there and here:
            _check_mixture(func, (*args, *kwargs.values()))
        if target == OTHER:
            _check_random(func, kwargs)
        self._count(func, args, kwargs, there, here, target)
        inner = {name: _on_the_cpu(value) for name, value in kwargs.items()}
        result = func(*map(_on_the_cpu, args), **inner)
        outer = {id(value.inner): value for value in there} | {id(value): value for value in here}
        if isinstance(result, (list, tuple)):
            return type(result)(_as_on(target, value, outer) for value in result)
        return _as_on(target, result, outer)

    def _count(self, func, args, kwargs, there: list, here: list, target: torch.device) -> None:
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        if packet is aten.copy_ and here or packet is aten._to_copy and (here or target != OTHER):
            if here and there and isinstance(args[1], OtherTensor) or target != OTHER:
                self.waits["download"] += 1
            elif not (kwargs.get("non_blocking") or packet is aten.copy_ and args[2:] == (True,)):
                self.waits["upload"] += 1
        elif name in WAITING or packet in INDEXING and any(_is_mask(index) for index in args[1]):
            self.waits[name] += 1


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


@cache
def _is_composite(func) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _leaves(values: Iterable) -> Iterator:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _on_the_cpu(value):
    if isinstance(value, OtherTensor):
        return value.inner
    if isinstance(value, (list, tuple)):
        return [_on_the_cpu(item) for item in value]
    return CPU if value == OTHER and isinstance(value, torch.device) else value


def _as_on(device: torch.device, value, outer: dict[int, torch.Tensor]):
    """What an operation gave, on a device. `outer`: its arguments, by the ids of what took their place."""
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) in outer:  # changed in place
        tensor = outer[id(value)]
        if tensor.shape != value.shape or tensor.stride() != value.stride():
            raise NotImplementedError("An operation that changes a tensor's shape in place.")
        return tensor
    return OtherTensor(value) if device == OTHER else value


def _check_mixture(func, args) -> None:
    """Raise RuntimeError unless CUDA lets an operation have tensors of both devices."""
    packet = func.overloadpacket
    if packet in (aten.copy_, aten._to_copy):
        return
    tensors = [value for value in _leaves(args) if isinstance(value, torch.Tensor)]
    places = zip(func._schema.arguments, args)
    written = [value for place, value in places if place.alias_info is not None and place.alias_info.is_write]
    if packet in INDEXING:
        tensors = [args[0], *args[2:3]]  # indices may be on the CPU where the tensor is not
    numbers = packet in TAKING_NUMBERS or torch.Tag.pointwise in func.tags and len(tensors) == 2
    misplaced = [
        value
        for value in tensors
        if not isinstance(value, OtherTensor) and (value.ndim or not numbers or any(value is w for w in written))
    ]
    if misplaced:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found at least two devices.")


def _check_random(func, kwargs: dict) -> None:
    generator = kwargs.get("generator")
    if generator is not None:
        raise RuntimeError(f"{func}: expected a generator of the other device, but found one of the CPU.")
    if func.overloadpacket.__name__ in RANDOM:
        raise RuntimeError(f"{func}: its numbers would depend on the device. Draw them on the CPU.")
