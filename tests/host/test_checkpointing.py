"""The guided pass with parts of it computed again: the same gradient to the last bit, and no trace."""

import functools
import threading

import comfy.model_management
import pytest
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import FeedForward, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from guided_pass import float64_gradient, latents, loaded_model, pass_gradient, relative_error
from pix2pix_zero.attention_patches.attention import cross_attention_sites
from pix2pix_zero.host.unet.memory import MODES, checkpointed
from small_unet import conditioning

pytestmark = pytest.mark.usefixtures("narrow_unet")

RECOMPUTING = [mode for mode in MODES if mode != "none"]


@pytest.fixture(scope="module")
def model():
    return loaded_model()


@pytest.fixture(scope="module")
def usual(model):
    """`usual(batch, mode)`: the gradient of a pass that nothing disturbs."""

    def gradient(batch, mode):
        return pass_gradient(model, *latents(model, batch), conditioning(rows=batch, seed=1), mode)

    return functools.cache(gradient)


@pytest.fixture(scope="module")
def exact(model):
    """`exact(batch)`: the gradient in float64."""
    return functools.cache(
        lambda batch: float64_gradient(model, *latents(model, batch), conditioning(rows=batch, seed=1))
    )


def own_forwards(model):
    return {name: m.__dict__["forward"] for name, m in model.model.named_modules() if "forward" in m.__dict__}


@pytest.mark.parametrize("mode", RECOMPUTING)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_gradient_is_the_same_to_the_last_bit(model, usual, exact, mode, batch):
    x_source, x = latents(model, batch)
    plain = usual(batch, "none")
    assert torch.equal(pass_gradient(model, x_source, x, conditioning(rows=batch, seed=1), mode), plain)
    assert relative_error(plain, exact(batch)) <= 5e-5


def test_feed_forward_layers_may_run_in_pieces(model, usual, monkeypatch):
    x_source, x = latents(model, 2)
    text = conditioning(rows=2, seed=1)
    plain = usual(2, "none")
    monkeypatch.setattr("pix2pix_zero.host.unet.memory.PIECE", 1000)
    # Matrices of other sizes are multiplied in another order, so the last bits may differ.
    assert relative_error(pass_gradient(model, x_source, x, text, "blocks"), plain.double()) <= 1e-5


class OtherPack:
    """Patches with their own weights that look up where they are in the UNet's options."""

    def __init__(self):
        with torch.inference_mode():
            self.weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(2)) * 32**-0.5
        self.seen = []

    def attend(self, q, k, v, options):
        self.seen.append((*options["block"], options["block_index"], tuple(options["activations_shape"])))
        heads = options["n_heads"]
        image = F.linear(v.unflatten(-1, (-1, 32)), self.weight).flatten(-2)
        q, k, v, image = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v, image))
        maps = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        # Each layer has its own strength, so that one which is mistaken for another shows in the gradient.
        strength = {"input": 0.1, "middle": 0.3, "output": 0.5}[options["block"][0]] + 0.1 * options["block_index"]
        return (maps @ v + strength * maps @ image).transpose(1, 2).flatten(2)

    def scale_queries(self, q, k, v, options):
        return q * (1 + 0.02 * options["block"][1]), k, v


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_patches_of_other_packs_see_the_same_layer_each_time(model, usual, mode):
    other = OtherPack()
    patched = model.clone()
    for site in cross_attention_sites(model.model.diffusion_model):
        patched.set_model_attn2_replace(other.attend, *site)
    patched.set_model_attn1_patch(other.scale_queries)
    x_source, x = latents(model)
    text = conditioning(seed=1)
    plain = pass_gradient(patched, x_source, x, text)
    places = set(other.seen)
    assert torch.equal(pass_gradient(patched, x_source, x, text, mode), plain)
    assert set(other.seen) == places
    assert not torch.equal(plain, usual(1, "none"))


def in_a_thread(outputs, inputs):
    """As autograd takes gradients on CUDA: in a thread that knows nothing of where it was asked for."""
    results = []

    def work():
        try:
            results.extend(torch.autograd.grad(outputs, inputs))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(results[0], Exception):
        raise results[0]
    return results


@pytest.mark.parametrize("mode", MODES)
def test_the_backward_pass_may_run_in_another_thread(model, usual, mode):
    elsewhere = pass_gradient(model, *latents(model), conditioning(seed=1), mode, grad=in_a_thread)
    assert torch.equal(elsewhere, usual(1, "none"))


class Mishap(torch.autograd.Function):
    """An operation of another pack that fails from its second call on, which is in the backward pass."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        Mishap.calls += 1
        if Mishap.calls > 1:
            raise comfy.model_management.InterruptProcessingException
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_an_interruption_while_recomputing_is_heard_and_leaves_no_trace(model, usual):
    x_source, x = latents(model)
    text = conditioning(seed=1)
    before = usual(1, "blocks")
    faulty = model.clone()
    faulty.set_model_attn1_patch(
        lambda q, k, v, options: (Mishap.apply(q) if q.requires_grad and options["block"][1] == 1 else q, k, v)
    )
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        pass_gradient(faulty, x_source, x, text, "blocks")
    assert Mishap.calls == 2
    assert not own_forwards(model)
    assert torch.equal(pass_gradient(model, x_source, x, text, "blocks"), before)


@pytest.mark.parametrize("mode", RECOMPUTING)
@pytest.mark.parametrize("call", [1, 2], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "layer", ["output_blocks.1.1.transformer_blocks.0.ff.net.0.proj", "input_blocks.1.0.in_layers.0"]
)
def test_running_out_of_memory_anywhere_lets_the_next_pass_run(model, usual, mode, layer, call, monkeypatch):
    x_source, x = latents(model)
    text = conditioning(seed=1)
    before = usual(1, "blocks")
    module = model.model.diffusion_model.get_submodule(layer)
    forward, calls = module.forward, []

    def fail(*args):
        calls.extend([1] if torch.is_grad_enabled() else [])
        if len(calls) == call and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setitem(module.__dict__, "forward", fail)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            pass_gradient(model, x_source, x, text, mode)
    # The error is still held, as where a pass is tried again while it is handled.
    assert caught.value is not None
    saved = torch.tensor(1.0, requires_grad=True)
    assert (saved * saved).grad_fn._saved_self is saved, "no hook is left that would take saved tensors away"
    assert torch.equal(pass_gradient(model, x_source, x, text, "blocks"), before)


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_modules_are_as_before_even_after_an_error(model, mode):
    unet = model.model.diffusion_model
    theirs = {module: (lambda *args, _forward=module.forward: _forward(*args)) for module in modules_of(unet)[:7]}
    for module, forward in theirs.items():
        module.forward = forward
    try:
        before = own_forwards(model)
        with pytest.raises(KeyError), checkpointed(unet, mode):
            assert own_forwards(model) != before
            raise KeyError
        assert own_forwards(model) == before
        assert before
    finally:
        for module in theirs:
            del module.forward
    assert not own_forwards(model)


def modules_of(unet):
    return [module for module in unet.modules() if isinstance(module, (FeedForward, ResBlock, SpatialTransformer))]


def test_calls_without_a_graph_go_straight_through(model, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("nothing is recorded, so nothing is to be computed again")

    monkeypatch.setattr("pix2pix_zero.host.unet.memory.checkpoint", refuse)
    unet = model.model.diffusion_model
    x, context = torch.randn(1, 4, 8, 8), conditioning()[0][0]
    with torch.inference_mode():
        plain = unet(x, torch.tensor([500.0]), context=context)
    with checkpointed(unet, "blocks"):
        with torch.inference_mode():
            assert torch.equal(unet(x, torch.tensor([500.0]), context=context), plain)
        with torch.no_grad():
            assert torch.equal(unet(x, torch.tensor([500.0]), context=context), plain)


def test_an_unknown_level_is_refused(model):
    with (
        pytest.raises(ValueError, match="none, feed-forward, blocks"),
        checkpointed(model.model.diffusion_model, "all"),
    ):
        pass
