"""Inversions and guided edits on the small UNet, with the settings that tests leave alone."""

import pytest
import torch
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.sampling import run as sampling
from small_unet import conditioning, latent

OFF = NoiseRegularization(steps=0)
MILD = NoiseRegularization(kl_weight=1.0, steps=1, rolls=2)


@torch.inference_mode()
def edit(model, inversion, positive=None, negative=None, strength=6e-4, cfg=2.0, **options):
    positive = positive or conditioning(seed=1)
    return sampling.sample_edit(model, inversion, positive, negative or conditioning(), cfg, strength, **options)


@torch.inference_mode()
def invert(model, positive=None, picture=None, steps=3, regularization=MILD, **options):
    return sampling.invert_latent(
        model, positive or conditioning(), picture or latent(), steps, 0, regularization, **options
    )


def counted_edits(model, inversion, **options):
    """(the edit, how often its reference maps had to be recorded)."""
    recorded = 0

    class Passes(sampling.UNetPasses):
        def record_maps(self, *args):
            nonlocal recorded
            recorded += 1
            return super().record_maps(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "UNetPasses", Passes)
        return edit(model, inversion, **options), recorded
