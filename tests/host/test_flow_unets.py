"""UNets with a flow objective: the same edits as a model that diffuses, where both are one network."""

from dataclasses import replace

import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from pix2pix_zero.benchmarks.quality_parts.scenes import EDITS, draw_scenes
from pix2pix_zero.benchmarks.quality_parts.workbench import DemoModels, Workbench
from pix2pix_zero.demo_model.flow_view import as_flow
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.editing.trajectory import DIFFUSION, FLOW
from pix2pix_zero.host.sampling.checks import noise_path
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.sampling.invert import METHODS, ON_THE_GRID, InversionSettings, invert_latent
from pix2pix_zero.host.sampling.reference import ReferenceSettings, generate_reference
from pix2pix_zero.nodes.demo import Pix2PixZeroDemoModel
from small_unet import conditioning, latent, loaded_small_model

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")

STEPS = 4
UNREGULARIZED = NoiseRegularization(0.0, 0.0, 0, 0)
EVERYTHING = EditSettings(1.5, 0.1, (0.0, 0.5), local_blend=0.2, feature_until=0.5)


@pytest.fixture(scope="module")
@torch.inference_mode()
def demo():
    """(the demo model, itself as a flow, the texts of a cat and of a dog, a scene's LATENT)."""
    models = DemoModels.load()
    bench = Workbench(models, EDITS["cat2dog"], draw_scenes(EDITS["cat2dog"], 2, 400_000), STEPS)

    return models.model, as_flow(models.model), bench.described, bench.wanted, {"samples": bench.latent}


def difference(flowing, diffusing):
    return (flowing - diffusing).abs().max()


@pytest.mark.works("Invert Picture", "KSampler", family=("sd15", "flow"))
@pytest.mark.parametrize("method", ON_THE_GRID)
@torch.inference_mode()
def test_as_a_flow_the_demo_model_draws_the_same_edit(demo, method):
    model, flowing, source, target, picture = demo
    settings = InversionSettings(STEPS, method=method, scheduler="simple", measure_reconstruction=True)
    one, other = (invert_latent(kind, source, picture, settings) for kind in (model, flowing))
    shares = (1 - other.sigmas).view(-1, 1, 1, 1, 1)
    assert difference(other.sigmas, one.sigmas / (1 + one.sigmas)) <= 1e-6
    assert difference(other.trajectory, shares * one.trajectory) <= 1e-4
    torch.testing.assert_close(other.reconstruction_psnr, one.reconstruction_psnr, rtol=0, atol=1e-2)
    edits = [sample_edit(*pair, target, source, EVERYTHING)[0] for pair in ((model, one), (flowing, other))]
    # One rounding of the picture, 6e-8 of it, moves the edit by up to 1.6e-5 (measured).
    assert difference(*edits) <= 1e-4
    assert difference(edits[0], picture["samples"]) > 1


@pytest.mark.parametrize(("objective", "path"), [("diffusion", DIFFUSION), ("flow", FLOW)])
def test_the_demo_model_is_loaded_as_either_kind(run_node, objective, path):
    model, clip, vae = run_node(Pix2PixZeroDemoModel, objective=objective)
    assert noise_path(model) == path
    assert clip is not None and vae is not None


@pytest.mark.works("Generate Reference", family=("sd15", "flow"))
@torch.inference_mode()
def test_as_a_flow_the_demo_model_generates_the_same_reference(demo):
    model, flowing, source, _, picture = demo
    settings = ReferenceSettings(STEPS, 3.0, 5, "simple")
    (one, drawn), (other, redrawn) = (
        generate_reference(kind, source, source, picture, settings) for kind in (model, flowing)
    )
    assert difference(redrawn, drawn) <= 1e-4
    assert difference(other.trajectory, (1 - other.sigmas).view(-1, 1, 1, 1, 1) * one.trajectory) <= 1e-4


@pytest.mark.parametrize("method", ["direct", "fixed-point"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@torch.inference_mode()
def test_the_unedited_picture_comes_back_from_pure_noise(method, shift):
    """Where a flow begins at sigma 1, nothing of the picture is left in the latent."""
    model = ModelSamplingSD3().patch(loaded_small_model(), shift)[0]
    text, picture = conditioning(), latent()
    settings = InversionSettings(4, regularization=UNREGULARIZED, method=method, scheduler="simple", map_memory=0)
    inversion = invert_latent(model, text, picture, settings)
    assert inversion.sigmas[-1] == 1
    unedited = sample_edit(model, inversion, text, text, EditSettings(1.5, 0.1))[0]
    assert difference(unedited, picture["samples"]) <= 1e-4


@torch.inference_mode()
def test_a_generated_reference_begins_at_the_seeded_noise(demo):
    model = ModelSamplingSD3().patch(loaded_small_model(), 3.0)[0]
    reference, drawn = generate_reference(
        model, conditioning(), conditioning(), latent(), ReferenceSettings(4, 1.0, 7, "simple")
    )
    noise = reference.trajectory[-1]
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert difference(
        sample_edit(model, reference, conditioning(), conditioning(), EditSettings(1.0, 0.0))[0], drawn
    ) <= (1e-4)


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(ON_THE_GRID)))
def test_inversions_of_the_authors_levels_are_refused(method):
    model = ModelSamplingSD3().patch(loaded_small_model(), 3.0)[0]
    with pytest.raises(ValueError, match=f"^method: {method} .* flow model. Use direct"):
        invert_latent(model, conditioning(), latent(), InversionSettings(4, method=method, scheduler="simple"))


@torch.inference_mode()
def test_models_that_mix_in_another_way_are_refused():
    plain = loaded_small_model()
    flowing = ModelSamplingSD3().patch(plain, 3.0)[0]
    inversion = invert_latent(flowing, conditioning(), latent(), InversionSettings(2, scheduler="simple"))
    with pytest.raises(ValueError, match="^inversion: .* in another way"):
        sample_edit(plain, inversion, conditioning(), conditioning(), EditSettings())
    with pytest.raises(ValueError, match="^preset: official"):
        sample_edit(flowing, inversion, conditioning(), conditioning(), replace(EditSettings(), preset="official"))
