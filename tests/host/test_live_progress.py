"""What the nodes show while they run: phase, step, progress bar and preview. The server's part is in test_strip.py."""

import latent_preview
import pytest
import torch
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host import running
from pix2pix_zero.host.sampling import edit as edit_room
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from pix2pix_zero.host.sampling.reference import ReferenceSettings, generate_reference
from small_unet import conditioning, latent

pytestmark = pytest.mark.usefixtures("narrow_unet")

STEPS = 4


@pytest.fixture
def seen(monkeypatch):
    """(the lines of text, the (step, steps) and the estimate that the bar and the preview get)."""
    texts, bar, estimates = [], [], []

    def prepare_callback(model, steps):
        def callback(step, denoised, x, total):
            bar.append((step + 1, total))
            estimates.append(denoised)

        return callback

    monkeypatch.setattr(running, "show", texts.append)
    monkeypatch.setattr(latent_preview, "prepare_callback", prepare_callback)
    return texts, bar, estimates


# (method, whether the reconstruction is measured, passes): direct looks once more, from where it has arrived.
PASSES = [
    ("direct", False, STEPS + 1),
    ("ddim", False, STEPS),
    ("diffusers", False, STEPS),
    ("fixed-point", False, STEPS),
    ("direct", True, 2 * STEPS + 1),
    ("ddim", True, 2 * STEPS),
]


@torch.inference_mode()
def invert(model, method="direct", measured=False):
    regularization = NoiseRegularization(steps=0)
    settings = InversionSettings(STEPS, 0, regularization, method, measure_reconstruction=measured)
    return invert_latent(model, conditioning(), latent(), settings)


@torch.inference_mode()
def edit(model, inversion, strength, preset="default"):
    return sample_edit(
        model, inversion, conditioning(seed=1), conditioning(), EditSettings(2.0, strength, preset=preset)
    )[0]


def every_step(phase):
    return [f"{phase} {step}/{STEPS}" for step in range(1, STEPS + 1)]


@pytest.mark.parametrize(("method", "measured", "passes"), PASSES)
def test_inversion_shows_every_step_and_is_done_with_its_last_pass(model, seen, method, measured, passes):
    texts, bar, estimates = seen
    invert(model, method, measured)
    assert texts == every_step("Inverting") + (every_step("Redrawing without an edit") if measured else [])
    assert bar == [(step, passes) for step in range(1, passes + 1)]
    assert all(estimate.shape == (1, 4, 8, 8) and estimate.isfinite().all() for estimate in estimates)


def test_the_authors_inversion_counts_the_levels_it_leaves_out(model, seen):
    texts, bar, _ = seen
    invert(model, "official")
    assert texts == every_step("Inverting")[-len(texts) :]
    assert len(texts) == STEPS - 2
    assert bar[-1] == (STEPS, STEPS)


def test_a_generated_reference_shows_every_step(model, seen):
    texts, bar, estimates = seen
    with torch.inference_mode():
        empty = {"samples": torch.zeros(1, 4, 8, 8)}
        generate_reference(model, conditioning(), conditioning(seed=2), empty, ReferenceSettings(STEPS, 2.0, 7))
    assert texts == every_step("Generating")
    assert bar[-1] == (STEPS, STEPS)
    assert len(estimates) == STEPS


def test_an_edit_without_guidance_is_plain_sampling(model, seen):
    inversion = invert(model)
    texts, bar, _ = seen
    texts.clear()
    edit(model, inversion, 0.0)
    assert texts == every_step("Sampling")


@pytest.mark.parametrize("preset", ["default", "official"])
def test_guided_steps_name_the_distance_per_pixel(model, seen, monkeypatch, preset):
    """The distance of a pixel's attention from the source's, averaged over the pixels of all layers."""
    inversion = invert(model)
    texts, bar, _ = seen
    texts.clear()
    sums = []

    class Passes(edit_room.UNetPasses):
        def denoise_and_match(self, *args, **kwargs):
            found = super().denoise_and_match(*args, **kwargs)
            sums.append(float(found[2].mean()))
            return found

        def map_gradient(self, branch, *args):
            found = super().map_gradient(branch, *args)
            if branch == "positive":
                sums.append(float(found[1].mean()))
            return found

    monkeypatch.setattr(edit_room, "UNetPasses", Passes)
    edit(model, inversion, 0.005 if preset == "default" else 0.0, preset)
    assert [text.split(",")[0] for text in texts] == every_step("Guided step")
    shown = [float(text.split("layout off by ")[1]) for text in texts]
    # 8x8 and 4x4 pixels: two and one, two and three layers on the way down, in the middle and up again
    layers = [maps.shape[2] for maps in inversion.maps._levels[1].values()]
    assert sorted(set(layers)) == [16, 64]
    assert shown == pytest.approx([total / sum(layers) for total in sums], abs=6e-4)
    assert max(shown) > 0
    assert len(bar) == 2 * STEPS + 1
