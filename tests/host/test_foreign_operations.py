"""The guidance gradient through layers and operations of other packs, against float64, and what is refused."""

import comfy.ops
import pytest
import torch
import torch.nn.functional as F
from guided_pass import assert_right_gradient, float64_gradient, latents, loaded_model, pass_gradient, relative_error
from small_unet import SHALLOW, SmallSD, changed, conditioning


@pytest.fixture(scope="module", autouse=True)
def few_transformers():
    """One at the outer level, which is patched, and four that follow."""
    with changed({**SHALLOW, "transformer_depth": [1, 1]}):
        yield


@pytest.fixture(scope="module")
def model():
    return loaded_model()


class UnknownKernel(torch.autograd.Function):
    """Stands for a compiled kernel without a derivative: what comes out is cut off from what went in."""

    @staticmethod
    def forward(ctx, x, weight):
        out = x.detach() @ weight.detach().T
        ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError


class WithoutDerivative(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        def forward(self, x):
            out = UnknownKernel.apply(x, self.weight)
            return out if self.bias is None else out + self.bias


def test_layers_without_a_derivative_are_refused_in_words(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(SmallSD, "custom_operations", WithoutDerivative)
        model = loaded_model()
    x_source, x = latents(model)
    with pytest.raises(ValueError, match="model: its layers of the kind Linear have no derivative"):
        pass_gradient(model, x_source, x, conditioning(seed=1))
    assert not torch.nn.modules.module._global_forward_hooks


def unknown_attention(q, k, v, heads, *args, **kwargs):
    return torch.zeros_like(q).detach()


def test_another_packs_attention_without_a_derivative_is_passed_over(model):
    patched = model.clone()
    asked = []

    def override(func, *args, **kwargs):
        asked.append(torch.is_grad_enabled())
        # In the reference pass it computes what PyTorch's does.
        return unknown_attention(*args) if torch.is_grad_enabled() else func(*args, **kwargs)

    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    assert_right_gradient(patched)
    assert True in asked


def test_another_packs_replacement_without_a_derivative_is_refused_in_words(model):
    patched = model.clone()
    patched.set_model_attn1_replace(lambda q, k, v, options: unknown_attention(q, k, v, 4), "input", 1)
    x_source, x = latents(model)
    with pytest.raises(ValueError, match="model: the attention that another node put into it has no derivative"):
        pass_gradient(patched, x_source, x, conditioning(seed=1))


def foreign(operation):
    """An attention patch at one site that passes its output through its own weights, loaded in inference mode."""
    with torch.inference_mode():
        weights = [torch.randn(shape, generator=torch.Generator().manual_seed(2)) / 8 for shape in ((64, 64), (64,))]

    def attend(q, k, v, options):
        q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
        out = ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return operation(out, *(w if out.dtype == w.dtype else w.clone().to(out.dtype) for w in weights))

    return attend


OPERATIONS = {
    "matmul": lambda x, weight, bias: x @ weight + bias,
    "addmm": lambda x, weight, bias: torch.stack([torch.addmm(bias, row, weight) for row in x]),
    "mul": lambda x, weight, bias: x * bias,
    "bilinear": lambda x, weight, bias: F.bilinear(x, x, weight.expand(64, 64, 64), bias),
    "conv1d": lambda x, weight, bias: F.conv1d(x.transpose(1, 2), weight[:, :, None], bias).transpose(1, 2),
    "conv2d, same": lambda x, weight, bias: F.conv2d(
        x.transpose(1, 2)[..., None], weight[:, :, None, None], bias, padding="same"
    )[..., 0].transpose(1, 2),
    "conv3d": lambda x, weight, bias: F.conv3d(
        x.transpose(1, 2)[..., None, None], weight[:, :, None, None, None], bias
    )[..., 0, 0].transpose(1, 2),
    "embedding": lambda x, weight, bias: x * F.embedding(torch.arange(x.shape[1]) % 64, weight),
    "layer norm": lambda x, weight, bias: F.layer_norm(x, (64,), bias, bias),
    "rms norm": lambda x, weight, bias: F.rms_norm(x, (64,), bias),
    "linear, by name": lambda x, weight, bias: F.linear(input=x, weight=weight, bias=bias),
    "linear, on a weight of the graph": lambda x, weight, bias: F.linear(weight, x[0]).T[None] + 0 * x,
    "norm, with gains of the graph": lambda x, weight, bias: F.layer_norm(x, (64,), x.mean((0, 1)), bias),
    "in place": lambda x, weight, bias: x.clone().mul_(bias).addcmul_(x, weight[0]),
    "concatenation": lambda x, weight, bias: torch.cat((x, weight[None]), 1)[:, : x.shape[1]] * 1.5,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_other_packs_on_their_own_weights(model, name):
    patch = foreign(OPERATIONS[name])
    patched = model.clone()
    patched.set_model_attn2_replace(patch, "input", 1)
    x_source, x = latents(model)
    expected = float64_gradient(model, x_source, x, conditioning(seed=1), foreign={("input", 1, 0): patch})
    for mode in ("none", "blocks"):
        assert relative_error(pass_gradient(patched, x_source, x, conditioning(seed=1), mode), expected) <= 5e-5
