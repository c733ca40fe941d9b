"""How often the host waits for a device, on a simulated one (`other_device`)."""

from functools import partial

import comfy.model_management
import pytest
import torch
from other_device import OTHER
from pix2pix_zero.attention_patches.attention import cross_attention_sites
from workplaces import both_workplaces, edit, host_on, invert

pytestmark = pytest.mark.usefixtures("narrow_unet")


@pytest.fixture(scope="module")
def workplaces():
    with both_workplaces() as made:
        yield made


def waits_per_step(run):
    """`run(steps)`, counted."""
    counts = []
    with host_on(OTHER) as other, torch.inference_mode():
        for steps in (2, 3):
            before = other.waits.copy()
            run(steps)
            counts.append(other.waits - before)
    return counts[1] - counts[0]


def test_how_often_the_host_waits_for_the_device_in_each_step(workplaces):
    """Stored latents and maps are brought there as they are wanted; the map distance is read to be shown."""
    there, inversions = workplaces[1], {}
    with host_on(OTHER), torch.inference_mode():
        comfy.model_management.load_models_gpu([there.model])
    sites = len(cross_attention_sites(there.model.model.diffusion_model))

    def inverted(steps, **options):
        inversions[steps] = invert(there, steps=steps, **options)[0]

    # Corrections are brought there again, to see that the picture comes back. The host reads the levels of its grid from the
    # device, one by one.
    by_the_trajectory, by_the_grid = {"download": 2, "upload": 3}, {"item": 1}
    assert waits_per_step(partial(inverted, map_memory=0.008)) == by_the_trajectory | by_the_grid
    kept = by_the_trajectory | {"download": 2 + sites}
    assert waits_per_step(inverted) == kept | by_the_grid

    def edited(steps, **options):
        edit(there, inversions[steps], **options)

    assert waits_per_step(partial(edited, local_blend=0.0)) == {"upload": sites + 1, "item": 1}
    whole = {"guidance_strength": 0.0, "feature_until": 1.0}
    assert waits_per_step(partial(edited, **whole)) == {"upload": 3, "item": 1}
