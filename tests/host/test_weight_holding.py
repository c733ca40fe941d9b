"""The guidance gradient for each way in which ComfyUI and its packs hold weights, against float64."""

import json

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import pytest
import torch
import torch.nn.functional as F
from comfy_api.torch_helpers import set_torch_compile_wrapper
from guided_pass import assert_right_gradient, float64_gradient, latents, loaded_model, pass_gradient, relative_error
from pix2pix_zero.host.unet.gradients import has_constant_weights
from pix2pix_zero.host.unet.memory import MODES
from small_unet import SmallSD, conditioning, small_model

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return loaded_model()


def unet_weights(model):
    return {name: weight.clone() for name, weight in model.model.diffusion_model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_stored_smaller_than_computed_with(dtype):
    model = loaded_model(weight_dtype=dtype, compute_dtype=torch.float32)
    assert not has_constant_weights(model.model, CPU)
    assert_right_gradient(model)


def test_computing_in_half_precision_stays_in_it():
    model = loaded_model(weight_dtype=torch.bfloat16)
    assert has_constant_weights(model.model, CPU)
    assert_right_gradient(model, tolerance=0.2)


def test_resident_weights_are_told_from_the_others(model):
    assert has_constant_weights(model.model, CPU)
    assert not has_constant_weights(model.model, torch.device("meta")), "they would have to be moved there"


LORA = "{}.lora_{}.weight"


def lora(model):
    """(LoRA file's tensors, the UNet's weights with it merged at strength 0.7)."""
    generator = torch.Generator().manual_seed(3)
    tensors, weights = {}, unet_weights(model)
    for name, weight in list(weights.items()):
        if ".attn2.to_" in name and weight.ndim == 2 or name.endswith("in_layers.2.weight"):
            rows, columns = weight.shape[0], weight[0].numel()
            up = torch.randn(rows, 4, generator=generator) * 0.1
            down = torch.randn(4, columns, generator=generator) * 0.1
            key = "diffusion_model." + name.removesuffix(".weight")
            if weight.ndim == 4:
                tensors[LORA.format(key, "up")] = up[:, :, None, None]
                tensors[LORA.format(key, "down")] = down.reshape(4, *weight.shape[1:])
            else:
                tensors[LORA.format(key, "up")], tensors[LORA.format(key, "down")] = up, down
            weights[name] = weight + 0.7 * (up @ down).reshape(weight.shape)
    return tensors, weights


def with_lora(model, tensors):
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patched = model.clone()
    assert patched.add_patches(comfy.lora.load_lora(tensors, keys), 0.7)
    return patched


def test_a_merged_lora():
    model = loaded_model()
    tensors, weights = lora(model)
    patched = with_lora(model, tensors)
    assert_right_gradient(patched, weights)


def test_a_lora_as_a_hook():
    model = loaded_model()
    tensors, weights = lora(model)
    with torch.inference_mode():
        hooks = comfy.hooks.create_hook_lora(lora=tensors, strength_model=0.7, strength_clip=0.0)
        text = comfy.hooks.set_hooks_for_conditioning(conditioning(seed=1), hooks)
    assert_right_gradient(model, weights, text=text)
    assert_right_gradient(model)


@pytest.fixture
def little_memory(monkeypatch):
    """The host loads a third of each model; the rest is cast for each layer."""
    load = comfy.model_patcher.ModelPatcher.partially_load

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        room = self.model_size() // 3 - self.model.model_loaded_weight_memory
        return load(self, device_to, max(room, 0), force_patch_weights)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "partially_load", partially_load)


def cast_modules(model):
    return [m for m in model.model.diffusion_model.modules() if getattr(m, "comfy_cast_weights", False)]


def test_a_partially_loaded_model(little_memory):
    model = loaded_model()
    assert model.model.model_lowvram and cast_modules(model)
    assert_right_gradient(model)


def test_a_lora_that_a_partially_loaded_model_computes_on_the_fly(little_memory):
    model = loaded_model()
    tensors, weights = lora(model)
    patched = with_lora(model, tensors)
    x_source, x = latents(model)
    expected = float64_gradient(model, x_source, x, conditioning(seed=1), weights)

    def check(base_model, take):
        assert any(module.weight_function for module in cast_modules(patched))
        assert not has_constant_weights(base_model, CPU)
        return take()

    for mode in MODES:
        ours = pass_gradient(patched, x_source, x, conditioning(seed=1), mode, check)
        assert relative_error(ours, expected) <= 5e-5, mode


class CastBuffers:
    """Weights that pass through buffers made in an ordinary call, as offloading and dynamic VRAM have them.

    As soon as a layer is done its buffer belongs to others, who overwrite it.
    """

    def __init__(self, model, made_in_inference_mode):
        with torch.inference_mode(made_in_inference_mode):
            self.buffer = torch.empty(max(p.numel() for p in model.model.parameters()))
        self.filled = 0

    def cast(self, layer, input=None, *args, offloadable=False, **kwargs):
        weight = self.buffer[: layer.weight.numel()].view(layer.weight.shape)
        weight.copy_(layer.weight)
        self.filled += 1
        bias = None if layer.bias is None else layer.bias.float()
        return (weight, bias, None) if offloadable else (weight, bias)

    def uncast(self, layer, weight, bias, stream):
        # Written as a device copies memory, unseen by autograd.
        torch.from_numpy(self.buffer.numpy()).fill_(float("nan"))


@pytest.mark.parametrize("made_in_inference_mode", [True, False])
def test_cast_buffers_that_are_overwritten_after_each_layer(monkeypatch, made_in_inference_mode):
    model = loaded_model(weight_dtype=torch.float16, compute_dtype=torch.float32)
    buffers = CastBuffers(model, made_in_inference_mode)
    x_source, x = latents(model)
    expected = float64_gradient(model, x_source, x, conditioning(seed=1))
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", buffers.cast)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", buffers.uncast)
    for level in MODES:
        ours = pass_gradient(model, x_source, x, conditioning(seed=1), level)
        assert relative_error(ours, expected) <= 5e-5, level
    assert buffers.filled > 300


@pytest.mark.parametrize("how", ["node", "object patch"])
def test_a_compiled_model(how):
    model = loaded_model()
    compiled = model.clone()
    if how == "node":
        set_torch_compile_wrapper(compiled, backend="eager")
    else:
        unet = compiled.get_model_object("diffusion_model")
        compiled.add_object_patch("diffusion_model", torch.compile(unet, backend="eager"))
    x_source, x = latents(model)
    expected = float64_gradient(model, x_source, x, conditioning(seed=1))
    for level in MODES:
        ours = pass_gradient(compiled, x_source, x, conditioning(seed=1), level)
        assert relative_error(ours, expected) <= 5e-5, level


def small_model_with(operations, monkeypatch, weights_of):
    """A small model of other layer classes, its weights put in by `weights_of(module, dense module)`."""
    dense = loaded_model()
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(SmallSD, "custom_operations", operations)
        model = small_model()
        for (name, module), (_, source) in zip(
            model.model.diffusion_model.named_modules(), dense.model.diffusion_model.named_modules()
        ):
            weights_of(module, source)
        comfy.model_management.load_models_gpu([model])
    return model, dense


class BlockQuantized(comfy.ops.manual_cast):
    """As GGUF packs hold linear layers: packed integers, unpacked for each call."""

    class Linear(torch.nn.Module):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            super().__init__()
            self.register_buffer("packed", torch.zeros(out_features, in_features, dtype=torch.int8))
            self.register_buffer("scale", torch.ones(out_features, 1))
            self.bias = torch.nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

        def weight_now(self):
            return self.packed.float() * self.scale

        def forward(self, x):
            return F.linear(x, self.weight_now(), self.bias)


def test_integers_that_are_unpacked_for_each_layer(monkeypatch):
    def pack(module, source):
        if isinstance(module, BlockQuantized.Linear):
            module.scale = source.weight.abs().amax(1, keepdim=True) / 127
            module.packed = (source.weight / module.scale).round().to(torch.int8)
            if source.bias is not None:
                module.bias.data = source.bias.data.clone()
        elif module._parameters:
            for name, parameter in source.named_parameters(recurse=False):
                getattr(module, name).data = parameter.data.clone()

    model, dense = small_model_with(BlockQuantized, monkeypatch, pack)
    unpacked = {
        f"{name}.weight": module.weight_now()
        for name, module in model.model.diffusion_model.named_modules()
        if isinstance(module, BlockQuantized.Linear)
    }
    x_source, x = latents(dense)
    expected = float64_gradient(dense, x_source, x, conditioning(seed=1), unpacked)
    for level in MODES:
        ours = pass_gradient(model, x_source, x, conditioning(seed=1), level)
        assert relative_error(ours, expected) <= 5e-5, level
    plain = float64_gradient(dense, x_source, x, conditioning(seed=1))
    assert relative_error(plain, expected) > 1e-3


@pytest.mark.parametrize("disabled", [set(), {"float8_e4m3fn"}], ids=["native", "emulated"])
def test_the_hosts_quantized_layers(monkeypatch, disabled):
    quant_ops = comfy.quant_ops
    if not quant_ops._CK_AVAILABLE:
        pytest.skip("comfy_kitchen is not installed")
    operations = comfy.ops.mixed_precision_ops({}, torch.float32, disabled=disabled)
    layout = quant_ops.QUANT_ALGOS["float8_e4m3fn"]["comfy_tensor_layout"]

    def quantize(module, source):
        if isinstance(module, operations.Linear):
            scale = source.weight.abs().max() / 448
            state = {
                "weight": (source.weight / scale).to(torch.float8_e4m3fn),
                "weight_scale": scale,
                "comfy_quant": torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8),
            }
            if source.bias is not None:
                state["bias"] = source.bias
            module.load_state_dict(state)
            assert module.layout_type == layout
        elif module._parameters:
            for name, parameter in source.named_parameters(recurse=False):
                getattr(module, name).data = parameter.data.clone()

    model, dense = small_model_with(operations, monkeypatch, quantize)
    dequantized = {
        f"{name}.weight": module.weight.dequantize()
        for name, module in model.model.diffusion_model.named_modules()
        if isinstance(module, operations.Linear)
    }
    linears = [module for module in dense.model.diffusion_model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(dequantized) == len(linears) > 0
    assert not has_constant_weights(model.model, CPU)
    before = [dict(module.__dict__) for module in model.model.modules()]
    x_source, x = latents(dense)
    expected = float64_gradient(dense, x_source, x, conditioning(seed=1), dequantized)
    for level in MODES:
        # The reference maps are recorded through the host's quantized products.
        ours = pass_gradient(model, x_source, x, conditioning(seed=1), level)
        assert relative_error(ours, expected) <= (0.2 if not disabled else 5e-5), level
    assert [dict(module.__dict__) for module in model.model.modules()] == before


def test_layers_that_multiply_in_fp8_where_they_need_no_derivative(monkeypatch):
    """The host's --fast: its fp8 products run for the text, and refuse where a gradient passes."""
    with monkeypatch.context() as patch:
        patch.setattr(SmallSD, "custom_operations", comfy.ops.fp8_ops)
        model = loaded_model(weight_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    # The text's keys are rounded to fp8.
    assert_right_gradient(model, tolerance=0.2)
