"""What surrounds the pack's jobs inside UNet calls: caches of calls, compiled models, patches that read both texts, threads."""

import functools
import sys

import comfy.samplers
import plug_and_play_runs as plugged
import prompt_to_prompt_runs as prompted
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_easycache as caches
from pix2pix_zero.attention_patches.attention import cross_attention_sites
from pix2pix_zero.attention_patches.plug_and_play import feature_site
from pix2pix_zero.host.sampling.flow_edit import FlowEditing, flow_edit_latent
from pix2pix_zero.host.sampling.passes import UNetPasses
from pix2pix_zero.host.sampling.source import EditGuider
from pix2pix_zero.host.unet.jobs import for_own_sampler
from pix2pix_zero.host.unet.map_jobs import Checkpointing
from pix2pix_zero.host.views.attention_heat import mean_attention
from pix2pix_zero.host.views.feature_pictures import feature_pictures
from small_edit import edit, invert
from small_unet import changed, conditioning, latent, loaded_small_model

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")


@pytest.fixture(scope="module")
def inversion(model):
    return invert(model)


@pytest.fixture(scope="module")
def inversion_of_text(model, clip):
    return prompted.invert(model, clip)


@pytest.fixture(scope="module")
def plain(model, inversion):
    """`plain(preset)`: the edit with the model alone."""
    return functools.cache(lambda preset: edit(model, inversion, preset=preset))


def cached(model, kind):
    with torch.inference_mode():
        return getattr(caches, f"{kind}Node").execute(model, 0.2, 0.0, 1.0, False).result[0]


def inverted_edited_and_flowed(model, inversion=None):
    """(inversion, {way: picture}) of a model; the edits are of `inversion`, by default its own."""
    ours = invert(model, steps=6)
    pictures = {preset: edit(model, inversion or ours, preset=preset) for preset in ("default", "official")}
    with torch.inference_mode():
        texts = conditioning(), conditioning(seed=1)
        pictures["flow"] = flow_edit_latent(model, *texts, None, latent(), FlowEditing(steps=12))[0]
    return ours, pictures


@pytest.fixture(scope="module")
def without_a_cache(model):
    return inverted_edited_and_flowed(model)


@pytest.mark.parametrize("kind", ["EasyCache", "LazyCache"])
def test_the_hosts_caches_of_unet_calls_leave_inversion_and_edit_as_they_are(model, without_a_cache, kind):
    patched = cached(model, kind)
    wrappers = repr(patched.wrappers)
    inversion, expected = without_a_cache
    again, pictures = inverted_edited_and_flowed(patched, inversion)
    assert torch.equal(again.trajectory, inversion.trajectory)
    for way, picture in pictures.items():
        assert torch.equal(picture, expected[way]), way
    assert repr(patched.wrappers) == wrappers


@pytest.mark.parametrize("action", ["invert", "record", "match", "match alone"])
def test_a_node_that_leaves_out_unet_calls_is_named(model, inversion, action):
    """As TeaCache and the like do; the source's maps are recorded, or the edit's matched, in the calls left out."""
    lazy = model.clone()
    kept = 0

    def leave_out(executor, x, *args, **kwargs):
        nonlocal kept
        kept += 1
        return torch.zeros_like(x)

    lazy.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "lazy", leave_out)
    with pytest.raises(ValueError, match="model: another node .* leaves out UNet calls"):
        if action == "invert":
            invert(lazy)
        elif action == "record":
            edit(lazy, inversion)
        elif action == "match":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("pix2pix_zero.host.sampling.edit.attention_state", lambda model: inversion.maps.made_with)
                edit(lazy, inversion)
        else:
            edit(lazy, inversion, preset="official")
    assert kept == (2 if action == "invert" else 1), "the first call of an inversion sees the picture, on no level"


def answering_alone(model, kind):
    """A model whose UNet is not called any more: by a wrapper of one of the kinds in which such nodes are written."""
    lazy = model.clone()
    if kind == "a function around the model":
        lazy.set_model_unet_function_wrapper(lambda apply, args: torch.zeros_like(args["input"]))
    elif kind == "a wrapper inside the model":
        lazy.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "lazy", lambda _, x, *args, **kwargs: torch.zeros_like(x))
    else:
        lazy.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "lazy", _zeros_of_each)
    return lazy


def _zeros_of_each(executor, model, conds, x, *args, **kwargs):
    return [torch.zeros_like(x) for _ in conds]


READERS = {
    "KSampler": lambda model, inversion, clip: edit(model, inversion, strength=0.1),
    "official": lambda model, inversion, clip: edit(model, inversion, preset="official"),
    "features": lambda model, inversion, clip: edit(model, inversion, strength=0.0, feature_until=0.5),
    "Invert Picture": lambda model, inversion, clip: invert(model),
    "Plug-and-Play": lambda model, inversion, clip: plugged.sample(plugged.patch(model, inversion), inversion),
    "Prompt-to-Prompt": lambda model, inversion, clip: prompted.edit(model, inversion, clip, "a dog on a sofa"),
    "Attention Heatmap": lambda model, inversion, clip: mean_attention(model, inversion, 77, (0.0, 1.0), "all"),
    "Feature PCA": lambda model, inversion, clip: feature_pictures(model, inversion, "queries", 0.5),
}


KINDS = ("a function around the model", "a wrapper inside the model", "a wrapper of all texts")
# What puts the source's features into a call has nothing to do where there is none.
PUTS = ("features", "Plug-and-Play")


@pytest.mark.parametrize(
    ("reader", "kind"), [(reader, kind) for reader in READERS for kind in KINDS[: 2 if reader in PUTS else 3]]
)
def test_all_that_reads_the_unet_says_so_where_it_is_not_called(model, clip, inversion_of_text, reader, kind):
    with pytest.raises(ValueError, match="model: another node .* leaves out UNet calls"), torch.inference_mode():
        READERS[reader](answering_alone(model, kind), inversion_of_text, clip)


def test_a_node_that_leaves_the_unet_half_way_is_named():
    """Some of the features are read then, and the others, of the outer level, are missing."""
    with changed({"transformer_depth_output": [1, 1, 1, 1]}):
        model = loaded_small_model()
    lazy, inversion = model.clone(), plugged.invert(model, steps=2)
    unet = model.model.diffusion_model
    (further, *_) = unet.output_blocks[feature_site(unet).number + 1]

    def leave(executor, x, *args, **kwargs):
        with further.register_forward_pre_hook(_stop_iteration):
            try:
                return executor(x, *args, **kwargs)
            except StopIteration:
                return torch.zeros_like(x)

    lazy.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "lazy", leave)
    with pytest.raises(ValueError, match="model: another node .* leaves out UNet calls"):
        plugged.sample(plugged.patch(lazy, inversion), inversion)


def _stop_iteration(*args):
    raise StopIteration


def with_nag(model):
    nodes = pytest.importorskip("comfy_extras.nodes_nag", reason="this ComfyUI has no NAGuidance")
    with torch.inference_mode():
        return nodes.NAGuidance.execute(model, 5.0, 0.5, 1.5).result[0]


def gradient_of_both(model, positive, negative, source, x, x_source, sigma):
    """(estimates' mixture, gradient, distance) of one guided evaluation at cfg 2, by the pack."""
    found = []

    def walk(model_k, noise, sigmas, extra_args, callback, disable):
        model_k.inner_model.add_source(x_source)
        passes = UNetPasses(
            model_k, extra_args, cross_attention_sites(model.model.diffusion_model), Checkpointing("none", sys.maxsize)
        )
        reference = passes.record_maps("source", x_source.clone(), sigma)
        found.extend(passes.denoise_and_match(x.clone(), sigma, reference))
        return noise

    with torch.inference_mode():
        guider = EditGuider(for_own_sampler(model))
        guider.inner_set_conds({"positive": positive, "negative": negative, "source": source})
        guider.set_cfg(2.0)
        sigmas = torch.tensor([sigma, 0.0])
        guider.sample(torch.zeros_like(x), x, comfy.samplers.KSAMPLER(walk), sigmas, seed=0, disable_pbar=True)
    return found


def test_a_patch_that_reads_both_texts_acts_in_guided_steps(model):
    """The estimate is the stock guider's, and the gradient that of central differences of the distance."""
    patched = with_nag(model)
    sigma = float(model.model.model_sampling.sigmas[500])
    generator = torch.Generator().manual_seed(2)
    x = (1 + sigma**2) ** 0.5 * torch.randn(1, 4, 8, 8, generator=generator)
    x_source = x + 0.3 * torch.randn(x.shape, generator=generator)
    texts = conditioning(seed=1), conditioning(seed=2), conditioning()
    denoised, gradient, distance = gradient_of_both(patched, *texts, x, x_source, sigma)
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(*texts[:2])
        guider.set_cfg(2.0)
        one_step = []

        def walk(model_k, noise, sigmas, extra_args, callback, disable):
            one_step.append(model_k(x.clone(), x.new_full((1,), sigma), **extra_args))
            return noise

        sigmas = torch.tensor([sigma, 0.0])
        guider.sample(torch.zeros_like(x), x, comfy.samplers.KSAMPLER(walk), sigmas, seed=0, disable_pbar=True)
    assert (denoised - one_step[0]).abs().max() <= 1e-5 * one_step[0].abs().max()
    assert (gradient_of_both(model, *texts, x, x_source, sigma)[1] - gradient).norm() > 0.05 * gradient.norm()
    direction = gradient / gradient.norm()
    size = 2e-2
    ahead, behind = (
        gradient_of_both(patched, *texts, x + step * direction, x_source, sigma)[2] for step in (size, -size)
    )
    assert float((ahead - behind) / (2 * size)) == pytest.approx(float(gradient.norm()), rel=0.02)
    assert distance > 0


@pytest.mark.parametrize("preset", ["default", "fast", "low memory"])
def test_naguidance_changes_a_guided_edit(model, inversion, plain, preset):
    changed = edit(with_nag(model), inversion, preset=preset) - plain(preset)
    assert changed.abs().max() > 1e-2 * plain(preset).std()


@pytest.mark.parametrize("case", ["official", "short of memory"])
def test_a_patch_that_cannot_see_both_texts_is_told_of(model, inversion, monkeypatch, caplog, case):
    if case != "official":
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, **kwargs: 0)
    edit(with_nag(model), inversion, preset="official" if case == "official" else "default")
    assert len([record for record in caplog.records if "NAGuidance" in record.message]) == 1


@pytest.fixture(scope="module")
def inversion_of_two(model):
    return invert(model, picture=latent(2))


@pytest.mark.parametrize("preset", ["default", "official"])
@pytest.mark.parametrize("feature_until", [0.0, 0.6])
def test_an_edit_is_the_same_where_the_host_deals_batches_out_to_threads(
    model, inversion_of_two, preset, feature_until
):
    """Two devices of a machine, both of them its CPU; the second has a model of its own."""
    multigpu = pytest.importorskip("comfy.multigpu", reason="this ComfyUI works on one device")
    second = loaded_small_model()
    threads = set()

    def deal_out(executor, guider, sigmas, extra_args, *args, **kwargs):
        devices = {torch.device("cpu"): guider.model_patcher, torch.device("cpu", 0): second}
        pool = multigpu.MultiGPUThreadPool(list(devices))
        options = {**extra_args["model_options"], "multigpu_clones": devices, "multigpu_thread_pool": pool}
        try:
            return executor(guider, sigmas, {**extra_args, "model_options": options}, *args, **kwargs)
        finally:
            pool.shutdown()

    def note(executor, *args, **kwargs):
        threads.add(args[5].get("multigpu_thread_device"))
        return executor(*args, **kwargs)

    dealt = model.clone()
    dealt.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "two devices", deal_out)
    dealt.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "two devices", note)
    second.model.current_patcher = second
    settings = {"preset": preset, "feature_until": feature_until, "window": (0.0, 0.5)}
    expected = edit(model, inversion_of_two, **settings)
    result = edit(dealt, inversion_of_two, **settings)
    assert (result - expected).abs().max() <= 1e-4 * expected.std()
    # The authors' update evaluates one text at a time.
    used = {torch.device("cpu")} if preset == "official" else {torch.device("cpu"), torch.device("cpu", 0)}
    assert threads == {None, *used}
