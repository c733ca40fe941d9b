"""Few-step models, rescaled noise schedules, and the models that cannot be inverted."""

import dataclasses
import weakref

import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM, ModelSamplingDiscrete
from pix2pix_zero.host.methods.prompt_to_prompt import PromptEditSettings, edit_by_prompt
from pix2pix_zero.host.sampling.checks import ON_THE_TABLE, ddim_grid
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.views.feature_pictures import feature_pictures
from pix2pix_zero.nodes.inversion import Pix2PixZeroInversion
from pix2pix_zero.nodes.plug_and_play import Pix2PixZeroPlugAndPlay
from pix2pix_zero.nodes.reference import Pix2PixZeroReference
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler
from small_unet import conditioning, latent, small_model

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")


@pytest.fixture(scope="module")
def models():
    """Plain, v-prediction, an LCM (50 noise levels), and v-prediction down from pure noise (zero terminal SNR)."""
    with torch.inference_mode():
        eps, v = small_model(), small_model(ModelType.V_PREDICTION)
        patch = ModelSamplingDiscrete().patch
        return {
            "eps": eps,
            "v": v,
            "lcm": patch(eps, "lcm", False)[0],
            "zsnr": patch(v, "v_prediction", True)[0],
        }


KINDS = ["eps", "v", "lcm", "zsnr"]
SETTINGS = dict(autocorrelation_weight=[0.0], kl_weight=[0.0], regularization_steps=[0], autocorrelation_rolls=[0])


def invert(run_node, model, steps, scheduler, method="direct"):
    (inversion,), _, (sigmas,), *_ = run_node(
        Pix2PixZeroInversion,
        model=[model],
        positive=[conditioning()],
        latent_image=[latent()],
        steps=[steps],
        seed=[0],
        method=[method],
        map_memory=[16],
        scheduler=[scheduler],
        **SETTINGS,
    )
    assert torch.equal(sigmas, inversion.sigmas.flip(0))
    return inversion


@torch.inference_mode()
def edit(model, inversion, positive, strength=1e-4, cfg=1.5, **options):
    return sample_edit(model, inversion, positive, conditioning(), EditSettings(cfg, strength, **options))[0]


@pytest.mark.parametrize("scheduler", ON_THE_TABLE)
@pytest.mark.parametrize("kind", KINDS)
def test_short_grids_are_levels_that_the_model_was_trained_on(models, kind, scheduler):
    model = models[kind]
    sampling = model.get_model_object("model_sampling")
    for steps in (1, 2, 3, 4, 6, 8, 50):
        *levels, last = ddim_grid(model, steps, scheduler)
        assert last == 0 and all(a > b for a, b in zip(levels, levels[1:]))
        timesteps = sampling.timestep(torch.stack(levels))
        torch.testing.assert_close(sampling.sigma(timesteps), torch.stack(levels), rtol=1e-5, atol=0)
        if scheduler == "simple":
            assert len(levels) == steps
            assert levels[0] == sampling.sigma_max, "it begins at pure noise"


def test_a_number_that_does_not_divide_the_table_gives_the_steps_that_the_tooltip_says(models):
    assert len(ddim_grid(models["eps"], 300)) - 1 == 333
    assert len(ddim_grid(models["eps"], 50)) - 1 == 50


@pytest.mark.parametrize(
    ("kind", "steps", "scheduler"),
    [
        ("eps", 1, "simple"),
        ("eps", 4, "ddim_uniform"),
        ("lcm", 1, "simple"),
        ("lcm", 2, "simple"),
        ("lcm", 4, "ddim_uniform"),
        ("lcm", 8, "simple"),
        ("zsnr", 1, "simple"),
        ("zsnr", 4, "simple"),
        ("v", 3, "simple"),
    ],
)
def test_few_steps_give_the_picture_back_and_guided_edits_of_its_scale(models, run_node, kind, steps, scheduler):
    model, source = models[kind], latent()["samples"]
    inversion = invert(run_node, model, steps, scheduler)
    again = edit(model, inversion, conditioning())
    assert (again - source).abs().max() <= 1e-2 * source.std()
    edited = edit(model, inversion, conditioning(seed=1))
    unguided = edit(model, inversion, conditioning(seed=1), strength=0.0)
    moved, by_guidance = (edited - source).std() / source.std(), (edited - unguided).std() / source.std()
    assert 1e-4 < by_guidance < 3 and 0.01 < moved < 3, "neither nothing nor everything"
    without_negative = edit(model, inversion, conditioning(seed=1), cfg=1.0)
    assert without_negative.isfinite().all()


@pytest.mark.works("Invert Picture", "KSampler", family="lcm")
@pytest.mark.parametrize("method", ["official", "diffusers", "ddim"])
def test_every_method_inverts_an_lcm(models, run_node, method):
    inversion = invert(run_node, models["lcm"], 4, "simple", method)
    assert inversion.trajectory.isfinite().all()
    assert edit(models["lcm"], inversion, conditioning(seed=1)).isfinite().all()


@pytest.mark.works("Generate Reference", family="lcm")
def test_a_reference_of_few_steps_starts_at_pure_noise_and_is_redrawn(models, run_node):
    model = models["lcm"]
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    texts = {"positive": conditioning(), "negative": conditioning(seed=2)}
    inversion, drawn = run_node(
        Pix2PixZeroReference, model=model, latent_image=empty, steps=4, cfg=1.5, seed=1, scheduler="simple", **texts
    )
    assert inversion.steps == 4
    assert inversion.sigmas[-1] == model.get_model_object("model_sampling").sigma_max
    with torch.inference_mode():
        again = sample_edit(model, inversion, conditioning(), conditioning(seed=2), EditSettings(1.5, 0.0))[0]
    assert (again - drawn["samples"]).abs().max() <= 1e-3 * drawn["samples"].std()


@pytest.mark.parametrize(("kind", "steps"), [("lcm", 51), ("eps", 1001), ("eps", 0)])
def test_more_steps_than_the_model_has_levels_are_refused(models, kind, steps):
    with pytest.raises(ValueError, match=rf"^steps: {steps} is outside 1 to {50 if kind == 'lcm' else 1000}"):
        ddim_grid(models[kind], steps)


WHY = {
    "SD3": "flow model",
    "Flux": "flow model",
    "AuraFlow": "flow model",
    "WAN21_T2V": "flow model",
    "CosmosT2IPredict2": "flow model",
    "CosmosT2V": "EDM model",
    "SVD_img2vid": "EDM model.*Stable Video Diffusion",
    "Stable_Cascade_C": "Stable Cascade",
    "Stable_Cascade_B": "Stable Cascade",
    "CogVideoX_T2V": "video model",
    "LotusD": "predicts a picture",
}


# Flow models without a UNet, and the nodes that take them, see test_flow_families.py.
FLOWS = ("SD3", "Flux", "AuraFlow", "WAN21_T2V")
ANY_FLOW = ("inversion", "reference", "sampler", "plug and play", "prompt to prompt")


def without_weights(name):
    """A MODEL of ComfyUI's class for it, of which only the network is missing."""
    description = getattr(comfy.supported_models, name, None)
    if description is None:
        pytest.skip("this ComfyUI does not know it")
    config = description(
        {"in_channels": 4, **description.unet_config, "disable_unet_model_creation": True, "dtype": torch.float32}
    )
    cpu = torch.device("cpu")
    model = config.get_model({}, device="cpu")
    model.diffusion_model = torch.nn.Identity()
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def calls(model, inversion, run_node):
    """Every node that is given a model, with inputs that would do with a fitting one."""
    texts = {"positive": conditioning(), "negative": conditioning()}
    settings = dict(cfg=1.0, guidance_strength=0.1, start_percent=0.0, end_percent=1.0, preset="default")
    listed = {name: [value] for name, value in {"model": model, "inversion": inversion, **texts, **settings}.items()}
    return {
        "inversion": lambda: invert(run_node, model, 2, "ddim_uniform"),
        "reference": lambda: run_node(
            Pix2PixZeroReference, model=model, latent_image=latent(), steps=2, cfg=1.0, seed=0, **texts
        ),
        "sampler": lambda: run_node(Pix2PixZeroKSampler, **listed),
        "plug and play": lambda: run_node(
            Pix2PixZeroPlugAndPlay,
            model=model,
            inversion=inversion,
            feature_until=0.8,
            attention_until=0.5,
        ),
        "prompt to prompt": lambda: edit_by_prompt(model, inversion, object(), "a cat", "a dog", PromptEditSettings()),
        "feature pictures": lambda: feature_pictures(model, inversion, "queries", 0.5),
    }


@pytest.mark.parametrize("name", WHY)
def test_other_models_are_refused_at_every_node_with_the_reason(models, run_node, name):
    inversion = invert(run_node, models["eps"], 2, "ddim_uniform")
    for node, call in calls(without_weights(name), inversion, run_node).items():
        if name in FLOWS and node in ANY_FLOW:
            continue
        with pytest.raises(ValueError, match=rf"^model: this one .*{WHY[name]}.* Use a model that predicts eps or v"):
            call()
            pytest.fail(f"{node} took it")


def test_models_made_into_others_are_refused(models):
    sampling = {"x0": "predicts a picture", "img_to_img": "predicts a picture", "img_to_img_flow": "flow model"}
    for kind, reason in sampling.items():
        patched = ModelSamplingDiscrete().patch(models["eps"], kind, False)[0]
        with pytest.raises(ValueError, match=reason):
            ddim_grid(patched, 10)
    for kind in ("v_prediction", "edm", "eps"):
        patched = ModelSamplingContinuousEDM().patch(models["eps"], kind, 80.0, 0.002)[0]
        with pytest.raises(ValueError, match="EDM model"):
            ddim_grid(patched, 10)


def test_a_diffusion_transformer_that_predicts_eps_has_no_maps_to_guide_by(models, run_node):
    model = without_weights("PixArtAlpha")
    assert len(ddim_grid(model, 10)) == 11
    inversion = invert(run_node, models["eps"], 2, "ddim_uniform")
    same_model = dataclasses.replace(inversion, model=weakref.ref(model.model))
    with pytest.raises(ValueError, match="^guidance_strength: where .* reads the text is not known here"):
        edit(model, same_model, conditioning(), strength=0.3)
    with pytest.raises(ValueError, match="^model: where .* attends is not known"):
        run_node(Pix2PixZeroPlugAndPlay, model=model, inversion=same_model, feature_until=0.8, attention_until=0.5)
