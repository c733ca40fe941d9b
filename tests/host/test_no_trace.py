"""What a guided edit leaves behind on the user's MODEL, whether it ends or breaks off: nothing."""

import comfy.model_management
import comfy.sample
import pytest
import torch
from guided_pass import loaded_model
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from small_unet import conditioning, latent

pytestmark = pytest.mark.usefixtures("narrow_unet")


@pytest.fixture(scope="module")
def model():
    return loaded_model()


class Traces:
    """Everything about a MODEL that a run could change."""

    def __init__(self, model):
        self.parameters = {
            name: (id(p), p.data_ptr(), p.detach().clone(), p.requires_grad)
            for name, p in model.model.named_parameters()
        }
        self.options = repr(model.model_options)
        self.wrappers = repr(model.wrappers)
        self.patches = repr((model.patches.keys(), model.object_patches, model.weight_wrapper_patches))
        self.methods = sorted(n for n, m in model.model.named_modules() if "forward" in m.__dict__ or m._forward_hooks)

    def check(self, model):
        for name, parameter in model.model.named_parameters():
            identity, pointer, value, requires_grad = self.parameters[name]
            assert (id(parameter), parameter.data_ptr(), parameter.requires_grad) == (identity, pointer, requires_grad)
            assert parameter.grad is None
            assert torch.equal(parameter, value), name
        now = Traces(model)
        assert (now.options, now.wrappers, now.patches, now.methods) == (
            self.options,
            self.wrappers,
            self.patches,
            self.methods,
        )
        assert torch._C._len_torch_function_stack() == 0
        assert not torch.is_inference_mode_enabled()


def ordinary_sample(model):
    with torch.inference_mode():
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        texts = conditioning(seed=1), conditioning()
        empty = torch.zeros_like(noise)
        return comfy.sample.sample(model, noise, 3, 2.0, "euler", "normal", *texts, empty, disable_pbar=True, seed=1)


def edit(model, inversion, preset="default"):
    with torch.inference_mode():
        return sample_edit(
            model, inversion, conditioning(seed=1), conditioning(), EditSettings(2.0, 0.01, preset=preset)
        )[0]


def invert(model):
    with torch.inference_mode():
        return invert_latent(model, conditioning(), latent(), InversionSettings(2, 0, NoiseRegularization(steps=0)))


@pytest.mark.parametrize("preset", ["default", "official"])
def test_an_edit_leaves_no_trace(model, preset):
    before, traces = ordinary_sample(model), Traces(model)
    edit(model, invert(model), preset)
    traces.check(model)
    assert torch.equal(ordinary_sample(model), before)


class Mishap:
    """An attention patch of another pack that fails, or hears the user's Cancel, in the middle of a guided pass."""

    def __init__(self, act):
        self.act = act
        self.countdown = 12

    def __call__(self, q, k, v, options):
        if torch.is_grad_enabled():
            self.countdown -= 1
            if self.countdown == 0:
                self.act()
        return q, k, v


def fail():
    raise RuntimeError("another pack's patch failed")


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (fail, RuntimeError),
        (comfy.model_management.interrupt_current_processing, comfy.model_management.InterruptProcessingException),
    ],
    ids=["exception", "interrupt"],
)
def test_an_edit_that_breaks_off_leaves_no_trace(model, act, error):
    inversion = invert(model)
    before, expected, traces = ordinary_sample(model), edit(model, inversion), Traces(model)
    mishap = Mishap(act)
    faulty = model.clone()
    faulty.set_model_attn1_patch(mishap)
    with pytest.raises(error):
        edit(faulty, inversion)
    assert mishap.countdown == 0, "it broke off at once, inside the first guided passes"
    assert not comfy.model_management.processing_interrupted()
    traces.check(model)
    assert torch.equal(ordinary_sample(model), before)
    assert torch.equal(edit(model, inversion), expected)
