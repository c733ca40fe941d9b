"""Every flow model that is no UNet: inversion, edits, FlowEdit and references, on small networks of each family."""

from dataclasses import replace

import pytest
import torch
from flow_families import FAMILIES, picture, small_family, texts
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.sampling.checks import pixels_per_latent
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent

STEPS = 5
UNREGULARIZED = NoiseRegularization(0.0, 0.0, 0, 0)
NAMES = [name for name, family in FAMILIES.items() if family.known]
PLAIN = EditSettings(3.0, 0.0)


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    """(name, MODEL)"""
    with torch.inference_mode():
        return request.param, small_family(request.param)


def inverted(family, method="direct", **changes):
    name, model = family
    settings = InversionSettings(STEPS, method=method, scheduler="simple")
    return invert_latent(model, texts(name, 1), picture(model), replace(settings, **changes))


def distance(samples, clean):
    return float((samples - clean).abs().max())


@pytest.mark.parametrize("method", ["direct", "aligned"])
@torch.inference_mode()
def test_the_unedited_picture_comes_back_exactly(family, method):
    name, model = family
    inversion, source, clean = inverted(family, method), texts(name, 1), picture(model)["samples"]
    unedited, area = sample_edit(model, inversion, source, source, PLAIN)
    assert unedited.shape == clean.shape and area.shape == (
        1,
        *(pixels_per_latent(model) * side for side in clean.shape[-2:]),
    )
    assert distance(unedited, clean) <= 1e-4
    edited, _ = sample_edit(model, inversion, texts(name, 2), source, PLAIN)
    assert edited.isfinite().all() and distance(edited, clean) > 1e-3


@torch.inference_mode()
def test_a_solved_inversion_gives_the_picture_back_without_correction(family):
    settings = {"fixed_point_iterations": 8, "regularization": UNREGULARIZED, "measure_reconstruction": True}
    assert float(inverted(family, "fixed-point", **settings).reconstruction_psnr) >= 50
