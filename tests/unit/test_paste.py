"""An edit put back into its source: what was not edited stays, bit for bit."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from pix2pix_zero.pictures.paste import Seam, feathered, largest_around, paste_edit, seam_colours
from pix2pix_zero.pictures.regions import Region, crop_to_edit, read_region, shown_by

HARD = Seam(grow=0, feather=0, match_colours=0.0, keep_below=0.0)


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def square(height, width, top, left, side, count=1):
    area = torch.zeros(count, height, width)
    area[:, top : top + side, left : left + side] = 1
    return area


def smooth(height, width):
    """A picture that any resampling keeps."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([x, y, (x + y) / 2], -1)[None] * 0.6 + 0.2


# --- what stays ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(("height", "width", "small"), [(96, 96, 96), (301, 257, 64), (64, 64, 128), (37, 91, 40)])
def test_outside_the_area_every_pixel_is_the_source_bit_for_bit(channels, height, width, small):
    source, edited = noise(1, height, width, channels), noise(1, small, small * width // height, 3, seed=1)
    area = square(*edited.shape[1:3], small // 3, small // 3, small // 4)
    seam = Seam(grow=2, feather=3, keep_below=0.0)
    result = paste_edit(source, edited, area, seam=seam)
    assert result.shape == source.shape and result.dtype == source.dtype
    # as far as grow and feather reach, and one pixel of the edited picture for the scaling
    reach = 2 + 2 * 2 + 2
    scale_y, scale_x = height / edited.shape[1], width / edited.shape[2]
    rows = torch.arange(height)[:, None] / scale_y
    columns = torch.arange(width)[None] / scale_x
    low, high = small // 3 - reach, small // 3 + small // 4 + reach
    outside = (rows < low) | (rows > high) | (columns < low) | (columns > high)
    assert outside.float().mean() > 0.2
    assert torch.equal(result[0][outside], source[0][outside])
    assert not torch.equal(result, source)


def test_inside_a_hard_edge_the_result_is_the_edit_bit_for_bit():
    source, edited, area = noise(2, 48, 64, 3), noise(2, 48, 64, 3, seed=1), square(48, 64, 8, 20, 17, 2)
    assert torch.equal(paste_edit(source, edited, area, seam=HARD), torch.where(area[..., None] > 0, edited, source))


def test_an_empty_area_gives_the_source_and_a_full_one_the_edit():
    source, edited = noise(1, 40, 40, 3), noise(1, 40, 40, 3, seed=1)
    assert torch.equal(paste_edit(source, edited, torch.zeros(1, 40, 40)), source)
    assert torch.equal(paste_edit(source, edited, torch.ones(1, 40, 40)), edited)


def test_what_came_in_is_not_changed():
    source, edited, area = noise(1, 40, 40, 3), noise(1, 40, 40, 3, seed=1), square(40, 40, 9, 9, 20)
    before = source.clone(), edited.clone(), area.clone()
    paste_edit(source, edited, area)
    assert all(map(torch.equal, before, (source, edited, area)))


def test_values_beyond_1_and_half_precision_stay():
    source = (4 * noise(1, 40, 40, 3)).half()
    result = paste_edit(source, noise(1, 40, 40, 3, seed=1), square(40, 40, 16, 16, 6))
    assert result.dtype == torch.float16
    assert torch.equal(result[:, :3], source[:, :3])


def test_alpha_is_that_of_the_source():
    source, edited = noise(1, 40, 40, 4), noise(1, 40, 40, 4, seed=1)
    result = paste_edit(source, edited, torch.ones(1, 40, 40))
    assert torch.equal(result[..., 3], source[..., 3])
    assert torch.equal(result[..., :3], edited[..., :3])


def test_into_a_grey_picture_goes_the_brightness_of_the_edit():
    edited = noise(1, 40, 40, 3, seed=1)
    result = paste_edit(noise(1, 40, 40, 1), edited, torch.ones(1, 40, 40))
    pillow = Image.fromarray((edited[0].numpy() * 255).round().astype(np.uint8)).convert("L")
    assert (result[0, ..., 0] - torch.tensor(np.asarray(pillow)) / 255).abs().max() < 0.01


# --- where it goes ------------------------------------------------------------------------------------------------


def test_a_crop_of_a_large_picture_comes_back_in_its_place():
    image = smooth(433, 611)
    mask = torch.zeros(1, 433, 611)
    mask[:, 100:190, 350:450] = 1
    crop, inner, region = crop_to_edit(image, 128, mask)
    assert crop.shape[1] % 8 == crop.shape[2] % 8 == 0
    assert inner.shape == crop.shape[:3]
    assert abs(crop.shape[1] * crop.shape[2] / 128**2 - 1) < 0.1
    assert region.x <= 350 and region.x + region.width >= 450 and region.y <= 100 and region.y + region.height >= 190
    result = paste_edit(image, crop, torch.ones_like(inner), region.as_box())
    # half a pixel of misplacement would be 0.001 here
    torch.testing.assert_close(result, image, atol=6e-4, rtol=0)
    moved = {**region.as_box(), "x": region.x + 3}
    assert (paste_edit(image, crop, torch.ones_like(inner), moved) - image).abs().max() > 2e-3


def test_what_is_drawn_on_the_crop_appears_there_and_nowhere_else():
    image, mask = torch.zeros(1, 300, 500, 3), square(300, 500, 200, 60, 50)
    crop, inner, region = crop_to_edit(image, 128, mask, shape="square")
    assert tuple(crop.shape[1:3]) == (128, 128) and region.width == region.height == 75
    result = paste_edit(image, crop + inner[..., None], inner, region.as_box(), HARD)
    expected = mask[0] > 0.5
    assert ((result[0, ..., 0] > 0.5) != expected).float().sum() < 2 * 4 * 50
    assert result[0, 205:245, 65:105].min() > 0.98


@pytest.mark.parametrize(("height", "width"), [(1000, 667), (667, 1000), (129, 135), (128, 128)])
def test_without_a_region_the_edit_lies_where_vae_encode_cut_it(height, width):
    image = smooth(height, width)
    tall, wide = height // 8 * 8, width // 8 * 8
    top, left = height % 8 // 2, width % 8 // 2  # VAE.vae_encode_crop_pixels
    cut = image[:, top : top + tall, left : left + wide]
    result = paste_edit(image, cut + 0.1, torch.ones(1, tall, wide), seam=HARD)
    expected = image.clone()
    expected[:, top : top + tall, left : left + wide] += 0.1
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


def test_without_a_mask_the_whole_picture_is_taken():
    image = smooth(200, 300)
    for mask in (None, torch.zeros(1, 64, 64)):
        crop, inner, region = crop_to_edit(image, 128, mask)
        assert region == Region(0, 0, 300, 200)
        assert tuple(crop.shape[1:3]) == (104, 160)
        assert inner.min() > 1 - 1e-6
    assert crop_to_edit(image, 128, shape="square")[2] == Region(50, 0, 200, 200)


def test_a_region_at_the_border_is_moved_into_the_picture():
    for top, left in ((0, 0), (0, 280), (180, 0), (180, 280)):
        _, _, region = crop_to_edit(smooth(200, 300), 64, square(200, 300, top, left, 20), context=3.0)
        assert (region.width, region.height) == (60, 60)
        assert region.x == min(max(left - 20, 0), 240) and region.y == min(max(top - 20, 0), 140)


def test_a_long_thin_mask_is_taken_with_what_is_beside_it():
    mask = torch.zeros(1, 300, 300)
    mask[:, 140:150, 20:280] = 1
    crop, _, region = crop_to_edit(smooth(300, 300), 128, mask, context=1.0)
    assert region.height >= 130
    assert 1.8 <= crop.shape[2] / crop.shape[1] <= 2.2


def test_a_mask_of_the_source_is_cut_as_the_picture_was():
    source, edited = noise(1, 200, 300, 3), torch.ones(1, 64, 64, 3)
    box = {"x": 100, "y": 50, "width": 64, "height": 64}
    mask = square(200, 300, 60, 110, 20)
    result = paste_edit(source, edited, mask, box, HARD)
    assert torch.equal(result, torch.where(mask[..., None] > 0, torch.ones(()), source))


def test_without_an_area_it_is_where_the_pictures_differ():
    source = smooth(128, 160)
    edited = source + 0.01 * noise(1, 128, 160, 3)
    edited[:, 30:80, 50:100] = noise(1, 50, 50, 3, seed=1)
    result = paste_edit(source, edited, seam=Seam(match_colours=0.0))
    assert torch.equal(result[:, 40:70, 60:90], edited[:, 40:70, 60:90])
    kept = (result == source).all(-1)[0]
    assert kept[:14].all() and kept[:, :34].all() and kept[96:].all() and kept[:, 116:].all()
    everywhere = 1 - source
    assert torch.equal(paste_edit(source, everywhere), everywhere)
    assert torch.equal(paste_edit(source, source), source)


def test_what_agrees_amidst_the_edit_is_part_of_it():
    """An eye of the old animal would look out of the new one."""
    source = smooth(128, 128)
    edited = source.clone()
    edited[:, 30:90, 30:90] = 1 - source[:, 30:90, 30:90] + 0.3
    edited[:, 52:64, 52:64] = source[:, 52:64, 52:64] + 0.02
    result = paste_edit(source, edited.clamp(0, 1), seam=Seam(match_colours=0.0))
    torch.testing.assert_close(result[:, 52:64, 52:64], edited[:, 52:64, 52:64], atol=1e-6, rtol=0)
    assert torch.equal(result[:, :10], source[:, :10])


# --- batches ------------------------------------------------------------------------------------------------------


def test_a_batch_is_pasted_picture_by_picture():
    source, edited, area = noise(3, 50, 70, 3), noise(3, 32, 40, 3, seed=1), noise(3, 32, 40, seed=2).round()
    together = paste_edit(source, edited, area)
    apart = [paste_edit(source[i : i + 1], edited[i : i + 1], area[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(apart))


def test_several_edits_of_one_picture_are_several_pictures():
    source, edited, area = noise(1, 50, 70, 3), noise(4, 32, 40, 3, seed=1), square(32, 40, 8, 8, 10)
    result = paste_edit(source, edited, area)
    assert len(result) == 4
    assert torch.equal(result[2:3], paste_edit(source, edited[2:3], area))


# --- the seam -----------------------------------------------------------------------------------------------------


def test_grow_and_feather_reach_as_far_as_they_say():
    area = square(96, 96, 40, 40, 16)
    spread = feathered(area, Seam(grow=5, feather=8))[0, 48]
    assert (spread[35:61] > 0.999).all(), "grown by 5"
    assert (spread[:27] == 0).all() and (spread[69:] == 0).all(), "0 after 5 and 8 more"
    rise = spread[26:36]
    assert (rise.diff() > 0).all()
    assert torch.equal(feathered(area, Seam(0, 0)), area)


def test_an_area_at_the_border_does_not_fade_there():
    spread = feathered(square(64, 64, 0, 0, 20), Seam(grow=2, feather=8))
    assert spread[0, 0, 0] > 0.999 and spread[0, 0, :20].min() > 0.999


@pytest.mark.parametrize("size", [(1, 1), (8, 3), (2, 40)])
def test_tiny_pictures_are_no_error(size):
    result = paste_edit(noise(1, *size, 3), noise(1, *size, 3, seed=1), torch.ones(1, *size), seam=Seam(30, 30))
    assert result.isfinite().all() and result.shape == (1, *size, 3)


def test_a_tint_of_the_whole_edit_is_taken_off():
    source, area = smooth(128, 128), square(128, 128, 40, 40, 40)
    tint = torch.tensor([0.03, -0.02, 0.01])
    edit = source.clone()
    edit[:, 45:75, 45:75] = torch.tensor([0.5, 0.2, 0.4])
    for strength in (0.0, 0.5, 1.0):
        result = paste_edit(source, edit + tint, area, seam=Seam(4, 8, strength, 0.0))
        off = (result - edit)[0, 48:72, 48:72].mean((0, 1))
        torch.testing.assert_close(off, (1 - strength) * tint, atol=2e-3, rtol=0)


def test_the_edge_of_an_edit_that_was_cut_off_is_no_tint():
    """Half a picture turned to night: the other half, which was to become night as well, does not light it up."""
    source = torch.full((1, 64, 128, 3), 0.7)
    edited = torch.full((1, 64, 128, 3), 0.2)
    area = torch.zeros(1, 64, 128)
    area[..., :64] = 1
    result = paste_edit(source, edited, area, seam=Seam(keep_below=0.0))
    assert (result[:, :, :56] - 0.2).abs().max() < 0.01
    assert torch.equal(result[:, :, 72:], source[:, :, 72:])


def test_colours_that_agree_are_left_as_they_are():
    source = smooth(96, 96)
    edited = source.clone()
    edited[:, 30:60, 30:60] = 0.9
    result = paste_edit(source, edited, square(96, 96, 30, 30, 30), seam=Seam(4, 8, 1.0, 0.0))
    torch.testing.assert_close(result, edited, atol=1e-5, rtol=0)


def test_the_difference_is_continued_smoothly_into_the_unknown():
    """A linear difference is harmonic: the membrane of Poisson image editing is the same plane inside."""
    size = 256
    plane = torch.linspace(-0.1, 0.1, size).expand(size, size)[None, ..., None]
    known = 1 - square(size, size, 96, 96, 64)[0]
    spread = seam_colours(torch.where(known[None, ..., None] > 0, plane, torch.zeros(())), known[None])[0, ..., 0]
    coarse = torch.nn.functional.avg_pool2d(plane.movedim(-1, 1), 8)[0, 0]
    assert (spread - coarse).abs().max() < 0.02
    assert (spread - coarse)[16, 12:20].mean().abs() < 2e-3


# --- refusals -----------------------------------------------------------------------------------------------------


def test_batches_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="edited: batches must be alike or single, and are source 3, edited 2"):
        paste_edit(noise(3, 8, 8, 3), noise(2, 8, 8, 3), torch.ones(1, 8, 8))


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ({"x": 30, "y": 0, "width": 20, "height": 10}, "not inside the picture of 40x40"),
        ({"x": 0, "y": 0, "width": 0, "height": 10}, "not inside"),
        ({"x": -1, "y": 0, "width": 10, "height": 10}, "not inside"),
        ({"x": float("nan"), "y": 0, "width": 10, "height": 10}, "not inside"),
        ({"x": 0}, "no box"),
        ([1, 2, 3, 4], "no box"),
    ],
)
def test_a_box_that_is_none_or_lies_outside_is_refused(box, words):
    with pytest.raises(ValueError, match=f"crop_region: .*{words}"):
        paste_edit(noise(1, 40, 40, 3), noise(1, 8, 8, 3), torch.ones(1, 8, 8), box)


def test_what_is_no_picture_or_mask_is_refused():
    good, mask = noise(1, 8, 8, 3), torch.ones(1, 8, 8)
    for arguments, socket in (
        ((good[0], good, mask), "source"),
        ((good, good * float("nan"), mask), "edited"),
        ((good, good, mask * float("nan")), "edited_area"),
        ((good, good, good), "edited_area"),
    ):
        with pytest.raises(ValueError, match=f"^{socket}: "):
            paste_edit(*arguments)
    with pytest.raises(ValueError, match="^mask: it is 9x8 and the picture 8x8"):
        crop_to_edit(good, 64, torch.ones(1, 8, 9))


def test_a_box_in_a_list_of_one_is_read():
    box = {"x": 1.0, "y": 2, "width": 3, "height": 4}
    assert read_region([box], 10, 10, "crop_region") == read_region(box, 10, 10, "crop_region") == Region(1, 2, 3, 4)


def test_the_middle_is_the_largest_part_of_those_proportions():
    assert shown_by((200, 300), (64, 64)) == Region(50, 0, 200, 200)
    assert shown_by((300, 200), (64, 64)) == Region(0, 50, 200, 200)
    assert shown_by((200, 300), (128, 192)) == Region(0, 0, 300, 200)


@pytest.mark.parametrize("reach", [0, 1, 2, 3, 4, 5, 12, 13, 14, 40])
def test_the_largest_value_around_a_pixel_is_that_of_a_whole_square(reach):
    values = torch.randn(2, 1, 23, 31, generator=torch.Generator().manual_seed(reach))
    padded = torch.nn.functional.pad(values, (reach,) * 4, value=-math.inf)
    expected = padded.unfold(2, 2 * reach + 1, 1).unfold(3, 2 * reach + 1, 1).amax((-1, -2))
    assert torch.equal(largest_around(values, reach), expected)
