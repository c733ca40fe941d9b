"""The guidance gradient, taken in the executor's inference mode through the real guider, against ordinary autograd on an
independent float64 copy of the weights."""

import comfy.controlnet
import comfy.ops
import pytest
import torch
import torch.nn.functional as F
from guided_pass import latents, loaded_model
from pix2pix_zero.host.unet.gradients import input_gradients
from plain_unet import PlainUNet, assert_same_gradient, guider_gradient
from small_unet import conditioning

pytestmark = pytest.mark.usefixtures("narrow_unet")


@pytest.fixture(scope="module")
def model():
    return loaded_model()


def with_extras(texts, **extras):
    return [[text, {**options, **extras}] for text, options in texts]


class ForeignAttention:
    """As image-prompt packs replace cross-attention: their own weights, loaded in inference mode, and a second term."""

    def __init__(self):
        with torch.inference_mode():
            self.weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(2)) * 32**-0.5
        self.calls = 0

    def __call__(self, q, k, v, options):
        self.calls += 1
        heads = options["n_heads"]
        weight = self.weight if v.dtype == torch.float32 else self.weight.clone().double()
        image = F.linear(v.unflatten(-1, (-1, 32)), weight).flatten(-2)
        q, k, v, image = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v, image))
        probabilities = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (probabilities @ v + 0.5 * probabilities @ image).transpose(1, 2).flatten(2)


class ResidualControl(comfy.controlnet.ControlBase):
    """A ControlNet that has already computed its residuals; ComfyUI adds them to the skips in place."""

    def __init__(self, residuals):
        super().__init__()
        self.residuals = residuals

    def get_control(self, x, timestep, cond, batched_number, transformer_options):
        return {key: [residual.clone() for residual in values] for key, values in self.residuals.items()}

    def copy(self):
        return ResidualControl(self.residuals)


def free_u(h, skip, options):
    h[:, : h.shape[1] // 2] = h[:, : h.shape[1] // 2] * 1.2
    frequencies = torch.fft.fftn(skip, dim=(-2, -1))
    return h, torch.fft.ifftn(frequencies * 0.9, dim=(-2, -1)).real


def test_gradient_is_that_of_ordinary_autograd(model):
    x_source, x = latents(model)
    text = conditioning(seed=1)
    ours = guider_gradient(model, text, x_source, x)
    assert_same_gradient(ours, PlainUNet(model).gradient(text[0][0], x_source, x))


def test_gradient_of_a_batch_is_that_of_each_picture(model):
    x_source, x = latents(model, batch=3)
    text = conditioning(rows=3, seed=1)
    gradient, distance = guider_gradient(model, text, x_source, x)
    assert distance.shape == (3,)
    expected = PlainUNet(model).gradient(text[0][0], x_source, x)
    assert_same_gradient((gradient, distance), expected)
    for i in range(3):
        one = [[text[0][0][i : i + 1], {}]]
        alone, _ = guider_gradient(model, one, x_source[i : i + 1], x[i : i + 1])
        assert float((gradient[i : i + 1] - alone).norm() / alone.norm()) <= 5e-5


def test_attention_replaced_by_another_pack_stays_replaced(model):
    foreign = ForeignAttention()
    patched = model.clone()
    patched.set_model_attn2_replace(foreign, "middle", 0)
    patched.set_model_attn2_replace(foreign, "output", 1, 1)
    x_source, x = latents(model)
    text = conditioning(seed=1)
    ours = guider_gradient(patched, text, x_source, x)
    assert foreign.calls == 2 * 3, "two transformers in the middle and one at the output, in both passes"
    at = dict.fromkeys([("middle", 0, 0), ("middle", 0, 1), ("output", 1, 1)], foreign)
    assert_same_gradient(ours, PlainUNet(model, foreign=at).gradient(text[0][0], x_source, x))


def test_attention_input_patches_and_output_block_patches_compose(model):
    lists = {
        "attn1_patch": [lambda q, k, v, options: (q * 1.05, k, v)],
        "attn2_patch": [lambda q, k, v, options: (q, k * 0.9, v), lambda q, k, v, options: (q * 1.1, k, v)],
        "output_block_patch": [free_u],
    }
    patched = model.clone()
    for name, functions in lists.items():
        for function in functions:
            patched.set_model_patch(function, name)
    x_source, x = latents(model)
    text = conditioning(seed=1)
    ours = guider_gradient(patched, text, x_source, x)
    expected = PlainUNet(model, patches=lists).gradient(text[0][0], x_source, x)
    assert_same_gradient(ours, expected)
    plain, _ = PlainUNet(model).gradient(text[0][0], x_source, x)
    assert (plain - expected[0]).norm() > 0.01 * plain.norm()


def test_controlnet_residuals_are_part_of_the_graph(model):
    skips = []

    def note(h, skip, options):
        skips.append(skip.shape)
        return h, skip

    x_source, x = latents(model)
    text = conditioning(seed=1)
    PlainUNet(model, patches={"output_block_patch": [note]}).gradient(text[0][0], x_source, x)
    generator = torch.Generator().manual_seed(6)
    residuals = {
        "output": [torch.randn(shape, generator=generator) * 0.3 for shape in reversed(skips[: len(skips) // 2])],
        "middle": [torch.randn(1, 64, 4, 6, generator=generator) * 0.3],
    }
    controlled, source = (
        with_extras(texts, control=ResidualControl(residuals), control_apply_to_uncond=False)
        for texts in (text, conditioning())
    )
    ours = guider_gradient(model, controlled, x_source, x, source)
    expected = PlainUNet(model, control=residuals).gradient(text[0][0], x_source, x)
    assert_same_gradient(ours, expected)
    plain, _ = PlainUNet(model).gradient(text[0][0], x_source, x)
    assert (plain - expected[0]).norm() > 0.01 * plain.norm()


def test_patched_weights_count(model):
    """A LoRA's weights are merged when the model is loaded."""
    generator = torch.Generator().manual_seed(3)
    names = [
        name
        for name, parameter in model.model.diffusion_model.named_parameters()
        if ".attn2.to_" in name and parameter.ndim == 2
    ]
    weights = {name: weight.clone() for name, weight in model.model.diffusion_model.state_dict().items()}
    patches = {}
    for name in names:
        rows, columns = weights[name].shape
        low_rank = torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns, generator=generator) * 0.02
        patches[f"diffusion_model.{name}"] = ("diff", (low_rank,))
        weights[name] = weights[name] + 0.7 * low_rank
    patched = model.clone()
    patched.add_patches(patches, 0.7)
    x_source, x = latents(model)
    text = conditioning(seed=1)
    ours = guider_gradient(patched, text, x_source, x)
    expected = PlainUNet(model, weights=weights).gradient(text[0][0], x_source, x)
    assert_same_gradient(ours, expected)


def test_weights_stored_in_half_precision_and_cast_for_each_layer():
    model = loaded_model(weight_dtype=torch.float16, compute_dtype=torch.float32)
    x_source, x = latents(model)
    text = conditioning(seed=1)
    ours = guider_gradient(model, text, x_source, x)
    assert_same_gradient(ours, PlainUNet(model).gradient(text[0][0], x_source, x))


def test_weights_that_share_one_cast_buffer(monkeypatch):
    """Offloading passes every weight through a buffer that the next layers overwrite before the backward pass."""
    model = loaded_model(weight_dtype=torch.float16, compute_dtype=torch.float32)
    with torch.inference_mode():
        buffers = [torch.empty(max(p.numel() for p in model.model.parameters())) for _ in range(2)]

    def cast(layer, input=None, *args, offloadable=False, **kwargs):
        buffers.reverse()
        with torch.inference_mode():
            weight = buffers[0][: layer.weight.numel()].view(layer.weight.shape)
            weight.copy_(layer.weight)
            bias = None if layer.bias is None else layer.bias.float()
        return (weight, bias, None) if offloadable else (weight, bias)

    x_source, x = latents(model)
    text = conditioning(seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(comfy.ops, "cast_bias_weight", cast)
        ours = guider_gradient(model, text, x_source, x)
    assert_same_gradient(ours, PlainUNet(model).gradient(text[0][0], x_source, x))


def test_a_text_for_an_area_moves_that_area(model):
    """Two texts, one of them for a part of the picture: each counts as much as it draws there, half where both do."""
    x_source, x = latents(model, height=8, width=12)
    whole, part = conditioning(seed=1), conditioning(seed=2)
    area = (8, 6, 0, 4)  # height, width, y, x
    source_whole, source_part = conditioning(seed=3), conditioning(seed=4)
    gradient, distance = guider_gradient(
        model,
        [*whole, *with_extras(part, area=area)],
        x_source,
        x,
        [*source_whole, *with_extras(source_part, area=area)],
    )
    plain = PlainUNet(model)
    expected, expected_distance = plain.gradient(whole[0][0], x_source, x, source_whole[0][0])
    inside, inside_distance = plain.gradient(part[0][0], x_source[..., 4:10], x[..., 4:10], source_part[0][0])
    expected[..., 4:10] = (expected[..., 4:10] + inside) / 2
    assert_same_gradient((gradient, distance), (expected, 0.75 * expected_distance + 0.25 * inside_distance))


@pytest.mark.parametrize("sharpness", [1.0, 0.01], ids=["usual", "flat"])
def test_gradients_of_a_model_that_computes_in_fp16_do_not_underflow(sharpness):
    """Flat maps have gradients below fp16's smallest number."""
    model = loaded_model(weight_dtype=torch.float16, compute_dtype=torch.float16)
    with torch.inference_mode():
        for name, parameter in model.model.diffusion_model.named_parameters():
            if ".attn2.to_k" in name:
                parameter *= sharpness
    x_source, x = latents(model)
    text = conditioning(seed=1)
    gradient, distance = guider_gradient(model, text, x_source, x)
    expected, expected_distance = PlainUNet(model).gradient(text[0][0], x_source, x)
    assert gradient.dtype == torch.float32
    assert float((gradient - expected).norm() / expected.norm()) <= 0.01
    torch.testing.assert_close(distance.double(), expected_distance, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "write", [lambda t: t.add_(1.0), lambda t: torch.add(t, 1.0, out=t), lambda t: t.__iadd__(1.0)]
)
def test_writing_to_a_tensor_of_the_executor_happens_once(model, write):
    """As a patch counts its calls, or the host fills its buffers, while a graph is recorded."""
    with torch.inference_mode():
        buffer = torch.zeros(3)
        with input_gradients(model.model):
            write(buffer)
    assert buffer.tolist() == [1.0, 1.0, 1.0]
