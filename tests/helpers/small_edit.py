"""Inversions and guided edits on the small UNet, with the settings that tests leave alone."""

import pytest
import torch
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.sampling import edit as edit_room
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from small_unet import conditioning, latent

OFF = NoiseRegularization(steps=0)
MILD = NoiseRegularization(kl_weight=1.0, steps=1, rolls=2)


@torch.inference_mode()
def edit(model, inversion, positive=None, negative=None, strength=0.005, cfg=2.0, **options):
    positive = positive or conditioning(seed=1)
    return sample_edit(model, inversion, positive, negative or conditioning(), EditSettings(cfg, strength, **options))[
        0
    ]


@torch.inference_mode()
def invert(model, positive=None, picture=None, steps=3, regularization=MILD, **options):
    return invert_latent(
        model, positive or conditioning(), picture or latent(), InversionSettings(steps, 0, regularization, **options)
    )


def counted_edits(model, inversion, **options):
    """(the edit, how often its reference maps had to be recorded)."""
    recorded = 0

    class Passes(edit_room.UNetPasses):
        def record_maps(self, *args):
            nonlocal recorded
            recorded += 1
            return super().record_maps(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edit_room, "UNetPasses", Passes)
        return edit(model, inversion, **options), recorded
