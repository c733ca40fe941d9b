"""What a conditioning brings beside its text is looked at where it comes in."""

import math
from types import SimpleNamespace

import pytest
import torch
from pix2pix_zero.editing.inputs import conditioning_values, refuse_not_finite

BROKEN = torch.tensor([[0.0, math.nan]])


def control(**parts):
    return SimpleNamespace(**{"strength": 1.0, "cond_hint_original": None, "previous_controlnet": None, **parts})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": math.nan}, "its strength is nan"),
        ({"mask_strength": -math.inf}, "its mask_strength is -inf"),
        ({"start_percent": math.nan}, "its start_percent is nan"),
        ({"area": ("percentage", math.nan, 0.5, 0.0, 0.0)}, "its area is nan"),
        ({"mask": BROKEN[None]}, "NaN or infinite values. That is its mask"),
        ({"pooled_output": BROKEN}, "NaN or infinite values. That is its pooled_output"),
        ({"reference_latents": [torch.zeros(1), BROKEN]}, "That is its reference_latents"),
        ({"concat_latent_image": BROKEN}, "That is its concat_latent_image"),
        ({"unclip_conditioning": [{"strength": math.inf}]}, "its strength is inf"),
        ({"control": control(strength=math.nan)}, "its control is nan"),
        ({"control": control(previous_controlnet=control(cond_hint_original=BROKEN))}, "That is its control"),
    ],
)
def test_what_is_not_finite_beside_a_text_is_named_by_its_socket(options, words):
    with pytest.raises(ValueError, match=f"^positive: .*{words}"):
        refuse_not_finite(conditioning_values([[torch.zeros(1, 2, 3), options]], "positive"))


def test_a_mask_of_attention_may_shut_tokens_out_with_infinity():
    options = {
        "attention_mask": torch.tensor([[0.0, -math.inf]]),
        "control": control(),
        "guidance": 3.5,
        "area": (8, 8, 0, 0),
    }
    refuse_not_finite(conditioning_values([[torch.zeros(1, 2, 3), options]], "positive"))
