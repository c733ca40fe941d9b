"""The agreement of maps is Pearson's correlation, and the best are those of the highest."""

import math

import numpy as np
import torch
from pix2pix_zero.editing.block_scores import agreement, best


def test_agreement_is_the_correlation_of_each_picture_and_none_with_a_map_that_is_flat_but_for_rounding():
    maps, difference = torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(0))
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(maps.numpy(), difference.numpy())]
    assert np.abs(agreement(maps, difference).numpy() - expected).max() <= 1e-6
    maps[1] = maps[1].softmax(-1).sum() + 1e-7 * maps[1]
    assert agreement(maps, difference).isnan().tolist() == [False, True, False]
    assert agreement(maps, torch.ones(3, 50)).isnan().all()


def test_the_best_are_the_highest_and_none_without_a_difference():
    assert best([0.1, 0.9, -0.5, 0.3], 2) == {1, 3}
    assert best([0.1, math.nan], 1) == set()
