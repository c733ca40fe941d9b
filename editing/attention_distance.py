"""How far an edit's cross-attention maps are from the source's (pix2pix-zero eq. 4), and the way towards them."""

import torch


def attention_distance(maps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Squared distance of one site's maps, summed over pixels and tokens, averaged over heads (eq. 4): [B].

    `maps`, `reference`: [B, heads, H*W, tokens], rows summing to 1.
    """
    return (maps - reference).square().sum((2, 3)).mean(1)


def logits_gradient(maps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The gradient of `attention_distance(softmax(logits), reference)` with respect to the logits, of their shape.

    That with respect to the maps is 2 (maps - reference) / heads. A softmax takes a gradient g to maps * (g - <g, maps>).
    """
    error = maps - reference
    error -= (error * maps).sum(-1, keepdim=True)
    return error.mul_(maps).mul_(2 / maps.shape[1])
