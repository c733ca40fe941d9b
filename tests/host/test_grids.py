"""The noise levels of inversions, references and FlowEdit: the host's schedulers, and SIGMAS of the user's own."""

import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler as stock
from comfy_extras.nodes_model_advanced import ModelSamplingFlux, ModelSamplingSD3
from pix2pix_zero.host.sampling.checks import SCHEDULERS, ddim_grid
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.nodes.flow_edit import Pix2PixZeroFlowEdit
from pix2pix_zero.nodes.inversion import Pix2PixZeroInversion
from pix2pix_zero.nodes.reference import Pix2PixZeroReference
from pix2pix_zero.nodes.sockets import with_defaults
from small_unet import conditioning, latent, loaded_small_model

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")

STEPS = 3
UNREGULARIZED = {"autocorrelation_weight": 0.0, "kl_weight": 0.0, "regularization_steps": 0, "map_memory": 0}


@pytest.fixture(scope="module", params=["eps", "flow, shift 1", "flow, shift 3"])
def model(request):
    plain = loaded_small_model()
    if request.param == "eps":
        return plain
    return ModelSamplingSD3().patch(plain, float(request.param[-1]))[0]


def flows(model):
    return isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)


def by_node(run_node, node, model, **inputs):
    """The outputs of a node with its defaults but for these, on the small picture."""
    texts = {"positive": conditioning(), "negative": conditioning(seed=2)}
    if node is Pix2PixZeroFlowEdit:
        texts = {"source": conditioning(), "target": conditioning(seed=1)}
    if node is Pix2PixZeroInversion:
        del texts["negative"]
    inputs = with_defaults(node, {"model": model, "latent_image": latent(), **texts, **inputs})
    if node is Pix2PixZeroReference:
        return run_node(node, **inputs)
    return [found[0] for found in run_node(node, **{name: [value] for name, value in inputs.items()})]


def invert(run_node, model, **inputs):
    return by_node(run_node, Pix2PixZeroInversion, model, steps=STEPS, **UNREGULARIZED, **inputs)[0]


@torch.inference_mode()
def check_comes_back(model, inversion):
    source = latent()["samples"]
    again = sample_edit(model, inversion, conditioning(), conditioning(seed=2), EditSettings(1.0, 0.0))[0]
    assert (again - source).abs().max() <= 1e-4
    edited = sample_edit(model, inversion, conditioning(seed=1), conditioning(), EditSettings(1.5, 1e-4))[0]
    assert edited.isfinite().all() and (edited - source).abs().max() > 1e-3


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_picture_comes_back_on_every_grid(run_node, model, scheduler):
    if flows(model) and scheduler == "ddim_uniform":
        with pytest.raises(
            ValueError, match="^scheduler: ddim_uniform does not begin .* Choose simple, normal, .* or beta"
        ):
            invert(run_node, model, scheduler=scheduler)
        return
    inversion = invert(run_node, model, scheduler=scheduler)
    sampling = model.get_model_object("model_sampling")
    expected = comfy.samplers.calculate_sigmas(sampling, scheduler, STEPS)
    assert torch.equal(inversion.sigmas.flip(0), expected)
    if scheduler != "ddim_uniform":
        assert inversion.sigmas[-1] == pytest.approx(float(sampling.sigma_max))
    check_comes_back(model, inversion)


def test_the_grid_of_auto_fits_the_model(run_node, model):
    inversion = invert(run_node, model)
    expected = invert(run_node, model, scheduler="normal" if flows(model) else "ddim_uniform")
    assert torch.equal(inversion.sigmas, expected.sigmas)


@pytest.mark.parametrize(("steps", "begins_at_the_noise"), [(28, True), (25, False)])
def test_ddim_uniform_is_taken_where_it_begins_at_the_noise(steps, begins_at_the_noise):
    """As it may on the 10000 levels of Flux."""
    flux = ModelSamplingFlux().patch(loaded_small_model(), 1.15, 0.5, 1024, 1024)[0]
    if begins_at_the_noise:
        assert ddim_grid(flux, steps, "ddim_uniform")[0] > 0.999
    else:
        with pytest.raises(ValueError, match="^scheduler: ddim_uniform does not begin"):
            ddim_grid(flux, steps, "ddim_uniform")


@pytest.mark.parametrize("node", [Pix2PixZeroInversion, Pix2PixZeroReference, Pix2PixZeroFlowEdit])
def test_sigmas_are_taken_in_place_of_a_scheduler(run_node, model, node):
    sigmas = stock.BasicScheduler.execute(model, "beta", STEPS, 1.0).result[0]
    given = by_node(run_node, node, model, steps=900, sigmas=sigmas)
    named = by_node(run_node, node, model, steps=STEPS, scheduler="beta")
    for one, other in zip(given, named):
        one, other = (each["samples"] if isinstance(each, dict) else each for each in (one, other))
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        elif hasattr(one, "trajectory"):
            assert torch.equal(one.trajectory, other.trajectory) and torch.equal(one.sigmas, other.sigmas)


def test_the_picture_comes_back_on_levels_between_those_of_the_table(run_node, model):
    levels = [0.97, 0.8, 0.55, 0.2, 0.04, 0.0]
    sigmas = torch.tensor(levels) if flows(model) else torch.tensor([level / (1 - level) for level in levels[1:]])
    inversion = invert(run_node, model, sigmas=sigmas)
    assert torch.equal(inversion.sigmas.flip(0), sigmas)
    check_comes_back(model, inversion)


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        ([0.0, 0.4, 0.9], "must descend to 0"),
        ([0.9, 0.4], "must descend to 0"),
        ([0.9, 0.4, 0.4, 0.0], "must descend to 0"),
        ([50.0, 0.4, 0.0], "begin at 50"),
        ([0.0], "expected two noise levels or more, got \\[1\\]"),
        ([[0.9, 0.0]], "expected two noise levels or more, got \\[1, 2\\]"),
        ([float("nan"), 0.0], "it holds NaN"),
    ],
)
@pytest.mark.parametrize("node", [Pix2PixZeroInversion, Pix2PixZeroReference, Pix2PixZeroFlowEdit])
def test_levels_that_do_not_fit_are_refused(run_node, model, node, sigmas, words):
    with pytest.raises(ValueError, match=f"^sigmas: .*{words}"):
        by_node(run_node, node, model, steps=STEPS, sigmas=torch.tensor(sigmas))


def test_a_reference_is_drawn_from_noise_alone(run_node, model):
    with pytest.raises(ValueError, match="^sigmas: a picture is drawn from noise"):
        by_node(run_node, Pix2PixZeroReference, model, steps=STEPS, sigmas=torch.tensor([0.5, 0.2, 0.0]))


def test_a_reference_of_few_steps_begins_where_its_scheduler_does(run_node):
    plain = loaded_small_model()
    reference, _ = by_node(run_node, Pix2PixZeroReference, plain, steps=4, scheduler="ddim_uniform")
    assert reference.sigmas[-1] < 0.5 * plain.model.model_sampling.sigma_max


@pytest.mark.parametrize("method", ["official", "diffusers"])
def test_inversions_of_the_authors_levels_take_only_those_of_the_table(run_node, method):
    plain = loaded_small_model()
    for inputs in ({"scheduler": "beta"}, {"sigmas": torch.tensor([10.0, 1.0, 0.0])}):
        with pytest.raises(ValueError, match=f"^method: {method} takes its noise levels from the model's table"):
            invert(run_node, plain, method=method, **inputs)
