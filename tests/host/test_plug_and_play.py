"""Plug-and-Play in the stock samplers, against features recorded with forward hooks on an untouched UNet."""

import contextlib

import comfy.controlnet
import comfy.hooks
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy_extras import nodes_custom_sampler as stock
from pix2pix_zero.attention_patches.plug_and_play import ResidualSite, feature_site, self_attention_sites
from pix2pix_zero.benchmarks.judge import load_judge
from pix2pix_zero.benchmarks.quality_parts.figures import measure
from pix2pix_zero.benchmarks.quality_parts.scenes import EDITS, draw_scenes
from pix2pix_zero.benchmarks.quality_parts.workbench import DemoModels, Workbench
from pix2pix_zero.editing import ddim
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host import sampling
from pix2pix_zero.host.gradients import uncompiled
from pix2pix_zero.host.plug_and_play import latent_at, lowest_level
from pix2pix_zero.nodes.plug_and_play import Pix2PixZeroPlugAndPlay
from small_unet import CONFIG, SmallSD, conditioning, latent, small_model

import nodes as host_nodes

STEPS = 5
OFF = NoiseRegularization(steps=0)
SITES = [(number, 0) for number in (1, 2, 3)]  # of the small UNet's decoder attention, from its feature block on
SD15 = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=320,
    num_res_blocks=[2] * 4,
    channel_mult=[1, 2, 4, 4],
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_middle=1,
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    context_dim=768,
    num_heads=8,
    use_spatial_transformer=True,
    legacy=False,
)
SDXL = SD15 | dict(
    num_res_blocks=[2] * 3,
    channel_mult=[1, 2, 4],
    transformer_depth=[0, 0, 2, 2, 10, 10],
    transformer_depth_middle=10,
    transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
    context_dim=2048,
    num_heads=-1,
    num_head_channels=64,
    use_linear_in_transformer=True,
    num_classes="sequential",
    adm_in_channels=2816,
)


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        model = small_model()
        comfy.model_management.load_models_gpu([model])
        return model


@pytest.fixture(scope="module")
def inversion(model):
    return invert(model)


@torch.inference_mode()
def invert(model, picture=None, positive=None, steps=STEPS):
    return sampling.invert_latent(model, positive or conditioning(), picture or latent(), steps, 0, OFF, "ddim")


@torch.inference_mode()
def patch(model, inversion, feature_until=1.0, attention_until=1.0, negative_alpha=1.0):
    return Pix2PixZeroPlugAndPlay.execute(model, inversion, feature_until, attention_until, negative_alpha).result[0]


@torch.inference_mode()
def sample(model, inversion, positive=None, negative=None, cfg=2.0, sampler="euler", noise=None, sigmas=None):
    """As a user wires it: the inversion's noise and sigmas into SamplerCustomAdvanced, with DisableNoise."""
    noise = {"samples": sampling.inverted_noise(inversion, model) if noise is None else noise}
    positive, negative = positive or conditioning(seed=1), negative or conditioning(seed=2)
    (guider,) = stock.CFGGuider.execute(model, positive, negative, cfg).result
    (nothing,) = stock.DisableNoise.execute().result
    (sampler,) = stock.KSamplerSelect.execute(sampler).result
    sigmas = inversion.sigmas.flip(0) if sigmas is None else sigmas
    return stock.SamplerCustomAdvanced.execute(nothing, guider, sampler, sigmas, noise).result[0]["samples"]


class Recorder:
    """What the UNet went on with in each of its calls: `branch` [rows, C, H, W], `q` and `k` by decoder block."""

    def __init__(self):
        self.calls = []

    @contextlib.contextmanager
    def recording(self, unet):
        """By forward hooks alone. A residual block's branch is what it returned less its skip."""
        site = feature_site(unet)
        block = unet.output_blocks[site.number][site.index]
        handles = [
            unet.register_forward_pre_hook(lambda module, args: self.calls.append({})),
            block.register_forward_hook(
                lambda module, args, out: self.calls[-1].update(branch=out - module.skip_connection(args[0]))
            ),
        ]
        for number, index in SITES:
            attention = unet.output_blocks[number][1].transformer_blocks[index].attn1
            for name, layer in (("q", attention.to_q), ("k", attention.to_k), ("own v", attention.to_v)):
                handles.append(layer.register_forward_hook(self._keep((name, number))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name):
        return lambda module, args, out: self.calls[-1].setdefault(name, out)

    def patch(self, model):
        """Another pack's attn1 replace patches, which see the q and k that attention goes on with."""
        model = model.clone()

        def replace(number, index):
            def attend(q, k, v, extra_options):
                if extra_options["block_index"] == index:
                    self.calls[-1].update({("q", number): q, ("k", number): k, ("v", number): v})
                return comfy.ldm.modules.attention.attention_basic(q, k, v, extra_options["n_heads"])

            return attend

        for number, index in SITES:
            model.set_model_attn1_replace(replace(number, index), "output", number)
        return model


@torch.inference_mode()
def source_features(inversion, level, text, crop=slice(None), **extra):
    """The features of a fresh copy of the model at a latent of the trajectory."""
    fresh = small_model().model
    recorder = Recorder()
    x = inversion.trajectory[level][..., crop]
    with recorder.recording(fresh.diffusion_model):
        t = inversion.sigmas[level].repeat(len(x))
        fresh.apply_model(x, t, c_crossattn=text.expand(len(x), -1, -1), transformer_options={}, **extra)
    return without_values(recorder.calls[0])


def without_values(call):
    return {name: tensor for name, tensor in call.items() if name[0] != "own v"}


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.inference_mode()
def edited_calls(model, inversion, rows, positive=None, cfg=2.0, **windows):
    """The recorded UNet calls of the edit, without those of the source, which have a batch of their own."""
    recorder = Recorder()
    patched = patch(recorder.patch(model), inversion, **windows)
    with recorder.recording(model.model.diffusion_model):
        sample(patched, inversion, positive, cfg=cfg)
    return [call for call in recorder.calls if len(call.get("branch", ())) == rows]


@pytest.fixture(scope="module")
def bench():
    edit = EDITS["cat2dog"]
    with torch.inference_mode():
        bench = Workbench(DemoModels.load(), edit, draw_scenes(edit, 5, 400_000), 20)
        bench.inversion()
        return bench


@torch.inference_mode()
def draw(bench, model, positive, cfg):
    return bench.vae.decode(sample(model, bench.inversion(), positive, bench.described, cfg))


def test_the_source_text_brings_the_demo_pictures_back_better_than_plain_sampling(bench):
    injected = patch(bench.model, bench.inversion())
    plain, ours = (draw(bench, m, bench.described, 1.0) - bench.source for m in (bench.model, injected))
    assert ours.abs().mean() < 0.7 * plain.abs().mean()


def test_the_demo_cats_become_dogs_where_they_sit(bench):
    injected, judge = patch(bench.model, bench.inversion(), 0.6, 0.5), load_judge()
    plain, ours = (measure(bench, judge, draw(bench, m, bench.wanted, 2.5)) for m in (bench.model, injected))
    assert ours["hit"].mean() >= 0.8
    assert ours["background"].mean() < 0.5 * plain["background"].mean()
    assert ours["whole"].mean() < 0.6 * plain["whole"].mean()


@pytest.mark.parametrize("pictures", [1, 2])
def test_features_and_attention_of_both_halves_are_the_sources(model, pictures):
    inversion = invert(model, latent(batch=pictures))
    calls = edited_calls(model, inversion, rows=2 * pictures)
    assert len(calls) == STEPS
    for call, level in zip(calls, range(STEPS, 0, -1)):
        source = source_features(inversion, level, conditioning()[0][0])
        for name, expected in source.items():
            for half in call[name].chunk(2):
                assert distance(half, expected) < 1e-5, (level, name)


def test_the_values_of_attention_stay_the_edits_own(model, inversion):
    for call in edited_calls(model, inversion, rows=2):
        for number, _ in SITES:
            assert torch.equal(call["v", number], call["own v", number])


def test_each_window_ends_after_its_share_of_the_steps(model, inversion):
    calls = edited_calls(model, inversion, rows=2, feature_until=0.6, attention_until=0.4)
    for step, call in enumerate(calls):
        source = source_features(inversion, STEPS - step, conditioning()[0][0])
        assert (distance(call["branch"][:1], source["branch"]) < 1e-5) == (step < 3)
        for number, _ in SITES[
            1:
        ]:  # the first one's q and k follow from the features alone, up to what the skip brings
            assert (distance(call["q", number][:1], source["q", number]) < 1e-5) == (step < 2)
            assert (distance(call["k", number][:1], source["k", number]) < 1e-5) == (step < 2)


def test_halves_that_run_apart_are_replaced_too(model, inversion, monkeypatch):
    together = sample(patch(model, inversion), inversion)
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: 2**62)
    apart = sample(patch(model, inversion), inversion)
    assert (together - apart).abs().max() < 1e-4 * together.std()


def test_without_windows_it_is_the_stock_sampler(model, inversion):
    assert torch.equal(sample(patch(model, inversion, 0.0, 0.0), inversion), sample(model, inversion))


def test_a_batch_equals_single_runs(model):
    texts, edits = conditioning(rows=2), conditioning(rows=2, seed=1)
    pictures = latent(batch=2, height=8, width=12)
    inversion = invert(model, pictures, texts)
    together = sample(patch(model, inversion, 0.8, 0.5), inversion, edits)
    for i in range(2):
        one = invert(model, {"samples": pictures["samples"][i : i + 1]}, [[texts[0][0][i : i + 1], {}]])
        alone = sample(patch(model, one, 0.8, 0.5), one, [[edits[0][0][i : i + 1], {}]])
        assert (together[i : i + 1] - alone).abs().max() < 1e-4 * alone.std()


def test_a_repeated_picture_takes_one_text_each(model, inversion):
    texts = conditioning(rows=2, seed=1)
    noise = sampling.inverted_noise(inversion, model).repeat(2, 1, 1, 1)
    both = sample(patch(model, inversion), inversion, texts, noise=noise)
    for i in range(2):
        alone = sample(patch(model, inversion), inversion, [[texts[0][0][i : i + 1], {}]])
        assert (both[i : i + 1] - alone).abs().max() < 1e-4 * alone.std()


def test_the_ksampler_node_gives_the_same(model, inversion, run_node):
    patched = patch(model, inversion, 0.8, 0.5)
    noise = {"samples": sampling.inverted_noise(inversion, model)}
    with torch.inference_mode():
        texts = conditioning(seed=1), conditioning(seed=2)
        (latents,) = host_nodes.KSamplerAdvanced().sample(
            patched, "disable", 0, STEPS, 2.0, "euler", "ddim_uniform", *texts, noise, 0, STEPS, "disable"
        )
    assert (latents["samples"] - sample(patched, inversion)).abs().max() < 1e-4 * latents["samples"].std()


def test_levels_between_those_of_the_inversion_lie_on_its_ddim_steps(inversion):
    for level in range(1, STEPS + 1):
        low, high = (inversion.sigmas[i].item() for i in (level - 1, level))
        x = inversion.trajectory[level]
        assert distance(latent_at(inversion, high), x) < 1e-6
        eps = (x - inversion.trajectory[level - 1]) / (high - low)
        between = 0.3 * low + 0.7 * high
        assert distance(latent_at(inversion, between), ddim.step(x, eps, high, between)) < 1e-5
    beyond = latent_at(inversion, 2 * high - low)
    assert distance(beyond, 2 * inversion.trajectory[-1] - inversion.trajectory[-2]) < 1e-5


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_other_samplers_and_schedules_are_served(model, inversion, sampler):
    sampling_of = model.get_model_object("model_sampling")
    karras = comfy.samplers.calculate_sigmas(sampling_of, "karras", 4)
    result = sample(patch(model, inversion, 0.8, 0.5), inversion, sampler=sampler, sigmas=karras)
    assert result.isfinite().all()
    assert not torch.equal(result, sample(model, inversion, sampler=sampler, sigmas=karras))


@pytest.mark.parametrize("share, level", [(0.0, None), (0.2, 5), (0.6, 3), (0.79, 2)])
def test_the_lowest_level_is_that_of_the_windows_last_step(inversion, share, level):
    lowest = lowest_level(inversion, share)
    active = [i for i in range(1, STEPS + 1) if inversion.sigmas[i] >= lowest]
    assert active == ([] if level is None else list(range(level, STEPS + 1)))


def test_an_area_of_the_edit_gets_the_features_of_that_part_of_the_picture(model):
    inversion = invert(model, latent(width=16))
    text = conditioning(seed=1)[0][0]
    control = AddToOutput()  # of the edit, and none of the source's business
    left = [[text, {"area": (8, 8, 0, 0), "strength": 1.0, "control": control}], [text, {}]]
    recorder = Recorder()
    patched = patch(recorder.patch(model), inversion)
    with recorder.recording(model.model.diffusion_model):
        sample(patched, inversion, left, cfg=1.0)
    cropped = [call for call in recorder.calls if call["branch"].shape[-1] == 4]
    expected = source_features(inversion, STEPS, conditioning()[0][0], crop=slice(0, 8))
    for name, features in expected.items():
        assert all(distance(call[name][:1], features) < 1e-5 for call in cropped[:2]), name


def test_parts_of_the_source_text_are_weighted_like_their_predictions(model):
    """Two masked halves, each with a text of its own: each pixel has the features of its half's text."""
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    a, b = conditioning()[0][0], conditioning(seed=5)[0][0]
    source = [[a, {"mask": left, "mask_strength": 1.0}], [b, {"mask": 1 - left, "mask_strength": 1.0}]]
    inversion = invert(model, positive=source)
    call = edited_calls(model, inversion, rows=1, cfg=1.0)[0]
    one, other = (source_features(inversion, STEPS, text) for text in (a, b))
    assert distance(call["branch"][:1, ..., :2], one["branch"][..., :2]) < 1e-5
    assert distance(call["branch"][:1, ..., 2:], other["branch"][..., 2:]) < 1e-5
    for name, size in ((("q", 1), (4, 4)), (("k", 3), (8, 8))):
        rows, ones, others = (t.unflatten(1, size) for t in (call[name][:1], one[name], other[name]))
        half = size[1] // 2
        assert distance(rows[:, :, :half], ones[:, :, :half]) < 1e-5
        assert distance(rows[:, :, half:], others[:, :, half:]) < 1e-5


class AddToOutput(comfy.controlnet.ControlBase):
    """A ControlNet that adds a constant to the decoder's inputs and notes what it was asked for."""

    def __init__(self):
        super().__init__()
        self.seen, self.started, self.cleaned = [], 0, 0

    def pre_run(self, model, percent_to_timestep_function):
        self.started += 1

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.seen.append(x_noisy)
        return {"output": [torch.full((1, 128, 1, 1), 0.5)]}

    def get_models(self):
        return []

    def copy(self):
        return self

    def cleanup(self):
        self.cleaned += 1


def test_a_controlnet_of_the_source_acts_on_the_source_alone(model):
    control = AddToOutput()
    source = [[conditioning()[0][0], {"control": control, "control_apply_to_uncond": True}]]
    inversion = invert(model, positive=source)
    control.seen, control.started, control.cleaned = [], 0, 0
    call = edited_calls(model, inversion, rows=2)[0]
    assert [control.started, control.cleaned] == [1, 1]
    assert all(torch.equal(x, inversion.trajectory[level]) for x, level in zip(control.seen, range(STEPS, 0, -1)))
    assert len(control.seen) == STEPS
    hint = {"output": [torch.full((1, 128, 1, 1), 0.5)]}
    expected = source_features(inversion, STEPS, conditioning()[0][0], control=hint)
    without = source_features(inversion, STEPS, conditioning()[0][0])
    for name in expected:
        assert distance(call[name][:1], expected[name]) < 1e-5
    assert distance(call["branch"][:1], without["branch"]) > 1e-3


def test_a_controlnet_of_the_edit_does_not_reach_the_source(model, inversion):
    control = AddToOutput()
    positive = [[conditioning(seed=1)[0][0], {"control": control, "control_apply_to_uncond": True}]]
    call = edited_calls(model, inversion, rows=2, positive=positive)[0]
    assert all(len(x) == 2 for x in control.seen)
    expected = source_features(inversion, STEPS, conditioning()[0][0])
    assert all(distance(call[name][:1], features) < 1e-5 for name, features in expected.items())


def test_an_sdxl_source_keeps_its_pooled_text():
    class SmallXL(SmallSD):
        latent_format = comfy.latent_formats.SDXL
        memory_usage_factor = 1.0

    def make():
        config = SmallXL({**CONFIG, "num_classes": "sequential", "adm_in_channels": 2816, "num_heads": 4})
        config.manual_cast_dtype = None
        network = comfy.model_base.SDXL(config, device="cpu")
        weights = torch.Generator().manual_seed(0)
        for parameter in network.diffusion_model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=weights) * 0.05
        return comfy.model_patcher.ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))

    def text(seed):
        pooled = torch.randn(1, 1280, generator=torch.Generator().manual_seed(seed))
        return [[conditioning(seed=seed)[0][0], {"pooled_output": pooled}]]

    with torch.inference_mode():
        model, fresh = make(), make().model
        inversion = invert(model, positive=text(0))
        recorder, reference = Recorder(), Recorder()
        with recorder.recording(model.model.diffusion_model):
            sample(patch(recorder.patch(model), inversion), inversion, text(1), text(2))
        with reference.recording(fresh.diffusion_model):
            x = inversion.trajectory[-1]
            y = fresh.encode_adm(pooled_output=text(0)[0][1]["pooled_output"], width=64, height=64)
            fresh.apply_model(x, inversion.sigmas[-1:], c_crossattn=text(0)[0][0], transformer_options={}, y=y)
    call = next(call for call in recorder.calls if len(call["branch"]) == 2)
    for name, expected in without_values(reference.calls[0]).items():
        assert distance(call[name][:1], expected) < 1e-5
        assert distance(call[name][1:], expected) < 1e-5


def test_the_negative_is_blended_with_the_source_text(model, inversion):
    sigma = inversion.sigmas[-1:]
    sigmas = torch.cat([sigma, sigma.new_zeros(1)])  # one euler step to 0: the result is the prediction

    def predict(m, negative, cfg):
        return model.model.process_latent_in(sample(m, inversion, negative=negative, cfg=cfg, sigmas=sigmas))

    edit, empty, source = (
        predict(model, negative, cfg)
        for negative, cfg in ((None, 1.0), (conditioning(seed=2), 0.0), (conditioning(), 0.0))
    )
    against = 0.75 * empty + 0.25 * source
    expected = against + 3.0 * (edit - against)
    blended = predict(patch(model, inversion, 0.0, 0.0, negative_alpha=0.75), conditioning(seed=2), 3.0)
    assert distance(blended, expected) < 1e-5
    assert distance(blended, empty + 3.0 * (edit - empty)) > 1e-3


def test_what_the_picture_masks_out_stays_as_it_is(model):
    picture = latent(batch=2)
    picture["noise_mask"] = torch.zeros(1, 8, 8)
    picture["noise_mask"][..., :4] = 1.0
    inversion = invert(model, picture)
    edited = sample(patch(model, inversion, 0.8, 0.5), inversion)
    assert (edited - picture["samples"])[..., 4:].abs().max() < 1e-5 * edited.std()
    assert (edited - picture["samples"])[..., :4].abs().mean() > 0.1


def test_the_later_of_two_nodes_counts(model, inversion):
    other = invert(model, latent(seed=9))
    twice = patch(patch(model, other, negative_alpha=0.5), inversion, 0.8, 0.5)
    assert torch.equal(sample(twice, inversion), sample(patch(model, inversion, 0.8, 0.5), inversion))


def test_compiled_code_does_not_keep_hooks_out():
    layer = torch.nn.Linear(2, 2, bias=False)
    compiled = torch.compile(layer, backend="eager")
    x = torch.ones(1, 2)
    with torch.inference_mode():
        plain = compiled(x)
        with layer.register_forward_hook(lambda module, args, out: out + 1):
            with uncompiled(layer):
                hooked = compiled(x)
        after = compiled(x)
    assert torch.equal(hooked, plain + 1)
    assert torch.equal(after, plain)


class Cancelled(BaseException):
    pass


@pytest.mark.parametrize("error", [None, RuntimeError, Cancelled])
def test_nothing_stays_on_the_model(model, inversion, error):
    unet = model.model.diffusion_model
    before = sample(model, inversion)
    state = [[dict(m.__dict__["_forward_hooks"]), m.__dict__.get("forward")] for m in unet.modules()]
    options, wrappers = repr(model.model_options), repr(model.wrappers)
    patched = patch(model, inversion)
    if error is None:
        sample(patched, inversion)
    else:
        failing = patched.clone()
        calls = []

        def fail(h, hsp, transformer_options):
            calls.append(h)
            if len(calls) == 14:  # within the decoder, past the feature block
                raise error
            return h, hsp

        failing.set_model_output_block_patch(fail)
        with pytest.raises(error):
            sample(failing, inversion)
    assert [[dict(m.__dict__["_forward_hooks"]), m.__dict__.get("forward")] for m in unet.modules()] == state
    assert (repr(model.model_options), repr(model.wrappers)) == (options, wrappers)
    assert torch.equal(sample(model, inversion), before)
    assert torch.equal(sample(patched, inversion), sample(patch(model, inversion), inversion))


def test_another_packs_patch_still_computes_the_attention(model, inversion):
    silenced = model.clone()
    silenced.set_model_attn1_replace(lambda q, k, v, extra_options: torch.zeros_like(q), "output", 2)
    result = sample(patch(silenced, inversion), inversion)
    assert not torch.equal(result, sample(patch(model, inversion), inversion))


def test_an_inversion_of_another_model_is_refused(inversion):
    with pytest.raises(ValueError, match="inversion: it was made with another model. Connect the same model"):
        patch(small_model(), inversion)


def test_a_model_that_is_no_unet_is_refused(model, inversion):
    other = model.clone()
    unet = model.model.diffusion_model
    try:
        model.model.diffusion_model = torch.nn.Linear(1, 1)
        with pytest.raises(ValueError, match="model: it is not a UNet.*Use an SD 1.x"):
            patch(other, inversion)
    finally:
        model.model.diffusion_model = unet


def test_a_latent_of_another_size_is_refused(model, inversion):
    with pytest.raises(ValueError, match="latent_image: its shape is.*Connect `noise`"):
        sample(patch(model, inversion), inversion, noise=latent(width=16)["samples"])


def test_noise_on_top_of_the_inversions_noise_is_refused(model, inversion):
    patched = patch(model, inversion)
    noise = {"samples": sampling.inverted_noise(inversion, model)}
    with torch.inference_mode(), pytest.raises(ValueError, match="noise: it would be added.*DisableNoise"):
        host_nodes.KSampler().sample(
            patched, 0, STEPS, 2.0, "euler", "ddim_uniform", conditioning(), conditioning(), noise
        )


def test_a_patch_that_cuts_attention_another_way_each_time_is_refused(model, inversion):
    tiled, calls = model.clone(), []

    def cut(n, context, value, extra_options):
        calls.append(n)
        return (n[:, ::2] if len(calls) > 8 else n), context, value

    tiled.set_model_attn1_patch(cut)
    tiled.set_model_attn1_output_patch(lambda n, extra_options: torch.cat([n, n], 1) if len(calls) > 8 else n)
    with pytest.raises(ValueError, match="model: another patch cuts the picture.*swap_size"):
        sample(patch(tiled, inversion), inversion)


def test_the_blocks_of_stable_diffusion_are_the_papers():
    unet = UNetModel(**SD15, device="meta")
    assert feature_site(unet) == ResidualSite(4, 0)
    assert [site.number for site in self_attention_sites(unet, 4)] == list(range(4, 12))


def test_sdxl_has_its_features_at_the_same_distance_from_the_latent():
    unet = UNetModel(**SDXL, device="meta")
    assert feature_site(unet) == ResidualSite(1, 0)
    attention = self_attention_sites(unet, 1)
    assert [attention.count(site) for site in set(attention)] == [1] * 26
    assert {site.number for site in attention} == {1, 2, 3, 4, 5}
