"""Where an edit acts, found from the contrast of two predictions."""

import pytest
import torch
from pix2pix_zero.editing.guidance import START, LocalBlend, edit_mask


def disc(size=64, radius=14, centre=(24, 40), edge=0.0):
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2).sqrt() <= radius
    return torch.where(inside, 1.0, edge)[None, None]


def noisy(contrast, seed=0):
    return contrast + 0.1 * torch.rand(contrast.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_mask_is_the_place_of_contrast(size):
    place = disc(size, size * 0.22, (size * 0.4, size * 0.6))
    mask = edit_mask(noisy(place), 0.3)
    assert mask.shape == place.shape
    assert 0 <= mask.min()
    assert mask.max() <= 1
    overlap = (mask * place).sum() / torch.maximum(mask, place).sum()
    assert overlap > 0.75
    assert mask[place == 0].mean() < 0.08


def test_a_higher_threshold_keeps_less():
    areas = [edit_mask(noisy(disc(edge=0.25)), threshold).mean() for threshold in (0.1, 0.3, 0.6, 0.9)]
    assert areas == sorted(areas, reverse=True)
    assert areas[0] == 1
    assert areas[2] < 0.3


def test_an_edit_of_nearly_the_whole_picture_is_one_of_all_of_it():
    nearly = torch.ones(2, 1, 64, 64)
    nearly[0, ..., :12] = 0.0
    nearly[1, ..., :40] = 0.0
    mask = edit_mask(nearly, 0.3)
    assert (mask[0] == 1).all()
    assert (mask[1] == 0).any()


def test_the_edge_is_soft():
    mask = edit_mask(disc(), 0.3)
    assert ((mask > 0.05) & (mask < 0.95)).sum() > 20


def test_each_picture_has_its_own_scale():
    weak, strong = disc(), 100 * disc(centre=(40, 20))
    together = edit_mask(torch.cat([weak, strong]), 0.3)
    torch.testing.assert_close(together, torch.cat([edit_mask(weak, 0.3), edit_mask(strong, 0.3)]))
    torch.testing.assert_close(edit_mask(strong, 0.3), edit_mask(strong / 7, 0.3))


@pytest.mark.parametrize("shape", [(1, 1, 2, 4), (2, 1, 9, 13), (1, 1, 1, 1)])
def test_no_contrast_at_all_is_no_error(shape):
    assert edit_mask(torch.zeros(shape), 0.2).isfinite().all()


def test_nothing_is_kept_back_before_the_mask_is_known():
    blend = LocalBlend(0.3)
    x, source = torch.randn(1, 4, 64, 64), torch.randn(1, 4, 64, 64)
    blend.observe(disc(), 0.0)
    assert blend.mask is None
    assert torch.equal(blend.keep_source(x, source), x)
    blend.observe(disc(), START)
    kept = blend.keep_source(x, source)
    outside, inside = (blend.mask == 0).expand_as(x), (blend.mask == 1).expand_as(x)
    assert torch.equal(kept[outside], source[outside])
    torch.testing.assert_close(kept[inside], x[inside])


def test_an_edit_of_all_or_of_a_part_is_told_apart_from_the_first_step_on():
    blend = LocalBlend(0.3)
    assert blend.keeps_some is None
    blend.observe(torch.cat([disc(), torch.ones_like(disc())]), 0.0)
    assert blend.keeps_some.flatten().tolist() == [True, False]


def test_contrast_adds_up_over_the_steps():
    blend = LocalBlend(0.3)
    blend.observe(disc(centre=(20, 20)), 0.5)
    first = blend.mask
    blend.observe(disc(centre=(44, 44)), 0.6)
    torch.testing.assert_close(blend.mask, edit_mask(disc(centre=(20, 20)) + disc(centre=(44, 44)), 0.3))
    assert blend.mask.sum() > first.sum()
