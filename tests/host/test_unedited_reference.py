"""A generated picture comes back from an edit that changes nothing, whatever its negative says."""

import pytest
import torch
from pix2pix_zero.demo_model.loader import load_demo_model
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.sampling.reference import ReferenceSettings, generate_reference

CFG = 3.0


@pytest.fixture(scope="module")
def generated():
    """(model, inversion, its samples, positive, negative)."""
    with torch.inference_mode():
        model, clip, _ = load_demo_model()
        texts = ("a photo of an orange cat in summer during the day", "")
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts)
        empty = {"samples": torch.zeros(1, 4, 16, 16)}
        inversion, samples = generate_reference(model, positive, negative, empty, ReferenceSettings(4, CFG, 7))
    return model, inversion, samples, positive, negative


@pytest.mark.parametrize("settings", [(0.0, 0.0), (0.0, 0.2), (0.2, 0.0)], ids=["features", "blend", "guidance"])
@torch.inference_mode()
def test_the_negatives_features_are_those_that_it_had(generated, settings):
    model, inversion, samples, positive, negative = generated
    guidance, blend = settings
    chosen = EditSettings(CFG, guidance, local_blend=blend, feature_until=0.5)
    unedited, _ = sample_edit(model, inversion, positive, negative, chosen)
    torch.testing.assert_close(unedited, samples, atol=1e-3, rtol=0)
