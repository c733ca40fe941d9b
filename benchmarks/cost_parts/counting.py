"""What a run asks of the UNet: floating point operations, forward and backward passes, and its gradients."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _cpu_attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward(grad_out, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


CPU_FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class _NoModules(contextlib.nullcontext):
    """In place of the counter's module tracker, which loses its way when a forward pass is left by an exception."""

    parents = frozenset({"Global"})


@contextlib.contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """torch's counter, with the CPU kernels of attention that it lacks."""
    counter = FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS)
    counter.mod_tracker = _NoModules()
    with counter:
        yield counter


@dataclass
class Passes:
    """Calls of the UNet, and the pictures in them: a batch of two is one call and two rows."""

    flops: int = 0
    forward_calls: int = 0
    forward_rows: int = 0
    backward_calls: int = 0
    backward_rows: int = 0

    def __sub__(self, other: "Passes") -> "Passes":
        return Passes(**{name: value - getattr(other, name) for name, value in asdict(self).items()})


@dataclass
class Gradient:
    """What reached the UNet's input in a backward pass: one row each of `x`, `text` and `gradient`."""

    x: torch.Tensor
    timestep: torch.Tensor
    text: torch.Tensor
    gradient: torch.Tensor


@dataclass
class Watch:
    """Counts what passes through a UNet, and keeps the first gradient that belongs to the text `wanted`."""

    wanted: torch.Tensor
    passes: Passes = field(default_factory=Passes)
    first: Gradient | None = None

    @contextlib.contextmanager
    def over(self, unet: torch.nn.Module) -> Iterator[None]:
        handle = unet.register_forward_pre_hook(self._on_forward, with_kwargs=True)
        try:
            with flop_counter() as counter:
                yield
        finally:
            handle.remove()
        self.passes.flops = counter.get_total_flops()

    def _on_forward(self, unet, args, kwargs) -> None:
        x, timestep = args[:2]
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else kwargs["context"]
        self.passes.forward_calls += 1
        self.passes.forward_rows += len(x)
        if x.requires_grad:
            seen = x.detach()
            x.register_hook(lambda gradient: self._on_backward(seen, timestep, text, gradient))

    def _on_backward(self, x, timestep, text, gradient) -> None:
        self.passes.backward_calls += 1
        self.passes.backward_rows += len(x)
        rows = [row for row in range(len(x)) if torch.equal(text[row].cpu(), self.wanted[0].to(text.dtype))]
        if self.first is None and rows:
            x, text, gradient = (tensor[rows[:1]].detach().to("cpu", copy=True) for tensor in (x, text, gradient))
            timestep = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1)[:1].cpu()
            self.first = Gradient(x, timestep, text, gradient)
