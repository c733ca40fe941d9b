"""Every UNet family that ComfyUI loads: its sites, inversion, guided edit, gradient and memory.

The UNets have each family's exact blocks, found by ComfyUI's own detection, with few channels and random weights.
"""

import functools

import comfy.samplers
import pytest
import torch
from families import HEIGHT, TOKENS, WIDTH, Float64UNet, few_transformers, picture, small_family, texts
from pix2pix_zero.attention_patches.attention import attends_to_itself, cross_attention_sites
from pix2pix_zero.benchmarks.families_parts.architectures import COMMON, FAMILIES, detected, file_of
from pix2pix_zero.benchmarks.families_parts.live_memory import LiveMemory
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from pix2pix_zero.host.sampling.passes import UNetPasses
from pix2pix_zero.host.unet.jobs import for_own_sampler
from pix2pix_zero.host.unet.map_jobs import MatchMaps
from pix2pix_zero.host.unet.memory import guided_pass_memory

TIMESTEP = 500
REGULARIZATION = NoiseRegularization(kl_weight=1.0, steps=1, rolls=2)


@functools.cache
def loaded(name, few=False):
    """`few`: with no more than `few_transformers`."""
    changes = few_transformers(name) if few else {}
    if few and not changes:
        return loaded(name)
    with torch.inference_mode():
        return small_family(name, **changes)


@pytest.fixture(scope="module", autouse=True)
def models_are_released():
    yield
    loaded.cache_clear()


@torch.inference_mode()
def invert(model, source, steps=2, method="direct", **options):
    return invert_latent(model, source, picture(model), InversionSettings(steps, 5, REGULARIZATION, method, **options))


@torch.inference_mode()
def edit(model, inversion, positive, negative=None, cfg=2.0, strength=0.01, **options):
    return sample_edit(
        model, inversion, positive, negative or inversion.source, EditSettings(cfg, strength, **options)
    )[0]


@torch.inference_mode()
def in_guider(model, source, positive, act, size=(HEIGHT, WIDTH)):
    """`act(passes, sigma)` inside the guider's sampling, where the guided sampler runs."""
    sigma = float(model.model.model_sampling.sigmas[TIMESTEP])

    def walk(model_k, noise, sigmas, extra_args, callback, disable):
        act(UNetPasses(model_k, extra_args, cross_attention_sites(model.model.diffusion_model)), sigma)
        return noise

    guider = comfy.samplers.CFGGuider(for_own_sampler(model))
    guider.inner_set_conds({"positive": positive, "negative": source, "source": source})
    empty = torch.zeros(1, 4, *size)
    guider.sample(empty, empty, comfy.samplers.KSAMPLER(walk), torch.tensor([sigma, 0.0]), seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_takes_a_file_of_these_shapes_for_the_family(family):
    described = FAMILIES[family]
    file = file_of(described)
    config = detected(file)
    assert type(config).__name__ == described.loads_as
    expected = COMMON | described.settings
    assert {name: config.unet_config.get(name) for name in expected} == expected
    prediction = {"eps": "EPS", "v": "V_PREDICTION"}[described.prediction]
    assert config.model_type(file).name == prediction


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_those_that_the_forward_pass_comes_by(family):
    model = loaded(family)
    settings = FAMILIES[family].settings
    sites = cross_attention_sites(model.model.diffusion_model)
    depths = [
        *settings["transformer_depth"],
        settings["transformer_depth_middle"],
        *settings["transformer_depth_output"],
    ]
    assert len(sites) == FAMILIES[family].sites == sum(max(0, depth) for depth in depths)
    passed, seen = [], []

    def note(q, k, v, options):
        passed.append((*options["block"], options["block_index"]))
        seen.append(q is k)
        return q, k, v

    patched = model.clone()
    patched.set_model_attn2_patch(note)
    patched.set_model_attn1_patch(note)
    invert(patched, texts(family), steps=1, method="ddim", map_memory=0)
    assert passed[1::2] == passed[::2] == sites
    unet = model.model.diffusion_model
    assert [attends_to_itself(unet, site) for site in sites] == seen[::2]


@pytest.mark.works("Invert Picture", "KSampler")
@pytest.mark.parametrize(
    "family",
    [
        "sd15",
        "sd21-v",
        "sdxl",
        "sdxl-refiner",
        "ssd-1b",
        "koala-700m",
        "sdxs-09",
        "sd15-inpaint",
        "sd15-pix2pix",
        "unclip-h",
    ],
)
def test_a_guided_edit_changes_the_picture_and_none_gives_it_back(family):
    model = loaded(family, few=True)
    before = {name: weight.clone() for name, weight in model.model.named_parameters()}
    source, positive = texts(family), texts(family, seed=1)
    inversion = invert(model, source)
    expected = picture(model)["samples"]
    again = edit(model, inversion, source, cfg=1.5)
    assert (again - expected).abs().max() <= 1e-3 * expected.std()
    edited = edit(model, inversion, positive)
    assert edited.isfinite().all()
    assert (edited - expected).std() > 0.01 * expected.std()
    unguided = edit(model, inversion, positive, strength=0.0)
    assert (edited - unguided).std() > 1e-4 * expected.std(), "guidance must matter"
    for name, weight in model.model.named_parameters():
        assert torch.equal(weight, before[name]) and weight.grad is None, name


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("sd15", "none"),
        ("sd20", "feed-forward"),
        ("sdxl", "blocks"),
        ("sdxl-inpaint", "none"),
        ("sdxl-refiner", "none"),
        ("ssd-1b", "blocks"),
        ("vega", "none"),
        ("koala-1b", "none"),
        ("sdxs-09", "blocks"),
        ("sd15-inpaint", "none"),
        ("sd15-pix2pix", "none"),
    ],
)
def test_gradient_is_that_of_ordinary_autograd_in_float64(family, mode):
    model = loaded(family)
    source, positive = texts(family), texts(family, seed=1)
    generator = torch.Generator().manual_seed(1)
    scale = float((1 + model.model.model_sampling.sigmas[TIMESTEP] ** 2) ** 0.5)
    x = scale * torch.randn(1, 4, HEIGHT, WIDTH, generator=generator)
    x_source = x + 0.3 * scale * torch.randn(x.shape, generator=generator)
    found = []

    def act(passes, sigma):
        passes.checkpointing.mode = mode
        reference = passes.record_maps("source", x_source.clone(), sigma)
        found.extend(passes.map_gradient("positive", x.clone(), sigma, reference))

    in_guider(model, source, positive, act)
    expected, expected_distance = Float64UNet(family, model).gradient(TIMESTEP, x_source, x, source, positive)
    assert expected.abs().max() > 0
    assert float((found[0] - expected).norm() / expected.norm()) <= 1e-4
    torch.testing.assert_close(found[1].double(), expected_distance, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("sd15", "none"),
        ("sdxl", "feed-forward"),
        ("sdxl-refiner", "none"),
        ("ssd-1b", "feed-forward"),
        ("koala-700m", "blocks"),
    ],
)
def test_memory_of_a_guided_pass_is_what_is_asked_for_or_a_little_less(family, mode, monkeypatch):
    model = loaded(family)
    side = 32
    x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))
    memory, run = LiveMemory(), MatchMaps.run

    def measured(job, call):
        with memory:
            return run(job, call)

    held = 0

    def act(passes, sigma):
        nonlocal held
        passes.checkpointing.mode = mode
        reference = passes.record_maps("source", x.clone(), sigma)
        held = sum(maps.nbytes for maps in reference.values())
        with monkeypatch.context() as patch:
            patch.setattr(MatchMaps, "run", measured)
            passes.denoise_and_match(1.1 * x, sigma, reference)

    in_guider(model, texts(family), texts(family, seed=1), act, (side, side))
    estimate = guided_pass_memory(model, x.shape, mode, TOKENS)
    assert 1.0 <= estimate / memory.peak <= 1.2
    assert guided_pass_memory(model, x.shape, mode, TOKENS, records=True) == estimate + held
    assert guided_pass_memory(model, x.shape, mode, 20 * TOKENS) > estimate, "longer texts have larger maps"
