"""Sums of attention maps of several sizes."""

import pytest
import torch
from pix2pix_zero.editing.attention_heat import AttentionHeat

LENGTH = 5


def maps(shape, batch=2, heads=3, tokens=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, shape[0] * shape[1], tokens, generator=generator).softmax(-1)


def test_the_heat_is_the_mean_over_heads_layers_and_steps_at_one_size():
    fine, coarse, later = maps((4, 6)), maps((2, 3), seed=1), maps((4, 6), seed=2)
    heat = AttentionHeat(LENGTH)
    for each, shape in ((fine, (4, 6)), (coarse, (2, 3)), (later, (4, 6))):
        heat.add(each, shape)
    enlarged = torch.nn.Upsample((4, 6), mode="bilinear")(coarse.mean(1).reshape(2, 2, 3, LENGTH).permute(0, 3, 1, 2))
    layers = [each.mean(1).reshape(2, 4, 6, LENGTH).permute(0, 3, 1, 2) for each in (fine, later)]
    mean = heat.mean((4, 6))
    torch.testing.assert_close(mean, (enlarged + sum(layers)) / 3)
    torch.testing.assert_close(mean.sum(1), torch.ones(2, 4, 6))


def test_repeats_of_a_text_count_as_one():
    once = maps((2, 2))
    repeated = torch.cat([0.25 * once, 0.75 * once], -1)
    heat = AttentionHeat(LENGTH)
    heat.add(repeated, (2, 2))
    torch.testing.assert_close(heat.mean((2, 2)), once.mean(1).reshape(2, 2, 2, LENGTH).permute(0, 3, 1, 2))


def test_maps_of_another_size_are_refused():
    with pytest.raises(ValueError, match="model.*size"):
        AttentionHeat(LENGTH).add(maps((2, 3)), (2, 2))
