"""The attention maps that an inversion keeps for its edits."""

import pytest
import torch
from small_edit import counted_edits, edit, invert
from small_unet import latent


@pytest.mark.parametrize("method", ["direct", "fixed-point"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 6, 10)])
def test_maps_kept_from_the_inversion_give_the_edit_of_maps_recorded_anew(model, shape, method):
    without = invert(model, picture=latent(*shape), map_memory=0, method=method)
    expected, recorded = counted_edits(model, without)
    assert recorded == without.steps
    kept = invert(model, picture=latent(*shape), method=method)
    assert torch.equal(kept.trajectory, without.trajectory)
    edited, recorded = counted_edits(model, kept)
    assert recorded == 0
    assert (edited - expected).abs().max() <= 1e-4 * expected.std()
    assert (edit(model, kept, strength=0.0) - edited).abs().max() > 0.01 * expected.std(), "guidance must matter"


def test_maps_of_an_iteration_that_is_discarded_are_recorded_anew(model):
    """A patch of another pack makes the third evaluation of the first level useless."""
    calls = 0

    def disturb(args):
        nonlocal calls
        calls += 1
        return args["denoised"] + (5.0 if calls == 4 else 0.0)

    disturbed = model.clone()
    disturbed.set_model_sampler_post_cfg_function(disturb)
    inversion = invert(disturbed, method="fixed-point", fixed_point_iterations=2)
    assert calls == 1 + 3 * 3
    cpu = torch.device("cpu")
    assert [inversion.maps.get(level, cpu) is not None for level in (1, 2, 3)] == [False, True, True]
    calls = 0
    shorter = invert(model, method="fixed-point", fixed_point_iterations=1)
    assert torch.equal(inversion.trajectory[1], shorter.trajectory[1])


def test_a_small_map_memory_keeps_the_noisiest_levels_and_the_edit(model):
    everything = invert(model)
    per_level = everything.maps.size // everything.steps
    some = invert(model, map_memory=int(1.5 * per_level))
    assert some.maps.size <= 1.5 * per_level
    cpu = torch.device("cpu")
    assert [some.maps.get(level, cpu) is not None for level in range(1, some.steps + 1)] == [False, False, True]
    edited, recorded = counted_edits(model, some)
    assert recorded == some.steps - 1
    assert (edited - edit(model, everything)).abs().max() <= 1e-4 * edited.std()


def test_plain_ddim_inversion_keeps_the_maps_of_all_levels_but_the_last(model):
    inversion = invert(model, method="ddim")
    edited, recorded = counted_edits(model, inversion)
    assert recorded == 1
    expected = edit(model, invert(model, method="ddim", map_memory=0))
    assert (edited - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("method", ["official", "diffusers"])
def test_inversions_that_call_the_unet_off_the_grid_keep_no_maps(model, method):
    assert invert(model, method=method).maps is None


def test_maps_of_a_model_patched_differently_are_not_used(model):
    """A patch that came after the inversion would otherwise be taken for a part of the edit, and undone."""
    inversion = invert(model)
    assert counted_edits(model.clone(), inversion)[1] == 0
    patched = model.clone()
    patched.set_model_attn2_patch(lambda q, k, v, options: (q * 1.1, k, v))
    assert counted_edits(patched, inversion)[1] == inversion.steps
    name = next(name for name in model.model.state_dict() if "attn2.to_q" in name)
    with_lora = model.clone()
    with_lora.add_patches({name: ("diff", (torch.zeros_like(model.model.state_dict()[name]),))})
    assert counted_edits(with_lora, inversion)[1] == inversion.steps
