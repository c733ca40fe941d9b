"""The same models on the CPU and on a second, simulated device, and nodes run on either."""

import contextlib
from functools import cached_property

import comfy.cli_args
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from other_device import OTHER, OtherTensor, other_device
from pix2pix_zero.editing.directions import EditDirection
from pix2pix_zero.editing.trajectory import Inversion
from pix2pix_zero.nodes.inversion import Pix2PixZeroInversion
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler
from small_unet import SHALLOW, changed, conditioning, latent, small_model
from tiny_clip import tiny_clip

CPU = torch.device("cpu")

STEPS = 2

TEXT = "a cat on a sofa"

ROOM = 2**36


@contextlib.contextmanager
def host_on(device, intermediate=CPU):
    """While active, ComfyUI computes on this device. `intermediate`: where tensors are between nodes."""
    host = comfy.model_management
    with pytest.MonkeyPatch.context() as patch:
        for name in ("get_torch_device", "text_encoder_device", "vae_device"):
            patch.setattr(host, name, lambda: device)
        if device == CPU:
            yield
            return
        for name in ("get_free_memory", "get_total_memory"):
            patch.setattr(host, name, lambda dev=None, both=False, **_both: (ROOM, ROOM) if both or _both else ROOM)
        patch.setattr(host, "text_encoder_initial_device", lambda *args, **kwargs: CPU)
        patch.setattr(host, "should_use_fp16", lambda *args, **kwargs: False)
        patch.setattr(host, "intermediate_device", lambda: intermediate)
        with other_device() as other:
            yield other


def pytorchs_attention(func, *args, **kwargs):
    return attention_pytorch(*args, **kwargs)


class Workplace:
    """The same models on one device."""

    def __init__(self, device):
        self.device = device
        self.model = self.new_model()
        self.clip = tiny_clip()

    def new_model(self, **options):
        with changed(SHALLOW):
            model = small_model(**options).model
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=self.device, offload_device=CPU)
        # As the host chooses on a GPU; on a CPU it would sum in another order.
        patcher.model_options["transformer_options"]["optimized_attention_override"] = pytorchs_attention
        return patcher

    @cached_property
    def inversion(self):
        return invert(self)[0]

    @cached_property
    def inversion_of_text(self):
        return invert(self, [self.encode(TEXT)])[0]

    def encode(self, text):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))


@contextlib.contextmanager
def both_workplaces():
    """While active, those on the CPU and on the other device, whose models the host forgets then."""
    made = []
    for device in (CPU, OTHER):
        with host_on(device), torch.inference_mode():
            made.append(Workplace(device))
    yield made
    loaded = comfy.model_management.current_loaded_models
    with host_on(OTHER):
        for there in [model for model in loaded if model.device == OTHER]:
            there.model_unload()
            loaded.remove(there)


def parts(value):
    """Tensors, texts and numbers in what a node returns."""
    if isinstance(value, Inversion):
        value = value.trajectory, value.sigmas, value.residuals, value.noise_mask, value.reconstruction_psnr
    if isinstance(value, EditDirection):
        value = value.tensors, value.first_token, value.encoder
    if isinstance(value, dict):
        value = [value[name] for name in sorted(value)]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from parts(item)
    else:
        yield value


def kept_levels(inversion):
    levels = range(1, inversion.steps + 1)
    return [level for level in levels if inversion.maps is not None and inversion.maps.get(level, CPU) is not None]


def assert_same(ours, expected, tolerance):
    if not isinstance(expected, torch.Tensor):
        assert ours == (pytest.approx(expected, rel=1e-4, nan_ok=True) if isinstance(expected, float) else expected)
        return
    assert not isinstance(ours, OtherTensor), "it was left on the other device"
    assert ours.dtype == expected.dtype
    assert float((ours - expected).abs().max()) <= tolerance * float(expected.abs().max())


def handed_over(value):
    """What a node gives or takes, with its tensors where ComfyUI has them between nodes."""
    if isinstance(value, torch.Tensor):
        return value.to(comfy.model_management.intermediate_device())
    if isinstance(value, dict):
        return {name: handed_over(item) for name, item in value.items()}
    return [handed_over(item) for item in value] if isinstance(value, list) else value


def invert(workplace, texts=None, batch=1, noise_mask=None, model=None, **changes):
    settings = dict(
        steps=STEPS,
        seed=0,
        autocorrelation_weight=20.0,
        kl_weight=1.0,
        regularization_steps=1,
        autocorrelation_rolls=2,
        method="direct",
    )
    picture = latent(batch, 8, 12) | ({} if noise_mask is None else {"noise_mask": noise_mask})
    inputs = {name: [value] for name, value in (settings | changes).items()}
    model = workplace.model if model is None else model
    result = Pix2PixZeroInversion.execute(
        model=[model],
        positive=handed_over(texts or [conditioning()]),
        latent_image=[handed_over(picture)],
        **inputs,
    ).result
    return [output for (output,) in result]


def edit(workplace, inversion=None, texts=None, edits=None, model=None, **changes):
    settings = dict(
        cfg=2.0,
        guidance_strength=0.005,
        start_percent=0.0,
        end_percent=1.0,
        preset="default",
        local_blend=0.2,
        feature_until=0.0,
    )
    inputs = {name: [value] for name, value in (settings | changes).items()}
    (latents,), (area,) = Pix2PixZeroKSampler.execute(
        model=[workplace.model if model is None else model],
        inversion=[inversion or workplace.inversion],
        positive=handed_over(edits or [conditioning(seed=1)]),
        negative=handed_over(texts or [conditioning()]),
        **handed_over(inputs),
    ).result
    return latents, area


def sample(workplace, model, inversion, positive, negative):
    """The stock guider from the inversion's noise."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(2.0)
    noise = workplace.model.model.process_latent_out(inversion.trajectory[-1])
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(torch.zeros_like(noise), noise, euler, inversion.sigmas.flip(0), seed=0).to(
        comfy.model_management.intermediate_device()
    )


def left_half():
    mask = torch.zeros(1, 64, 96)
    mask[:, :, :48] = 1
    return mask


class ShortOfMemory:
    """An attention patch that runs out of memory in the first passes that record a graph."""

    def __init__(self, times):
        self.left = times

    def __call__(self, q, k, v, options):
        if q.requires_grad and self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return q, k, v
