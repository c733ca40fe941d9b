"""The attention maps that an inversion keeps for its edits."""

import gc
import weakref

import comfy.hooks
import pytest
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP, add_wrapper_with_key
from pix2pix_zero.host.unet.jobs import attention_state, for_own_sampler
from small_edit import counted_edits, edit, invert
from small_unet import latent, small_model

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")


@pytest.fixture(scope="module")
def inversion(model):
    return invert(model)


@pytest.fixture(scope="module")
def expected(model, inversion):
    """The edit with all the maps of the inversion."""
    return edit(model, inversion)


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


def test_a_small_map_memory_keeps_the_noisiest_levels_and_the_edit(model, inversion, expected):
    per_level = inversion.maps.size // inversion.steps
    some = invert(model, map_memory=int(1.5 * per_level))
    assert some.maps.size <= 1.5 * per_level
    cpu = torch.device("cpu")
    assert [some.maps.get(level, cpu) is not None for level in range(1, some.steps + 1)] == [False, False, True]
    edited, recorded = counted_edits(model, some)
    assert recorded == some.steps - 1
    assert (edited - expected).abs().max() <= 1e-4 * edited.std()


def test_plain_ddim_inversion_keeps_the_maps_of_all_levels_but_the_last(model):
    inversion = invert(model, method="ddim")
    edited, recorded = counted_edits(model, inversion)
    assert recorded == 1
    expected = edit(model, invert(model, method="ddim", map_memory=0))
    assert (edited - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("method", ["official", "diffusers"])
def test_inversions_that_call_the_unet_off_the_grid_keep_no_maps(model, method):
    assert invert(model, method=method).maps is None


def test_maps_of_a_model_patched_differently_are_not_used(model, inversion):
    """A patch that came after the inversion would otherwise be taken for a part of the edit, and undone."""
    assert counted_edits(model.clone(), inversion)[1] == 0
    patched = model.clone()
    patched.set_model_attn2_patch(lambda q, k, v, options: (q * 1.1, k, v))
    assert counted_edits(patched, inversion)[1] == inversion.steps
    name = next(name for name in model.model.state_dict() if "attn2.to_q" in name)
    with_lora = model.clone()
    with_lora.add_patches({name: ("diff", (torch.zeros_like(model.model.state_dict()[name]),))})
    assert counted_edits(with_lora, inversion)[1] == inversion.steps


def closure(*args, **kwargs):
    """A new function each time, as nodes make them."""
    return lambda *inner: inner


def with_weight_wrapper(model):
    model.add_weight_wrapper("diffusion_model.out.2.weight", closure())


CHANGES = {
    "attention patch": lambda model: model.set_model_attn1_patch(closure()),
    "attention replacement": lambda model: model.set_model_attn2_replace(closure(), "output", 1),
    "attention override": lambda model: model.model_options["transformer_options"].update(
        optimized_attention_override=closure()
    ),
    "option inside the UNet": lambda model: model.model_options["transformer_options"].update(
        another_pack={"scale": 2.0}
    ),
    "function wrapper": lambda model: model.set_model_unet_function_wrapper(closure()),
    "wrapper": lambda model: model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "another", closure()),
    "wrapper in the options": lambda model: add_wrapper_with_key(
        WrappersMP.APPLY_MODEL, "another", closure(), model.model_options, is_model_options=True
    ),
    "callback": lambda model: model.add_callback_with_key(CallbacksMP.ON_LOAD, "another", closure()),
    "object patch": lambda model: model.add_object_patch("diffusion_model.out", torch.nn.Identity()),
    "weight wrapper": with_weight_wrapper,
    "injection": lambda model: model.set_injections("another", [PatcherInjection(closure(), closure())]),
    "attachment": lambda model: model.set_attachments("another", object()),
    "additional model": lambda model: model.set_additional_models("another", [small_model()]),
    "hook": lambda model: setattr(model, "forced_hooks", hook_group()),
}


def hook_group():
    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.WeightHook())
    return group


@pytest.mark.parametrize("change", CHANGES)
def test_every_way_to_change_a_model_counts_and_clones_are_alike(change):
    model = small_model()
    before, changed = attention_state(model), model.clone()
    assert attention_state(model.clone()) == before
    CHANGES[change](changed)
    once = attention_state(changed)
    assert once != before
    assert attention_state(changed.clone()) == once
    assert hash(attention_state(changed.clone())) == hash(once)
    again = model.clone()
    CHANGES[change](again)
    if change not in ("option inside the UNet", "attachment"):  # which are equal
        assert attention_state(again) != once


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.set_model_sampler_cfg_function(closure()),
        lambda model: model.set_model_sampler_post_cfg_function(closure()),
        lambda model: model.set_model_denoise_mask_function(closure()),
        for_own_sampler,
    ],
    ids=["cfg function", "post-cfg function", "mask function", "the pack itself"],
)
def test_what_does_not_reach_the_unet_leaves_the_maps_as_they_are(change):
    model = small_model()
    changed = model.clone()
    changed = change(changed) or changed
    assert attention_state(changed) == attention_state(model)


def test_kept_maps_hold_on_to_nothing_of_another_pack(model):
    class Pack:
        def __call__(self, n, context, value, options):
            return n, context, value

    patched, pack = model.clone(), Pack()
    patched.set_model_attn1_patch(pack)
    inversion, alive = invert(patched), weakref.ref(pack)
    assert inversion.maps.made_with == attention_state(patched)
    del patched, pack
    gc.collect()
    assert alive() is None
    assert inversion.maps.made_with != attention_state(model)


def test_maps_of_a_model_that_a_wrapper_changes_are_not_used(model, inversion):
    """A wrapper around the UNet that another pack put there after the inversion."""
    wrapped = model.clone()
    wrapped.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "another", lambda executor, x, *args, **kwargs: executor(1.1 * x, *args, **kwargs)
    )
    assert counted_edits(wrapped, inversion)[1] == inversion.steps
