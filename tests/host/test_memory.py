"""What a guided pass is said to need, against what it holds, and how the host hears of it."""

import comfy.model_management
import comfy.sample
import pytest
import torch
from guided_pass import latents, loaded_model, pass_gradient
from pix2pix_zero.benchmarks.families_parts.live_memory import LiveMemory
from pix2pix_zero.host.out_of_memory import is_out_of_memory
from pix2pix_zero.host.unet.memory import (
    MODES,
    affordable_mode,
    announce_memory,
    graph_memory,
    guided_pass_memory,
)
from small_unet import conditioning


@pytest.fixture(scope="module")
def model():
    return loaded_model()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 32, 32), (2, 32, 24), (1, 23, 33)])
def test_the_estimate_is_what_the_pass_holds_or_a_little_more(model, mode, batch, height, width):
    x_source, x = latents(model, batch, height, width)
    memory = LiveMemory()

    def measured(base_model, take):
        with memory:
            return take()

    pass_gradient(model, x_source, x, conditioning(rows=batch, seed=1), mode, measured)
    estimate = graph_memory(model.model.diffusion_model, x.shape, mode, torch.float32)
    assert 1.0 <= estimate / memory.peak <= 1.3


@pytest.mark.parametrize("mode", MODES)
def test_the_estimate_counts_the_copies_of_weights_that_are_cast(mode):
    model = loaded_model(weight_dtype=torch.float16, compute_dtype=torch.float32)
    x_source, x = latents(model, 1, 32, 32)
    memory = LiveMemory()

    def measured(base_model, take):
        with memory:
            return take()

    pass_gradient(model, x_source, x, conditioning(seed=1), mode, measured)
    estimate = guided_pass_memory(model, x.shape, mode)
    assert 1.0 <= estimate / memory.peak <= 1.4
    uncast = graph_memory(model.model.diffusion_model, x.shape, mode, torch.float32)
    assert uncast < 0.9 * estimate


def test_the_level_rises_until_the_pass_fits(model, monkeypatch):
    x = torch.zeros(1, 4, 32, 32)
    half = loaded_model(weight_dtype=torch.float16, compute_dtype=torch.float32)
    unet = model.model.diffusion_model
    needs = {mode: graph_memory(unet, x.shape, mode, torch.float32) for mode in MODES}
    for free, least, expected in (
        (1 << 40, "none", "none"),
        (1 << 40, "feed-forward", "feed-forward"),
        (needs["none"] - 1, "none", "feed-forward"),
        (needs["feed-forward"], "none", "feed-forward"),
        (needs["feed-forward"] - 1, "none", "blocks"),
        (0, "none", "blocks"),
    ):
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, free=free: free)
        assert affordable_mode(model, x, least) == expected
        if free == needs["feed-forward"]:
            assert affordable_mode(half, x, least) == "blocks", "copies of its weights have to fit, too"


def test_less_is_asked_for_with_every_level_and_in_half_precision(model):
    unet = model.model.diffusion_model
    none, feed_forward, blocks = (graph_memory(unet, (1, 4, 32, 32), mode, torch.float32) for mode in MODES)
    assert none > 1.3 * feed_forward > 1.3 * 1.3 * blocks
    assert graph_memory(unet, (1, 4, 32, 32), "none", torch.float16) < 0.7 * none
    assert graph_memory(unet, (3, 4, 32, 32), "none", torch.float32) == pytest.approx(3 * none, rel=0.01)


def test_the_distances_gradient_counts_in_fp32_whatever_the_model_computes_in(model):
    unet = model.model.diffusion_model
    half, full = (
        graph_memory(unet, (1, 4, 32, 32), "none", dtype, tokens=1) for dtype in (torch.float16, torch.float32)
    )
    queries = 3 * 64 * 32**2 + 8 * 128 * 16**2  # at the sites of either size
    assert 2 * half - full >= 4 * queries


def asked_of_the_host(model, monkeypatch):
    asked = {}

    def load(models, **amounts):
        asked.update(amounts)
        return host_load(models, **amounts)

    host_load = comfy.model_management.load_models_gpu
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(comfy.model_management, "load_models_gpu", load)
        noise = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(5))
        texts = conditioning(seed=1), conditioning()
        empty = torch.zeros_like(noise)
        comfy.sample.sample(model, noise, 1, 2.0, "euler", "normal", *texts, empty, disable_pbar=True, seed=1)
    return asked


def test_the_host_is_asked_for_that_much_more(model, monkeypatch):
    before = asked_of_the_host(model, monkeypatch)
    amount = 3 * 2**30
    after = asked_of_the_host(announce_memory(model, amount), monkeypatch)
    more = after["minimum_memory_required"] - before["minimum_memory_required"]
    assert amount <= more <= 1.02 * amount
    assert after["memory_required"] - before["memory_required"] >= amount
    assert asked_of_the_host(model, monkeypatch) == before, "the user's MODEL asks for what it did"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("XPU out of memory, please use `empty_cache`"),
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_recognized(error):
    assert is_out_of_memory(error)


def test_a_real_allocation_that_fails_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not match"),
        RuntimeError("could not create a primitive descriptor for a matmul primitive"),
        ValueError("out of memory"),
        KeyError("x"),
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


def test_other_errors_are_not_taken_for_it_where_the_host_knows_no_such_class(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "OOM_EXCEPTION", Exception)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert is_out_of_memory(RuntimeError("device: out of memory"))
