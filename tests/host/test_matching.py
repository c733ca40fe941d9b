"""The injected gradient of the attention distance against autograd through a plain restatement in float64."""

import pytest
import torch
from pix2pix_zero.attention_patches.attention import GradientScale, MatchedAttention

HEADS = 4


def tensors(seed=0, batch=2, pixels=12, tokens=7, size=24):
    generator = torch.Generator().manual_seed(seed)
    q, k, other_q = (torch.randn(batch, n, size, generator=generator) for n in (pixels, tokens, pixels))
    weights = torch.randn(batch, pixels, size, generator=generator)
    return q, k, plain_maps(other_q.double(), k.double()).float(), weights


def plain_maps(q, k):
    q, k = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k))
    return (torch.einsum("bhpd,bhtd->bhpt", q, k) / q.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("k_depends_on_x", [True, False])
@pytest.mark.parametrize("factor", [1.0, 64.0])
def test_gradient_is_that_of_the_distance_plus_what_comes_from_above(k_depends_on_x, factor):
    q, k, reference, weights = tensors()
    leaves = [q.requires_grad_(True), k.requires_grad_(k_depends_on_x)]
    scale = GradientScale()
    passed_q, passed_k, distance = MatchedAttention.apply(*leaves, reference, HEADS, scale)
    assert torch.equal(passed_q, q)
    assert torch.equal(passed_k, k)
    assert not distance.requires_grad
    scale.value = factor
    above = (passed_q.tanh() * weights).sum() + passed_k.square().sum()
    ours = torch.autograd.grad(above, [leaf for leaf in leaves if leaf.requires_grad])

    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    expected_distance = (plain_maps(*exact) - reference.double()).square().sum((2, 3)).mean(1)
    loss = factor * expected_distance.sum() + (exact[0].tanh() * weights).sum() + exact[1].square().sum()
    expected = torch.autograd.grad(loss, [leaf for leaf in exact if leaf.requires_grad])
    torch.testing.assert_close(distance.double(), expected_distance.detach(), rtol=1e-5, atol=0)
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_nothing_of_a_maps_size_is_kept_for_the_backward_pass():
    q, k, reference, _ = tensors(pixels=64, tokens=50, size=8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        MatchedAttention.apply(q.requires_grad_(True), k, reference, HEADS, GradientScale())
    assert [t.shape for t in kept] == [q.shape]
