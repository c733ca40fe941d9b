"""What the UNet is given beside an edit's texts, taken from the source picture's where the edit says nothing of it."""

import torch

# Of inpainting and pix2pix models: the further channels of the UNet's input.
FURTHER_CHANNELS = ("concat_latent_image", "concat_mask")


def beside_the_source(conditioning: list, source: list) -> list:
    """A CONDITIONING of an edit with the further input channels of `source` where it names none of its own.

    A text that is the source's own counts as a description of the picture even as the negative: else a model with
    aesthetic scores (SDXL's refiner) would be told that it describes an ugly one, and the two would not cancel.
    """
    completed = []
    for i, (text, options) in enumerate(conditioning):
        source_text, source_options = source[i] if len(source) == len(conditioning) else source[0]
        added = {}
        if not any(name in options for name in FURTHER_CHANNELS):
            added = {name: source_options[name] for name in FURTHER_CHANNELS if name in source_options}
        if same_tensor(text, source_text):
            added["prompt_type"] = "positive"
        completed.append([text, {**added, **options}])
    return completed


def same_tensor(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether both are the same values, or both are None."""
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b.to(a)))
