"""Pictures of discs: edges that stay, whatever their light, and edges that move."""

import pytest
import torch
from pix2pix_zero.distillation.kept_edges import edge_agreement, most_in_place
from pix2pix_zero.distillation.pairs import Pairs

DISCS = ((20, 24), (60, 40), (36, 78))


def picture(discs=DISCS, sky=0.8, light=1.0):
    """[1, 3, 72, 104]"""
    y, x = torch.meshgrid(torch.arange(72.0), torch.arange(104.0), indexing="ij")
    gray = torch.full_like(x, sky)
    for row, column in discs:
        inside = torch.sigmoid(8 - ((y - row) ** 2 + (x - column) ** 2).sqrt())
        gray = torch.lerp(gray, torch.full_like(gray, light), inside)
    return gray.expand(1, 3, -1, -1)


def test_another_light_leaves_the_edges_where_they_are():
    night = picture(sky=0.1, light=0.6)
    inverted = 1 - 0.5 * picture()
    for edited in (picture(), night, inverted):
        assert edge_agreement(picture(), edited).item() == pytest.approx(1, abs=1e-3)


def test_one_thing_of_three_that_moves_is_seen_and_the_more_the_further_it_goes():
    found = [
        edge_agreement(picture(), picture(((20, 24 + shift), *DISCS[1:]), sky=0.1)).item() for shift in (0, 1, 2, 4, 8)
    ]
    assert found == sorted(found, reverse=True)
    assert found[1] > 0.9 and found[3] < 0.5


def test_what_disappears_or_comes_agrees_with_nothing():
    for one, other in ((DISCS, DISCS[1:]), (DISCS[1:], DISCS)):
        assert edge_agreement(picture(one), picture(other)).item() == pytest.approx(0, abs=0.05)


def test_pairs_in_which_a_thing_moved_are_left_out():
    moved, night = picture(((20, 28), *DISCS[1:]), sky=0.1), picture(sky=0.1)
    sources = picture().expand(75, -1, -1, -1)
    edited = torch.cat([moved if index % 3 == 0 else night for index in range(75)])
    columns = ((255 * part).round().to(torch.uint8) for part in (sources, edited, torch.ones_like(sources[:, :1])))
    kept = most_in_place(Pairs([str(index) for index in range(75)], *columns), 2 / 3)
    assert kept.keys == [str(index) for index in range(75) if index % 3]
    assert torch.equal(kept.edited[0], (255 * night[0]).round().to(torch.uint8)) and len(kept.areas) == 50
