"""The guidance gradient restated in float64, with ordinary autograd and nothing of this pack."""

import torch
import torch.nn.functional as F

from .counting import Gradient

BLOCKS = [("middle", 0), *((name, number) for name in ("input", "output") for number in range(12))]


def plain_gradient(unet: torch.nn.Module, at: Gradient, source: torch.Tensor) -> torch.Tensor:
    """Gradient, with respect to the UNet's input, of the distance between the maps of `at.text` and of `source`.

    pix2pix-zero eq. 4: squared, summed over pixels and tokens, averaged over heads, summed over sites. Both maps are
    taken at `at.x`, where sampling starts. `unet`: ComfyUI's, in float64.
    """
    x = at.x.double().requires_grad_(True)
    with torch.no_grad():
        reference = _maps(unet, x, at.timestep, source.to(at.text.dtype).double())
    maps = _maps(unet, x, at.timestep, at.text.double())
    distance = sum(((a - b) ** 2).sum((2, 3)).mean(1) for a, b in zip(maps, reference))
    return torch.autograd.grad(distance.sum(), x)[0]


def _maps(unet, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
    maps = []

    def cross_attention(q, k, v, options):
        q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
        probabilities = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        maps.append(probabilities)
        return (probabilities @ v).transpose(1, 2).flatten(2)

    def self_attention(func, q, k, v, heads, **_):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    options = {
        "patches_replace": {"attn2": dict.fromkeys(BLOCKS, cross_attention)},
        "optimized_attention_override": self_attention,
    }
    unet(x, timestep, context=text, transformer_options=options)
    return maps
