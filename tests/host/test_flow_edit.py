"""FlowEdit through the real guider: on models that diffuse, on the same as flow models, with masks and batches."""

from dataclasses import replace

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from pix2pix_zero.demo_model.flow_view import as_flow
from pix2pix_zero.editing.flow_edit import FlowEditSettings
from pix2pix_zero.host.sampling.flow_edit import FlowEditing, flow_edit_latent
from small_unet import conditioning, latent, loaded_small_model

import nodes as core

SETTINGS = FlowEditing(steps=4, cfg=2.0, skip=0.25, local_blend=0.0, averaging=FlowEditSettings(consistency=0.0))
MODEL_TYPES = [comfy.model_base.ModelType.EPS, comfy.model_base.ModelType.V_PREDICTION]


@pytest.fixture(scope="module", params=MODEL_TYPES, ids=["eps", "v"])
def model(request):
    return loaded_small_model(model_type=request.param)


@torch.inference_mode()
def edit(model, picture=None, source=None, target=None, negative=None, **changes):
    picture = picture or latent()
    rows = len(picture["samples"])
    texts = source or conditioning(rows, seed=0), target or conditioning(rows, seed=1)
    return flow_edit_latent(model, *texts, negative, picture, replace(SETTINGS, **changes))


def relative(a, b):
    return float((a - b).norm() / b.norm())


@torch.inference_mode()
def by_the_papers_formulas(model, picture, source, target, settings):
    """FlowEdit with velocities of straight paths, asking the host's BaseModel itself; the source is the negative."""
    base = model.model
    sigmas = comfy.samplers.calculate_sigmas(base.model_sampling, settings.scheduler, settings.steps)
    shares = [float(sigma / (1 + sigma)) for sigma in sigmas][1:]
    x0 = base.process_latent_in(picture)
    generator = torch.Generator().manual_seed(settings.seed)
    edited = x0.double()

    def velocity(x, s, text):
        sigma = torch.full((len(x),), s / (1 - s))
        denoised = base.apply_model((x / (1 - s)).float(), sigma, c_crossattn=text).double()
        return (x - denoised) / s

    for s, s_next in zip(shares, shares[1:]):
        q = (1 - s) * x0.double() + s * torch.randn(1, *x0.shape[1:], generator=generator).double()
        p = edited + q - x0
        own, other = velocity(p, s, source), velocity(p, s, target)
        edited = edited + (s_next - s) * (own + settings.cfg * (other - own) - velocity(q, s, source))
    return base.process_latent_out(edited)


def test_it_is_the_papers_algorithm(model):
    picture, source, target = latent(), conditioning(seed=0), conditioning(seed=1)
    edited, area = edit(model, picture)
    expected = by_the_papers_formulas(model, picture["samples"], source[0][0], target[0][0], SETTINGS)
    assert relative(edited - picture["samples"], expected - picture["samples"]) <= 1e-4
    assert relative(edited, picture["samples"]) > 0.01
    assert area.shape == (1, 64, 64) and area.min() == 1


@pytest.mark.parametrize("negative", [None, conditioning(seed=5)], ids=["source", "own"])
def test_the_unedited_text_gives_the_picture_back(model, negative):
    text, picture = conditioning(seed=0), latent()
    source_cfg = 1.0 if negative is None else 2.0
    edited, _ = edit(model, picture, text, text, negative, source_cfg=source_cfg, seed=7)
    assert relative(edited, picture["samples"]) <= 1e-5


@pytest.mark.works("FlowEdit", family=("sd15", "flow"))
def test_a_model_and_its_view_as_a_flow_draw_the_same(model):
    options = {"local_blend": 0.3, "averaging": FlowEditSettings(2, 0.02)}
    plain, plain_area = edit(model, **options)
    flow, flow_area = edit(as_flow(model), **options)
    assert relative(flow, plain) <= 1e-4
    torch.testing.assert_close(flow_area, plain_area, rtol=0, atol=1e-3)


def test_batches_equal_single_runs(model):
    both = latent(batch=2)
    source, target = conditioning(2, seed=0), conditioning(2, seed=1)
    edited, area = edit(model, both, source, target, local_blend=0.2)
    for i in range(2):
        one = ([[text[i : i + 1], {}]] for ((text, _),) in (source, target))
        alone, alone_area = edit(model, {"samples": both["samples"][i : i + 1]}, *one, local_blend=0.2)
        assert relative(edited[i : i + 1], alone) <= 1e-5
        torch.testing.assert_close(area[i : i + 1], alone_area, rtol=0, atol=1e-3)


@pytest.mark.parametrize("differential", [False, True])
def test_masks_keep_the_rest_exactly(model, differential):
    mask = torch.zeros(1, 16, 16)
    mask[..., :8] = 1.0
    if differential:
        model = DifferentialDiffusion.execute(model).result[0]
    picture = core.SetLatentNoiseMask().set_mask(latent(), mask)[0]
    for edited, area in (edit(model, picture), edit(model, mask=mask)):
        changed = (edited - picture["samples"]).abs()
        assert changed[..., 4:].max() <= 1e-5 and changed[..., :3].max() > 0.1
        assert area[..., 40:].max() == 0 and area[..., :24].min() == 1


def test_every_knob_acts(model):
    negative = conditioning(seed=5)
    plain, _ = edit(model, negative=negative)
    changes = {
        "cfg": 4.0,
        "skip": 0.5,
        "seed": 1,
        "scheduler": "ddim_uniform",
        "source_cfg": 2.0,
        "local_blend": 0.6,
        "averaging": FlowEditSettings(2, 0.0),
    }
    for name, value in changes.items():
        assert relative(edit(model, negative=negative, **{name: value})[0], plain) > 1e-3, name
    consistent, _ = edit(model, negative=negative, averaging=FlowEditSettings(consistency=0.1))
    source = latent()["samples"]
    assert relative(consistent, source) < relative(plain, source)
    assert relative(edit(model)[0], plain) > 1e-3, "negative"


def test_the_preset_for_the_whole_picture_leaves_out_what_holds_its_light(model):
    set_otherwise = {"skip": 0.5, "local_blend": 0.6, "averaging": FlowEditSettings(2, 0.1)}
    expected, _ = edit(model, skip=0.0, local_blend=0.0, averaging=FlowEditSettings(2, 0.0))
    edited, area = edit(model, preset="whole picture", **set_otherwise)
    assert torch.equal(edited, expected) and area.min() == 1


@pytest.mark.parametrize(("threshold", "skip", "advised"), [(1e-4, 0.25, True), (1e-4, 0.0, False), (1.0, 0.25, False)])
def test_the_node_advises_the_preset_where_the_texts_differ_everywhere(model, caplog, threshold, skip, advised):
    edit(model, local_blend=threshold, skip=skip)
    assert ("choose the preset whole picture" in caplog.text) == advised


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source_cfg": 2.0}, "source_cfg: without a negative"),
        ({"cfg": float("nan")}, "cfg: nan"),
        ({"steps": 2000}, "steps: 2000 is outside 1 to 1000"),
        ({"picture": {"samples": torch.ones(1, 3, 8, 8)}}, "latent_image: its shape"),
        ({"target": conditioning(3, seed=1)}, "target: it holds 3 texts for 1 pictures"),
        ({"source": []}, "source: it is empty"),
        ({"mask": torch.full((1, 8, 8), float("nan"))}, "mask: it contains NaN"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_socket(model, options, words):
    if options.get("source") == []:
        with pytest.raises(ValueError, match=words), torch.inference_mode():
            flow_edit_latent(model, [], conditioning(), None, latent(), SETTINGS)
        return
    with pytest.raises(ValueError, match=words):
        edit(model, **options)


def test_the_model_is_left_as_it_was(model):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    def stock():
        with torch.inference_mode():
            texts, empty = (conditioning(seed=1), conditioning()), torch.zeros_like(noise)
            return comfy.sample.sample(
                model, noise, 2, 2.0, "euler", "normal", *texts, empty, disable_pbar=True, seed=1
            )

    before = stock()
    edit(model)
    assert torch.equal(stock(), before)
