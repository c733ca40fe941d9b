"""The gradient of the attention distance (pix2pix-zero eq. 4) without keeping any attention map for it.

The distance is a sum over sites, and at each site its gradient with respect to q and k has a closed form. It is computed
where the site is reached in the forward pass and added to whatever gradient comes back there in the backward pass. So
the graph holds one tensor of q's size per site in place of the maps, logits and differences.
"""

import torch

from .maps import attention_maps


class GradientScale:
    """A factor on the distance that keeps gradients inside fp16's range; `value` may be set until the backward pass."""

    def __init__(self):
        self.value = 1.0
        self.largest = None

    def note(self, gradient: torch.Tensor) -> None:
        """Remember the largest magnitude of the gradients that will be injected."""
        largest = gradient.abs().max()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)


def match_maps(
    q: torch.Tensor, k: torch.Tensor, reference: torch.Tensor, heads: int, scale: GradientScale
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, k, distance): q and k unchanged, but a backward pass through them adds `scale` times the distance's gradient.

    `q`: [B, pixels, heads*d], `k`: [B, tokens, heads*d], `reference`: [B, heads, pixels, tokens] rows summing to 1.
    `distance`: [B] as `editing.guidance.attention_distance`, outside the graph.
    """
    return _MatchMaps.apply(q, k, reference, heads, scale)


class _MatchMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, reference, heads, scale):
        maps = attention_maps(q, k, heads)
        error = maps - reference
        distance = error.square().sum((2, 3)).mean(1)
        # Softmax backward of 2 * error / heads: maps * (error - <error, maps>).
        logits = error.sub_((error * maps).sum(-1, keepdim=True)).mul_(maps)
        logits.mul_(2 / heads * (q.shape[-1] // heads) ** -0.5)
        ctx.scale = scale
        q_gradient = _against(logits, k, heads) if ctx.needs_input_grad[0] else None
        k_gradient = _against(logits.transpose(-1, -2), q, heads) if ctx.needs_input_grad[1] else None
        if q.dtype == torch.float16:
            scale.note(q_gradient if k_gradient is None else k_gradient)
        ctx.save_for_backward(q_gradient, k_gradient)  # not as attributes: checkpointing drops what is saved
        ctx.mark_non_differentiable(distance)
        return q.view_as(q), k.view_as(k), distance

    @staticmethod
    def backward(ctx, from_q, from_k, _):
        q_gradient, k_gradient = ctx.saved_tensors
        return _plus(from_q, q_gradient, ctx.scale), _plus(from_k, k_gradient, ctx.scale), None, None, None


def _plus(theirs: torch.Tensor, ours: torch.Tensor | None, scale: GradientScale) -> torch.Tensor | None:
    return None if ours is None else (theirs + scale.value * ours).to(theirs.dtype)


def _against(logits: torch.Tensor, other: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, heads, m, n] times other's heads [B, n, heads*d]: [B, m, heads*d]."""
    return (logits @ other.float().unflatten(-1, (heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
