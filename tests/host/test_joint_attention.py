"""Where diffusion transformers attend: which rows are the picture's, and the source's keys, values and features in them."""

from dataclasses import replace

import pytest
import torch
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP
from flow_families import FAMILIES, TOKENS, picture, small_family, texts
from joint_runs import FIRST_ROW, PATCH, Seen, evaluate, noted
from pix2pix_zero.attention_patches import joint
from pix2pix_zero.attention_patches.joint import JointSite, holding_sites, joint_sites, with_joint_attention
from pix2pix_zero.host.methods import joint_blocks, plug_and_play
from pix2pix_zero.host.methods.plug_and_play import with_source_features
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from pix2pix_zero.host.sampling.reference import ReferenceSettings, generate_reference
from plug_and_play_runs import sample

NAMES = [name for name, family in FAMILIES.items() if family.known]


@pytest.fixture(scope="module", params=NAMES)
@torch.inference_mode()
def family(request):
    """(name, MODEL)"""
    return request.param, small_family(request.param)


@pytest.fixture(scope="module")
def referenced(family):
    """(name, MODEL, an inversion, its picture)"""
    return *family, *reference(family)


@pytest.fixture(scope="module")
@torch.inference_mode()
def sd3():
    return "SD 3", small_family("SD 3")


def with_wrapper(model, sites, attend):
    """Model options under which `attend` gives the output of the attention at `sites`."""

    class Call:
        def __init__(self, model, x, arguments):
            self.model, self.x, self.arguments = model, x, arguments

    def wrapped(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **more):
        call = Call(executor.class_obj, x, more)
        with with_joint_attention(call, sites, attend, transformer_options) as options:
            return executor(x, t, c_concat, c_crossattn, control, options, **more)

    options = create_model_options_clone(model.model_options)
    options["transformer_options"]["wrappers"] = {WrappersMP.APPLY_MODEL: {"test": [wrapped]}}
    return options


@torch.inference_mode()
def first_attention(family, latent, text=None):
    """(the picture's rows as a slice, v [B, rows, heads*d]) in the first block."""
    name, model = family
    seen = []

    def attend(site, attention, q, k, v):
        seen.append((attention.picture, v.transpose(1, 2).flatten(2)))
        return attention(q, k, v)

    evaluate(model, name, latent, with_wrapper(model, joint_sites(model.model.diffusion_model)[:1], attend), text)
    return seen[0]


def latent_of(model, **options):
    return picture(model, **options)["samples"].reshape(1, -1, 8, 12)


def changed_rows(before, after):
    return (before != after).any(-1)[0].nonzero().flatten().tolist()


def test_the_rows_of_the_picture_are_those_that_its_latent_changes(family):
    name, model = family
    latent = latent_of(model)
    rows, before = first_attention(family, latent)
    side = PATCH[name]
    height, width = 8 // side, 12 // side
    assert (rows.start, rows.stop) == (FIRST_ROW[name], FIRST_ROW[name] + height * width)
    moved = latent.clone()
    moved[..., -1, 2] += 1.0
    changed = changed_rows(before, first_attention(family, moved)[1])
    if name in ("Lumina 2", "Z-Image"):  # their refiners have mixed the picture before
        assert set(changed) >= set(range(rows.start, rows.stop))
        assert all(row >= rows.start for row in changed)
    else:
        assert changed == [rows.start + (height - 1) * width + 2 // side]


@pytest.mark.parametrize("name", ["Flux dev", "Qwen-Image"])
def test_reference_latents_are_not_the_picture(name):
    with torch.inference_mode():
        model = small_family(name)
    latent = latent_of(model)

    def text(value):
        return texts(name, 1, reference_latents=[picture(model)["samples"][..., :6] + value])

    rows, before = first_attention((name, model), latent, text(0.0))
    assert (rows.start, rows.stop) == (TOKENS, TOKENS + 24)
    changed = changed_rows(before, first_attention((name, model), latent, text(1.0))[1])
    assert changed == list(range(rows.stop, rows.stop + 12))


def test_known_blocks_are_of_the_full_size_and_others_are_spread():
    class Flux(torch.nn.Module):
        def __init__(self, double, single):
            super().__init__()
            self.double_blocks, self.single_blocks = (
                torch.nn.ModuleList(torch.nn.Identity() for _ in range(n)) for n in (double, single)
            )

    kind = "comfy.ldm.flux.model"
    Flux.__module__, Flux.__qualname__ = kind, "Flux"
    known = holding_sites(Flux(19, 38))
    assert [site.number for site in known if site.blocks == "double_blocks"] == [0, 1, 17, 18]
    assert [site.number for site in known if site.blocks == "single_blocks"] == [6, 9, 34, 35, 37]
    spread = holding_sites(Flux(8, 24))
    assert 4 <= len(spread) <= joint.CHOSEN and spread[0] == JointSite("double_blocks", 0)


def test_a_transformer_of_unknown_class_is_refused():
    with pytest.raises(ValueError, match="^model: where Identity attends is not known"):
        joint_sites(torch.nn.Identity())


def test_a_patch_that_takes_rows_away_is_refused(sd3):
    name, model = sd3

    def attend(site, attention, q, k, v):
        return attention(q, k, v)

    dit = model.model.diffusion_model
    options = with_wrapper(model, joint_sites(dit), attend)
    x_embedder = dit.x_embedder
    handle = x_embedder.register_forward_hook(lambda module, args, out: out[:, :4])
    try:
        dit.cropped_pos_embed = lambda *args, **kwargs: torch.zeros(())
        with pytest.raises(ValueError, match="^model: another patch changes how many rows"):
            evaluate(model, name, latent_of(model), options)
    finally:
        handle.remove()
        del dit.cropped_pos_embed


@torch.inference_mode()
def reference(family, text=1):
    name, model = family
    settings = ReferenceSettings(3, 1.0, seed=5)
    return generate_reference(model, texts(name, text), texts(name, 2), picture(model), settings)


@pytest.mark.works("Plug-and-Play", family=FAMILIES)
def test_plug_and_play_draws_the_source_for_its_own_text_and_another_picture_for_another(referenced):
    name, model, source, drawn = referenced
    with torch.inference_mode():
        patched, plain = (with_source_features(model, source, until, until) for until in (1.0, 0.0))
    own, other = texts(name, 1), texts(name, 3)
    again = sample(patched, source, own, own, cfg=1.0)
    assert again.shape == drawn.shape
    assert (again - drawn).abs().max() <= 1e-4
    edited, unheld = (sample(each, source, other, own, cfg=1.0) for each in (patched, plain))
    assert edited.isfinite().all()
    assert min((edited - drawn).std(), (edited - unheld).std()) > 1e-4 * drawn.std()


def hooks_on(model):
    return [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.model.diffusion_model.modules()]


def test_another_packs_attention_sees_the_sources_keys_and_values_in_the_edit(referenced):
    name, model, source, _ = referenced
    seen = Seen()
    with torch.inference_mode():
        patched = with_source_features(seen.patch(model), source, 0.0, 1.0)
    before = hooks_on(model)
    sample(patched, source, texts(name, 3), texts(name, 2), cfg=1.0)
    assert hooks_on(model) == before
    start, size = FIRST_ROW[name], 96 // PATCH[name] ** 2
    pairs = pairs_of(seen.calls, slice(start, start + size))
    # The source's call ends where its last keys are read, ahead of that attention.
    assert len(pairs) >= source.steps * (len(holding_sites(model.model.diffusion_model)) - 1)
    for rows, theirs, ours in pairs:
        assert torch.equal(theirs[2][:, rows], ours[2][:, rows])
    texts_of = [(theirs, ours) for rows, theirs, ours in pairs if ours[0].shape[1] > size]
    assert all(not torch.equal(theirs[1], ours[1]) for theirs, ours in texts_of)


def pairs_of(calls, rows):
    """(rows, a call, a later one) that have the picture's keys in common."""
    whole = [call for call in calls if rows.stop <= call[0].shape[1] == call[1].shape[1]]
    return [
        (rows, one, other)
        for i, one in enumerate(whole)
        for other in whole[i + 1 :]
        if one[1].shape == other[1].shape and torch.equal(one[1][:, rows], other[1][:, rows])
    ]


@pytest.mark.parametrize("name", ["SD 3", "Wan 2.1"])
def test_with_a_mask_keys_are_the_sources_outside_it_and_the_edits_own_inside(name):
    with torch.inference_mode():
        model = small_family(name)
    source, drawn = reference((name, model))
    mask = torch.zeros(1, 1, 8, 12)
    mask[..., :6] = 1.0
    seen = Seen()
    with torch.inference_mode():
        patched = with_source_features(seen.patch(model), replace(source, noise_mask=mask), 0.0, 1.0)
    edited = sample(patched, source, texts(name, 3), texts(name, 2), cfg=1.0)
    assert (edited - drawn)[..., 6:].abs().max() <= 1e-4
    start = FIRST_ROW[name]
    to_itself = [call for call in seen.calls if call[0].shape[1] == call[1].shape[1] == start + 24]
    # In each step the first block of the source, then both of the edit.
    theirs, ours = (call[1][:1, start:].unflatten(1, (4, 6)) for call in to_itself[3:5])
    assert torch.equal(theirs[:, :, 3:], ours[:, :, 3:])
    assert ((theirs - ours)[:, :, :3].abs().amax(-1) > 1e-5).all()


@pytest.mark.parametrize("name", ["SD 3", "Qwen-Image"])
@torch.inference_mode()
def test_batches_equal_single_runs(name):
    model = small_family(name)
    pictures = [picture(model, seed=seed)["samples"] for seed in (3, 4)]
    settings = InversionSettings(3)
    own, other = texts(name, 1), texts(name, 3)
    both, single = (
        invert_latent(model, own, {"samples": samples}, settings) for samples in (torch.cat(pictures), pictures[1])
    )
    drawn, alone = (sample(with_source_features(model, each, 0.7, 0.7), each, other, own) for each in (both, single))
    assert (drawn[1:] - alone).abs().max() <= 1e-4


@torch.inference_mode()
def test_weights_and_options_stay_as_they_were(sd3):
    name, model = sd3
    before = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    options, hooks = repr(model.model_options), hooks_on(model)
    source, _ = reference(sd3)
    sample(with_source_features(model, source, 1.0, 1.0), source, texts(name, 3), texts(name, 1))
    assert repr(model.model_options) == options and hooks_on(model) == hooks
    assert all(torch.equal(weight, before[key]) for key, weight in model.model.state_dict().items())


@torch.inference_mode()
def test_with_blocks_chosen_for_the_edit_the_sources_own_text_draws_the_source(sd3, monkeypatch):
    monkeypatch.setattr(joint_blocks, "CHOSEN", 1)
    scores = noted(monkeypatch, joint_blocks, "agreement")
    chosen = noted(monkeypatch, plug_and_play, "scored_sites")
    name, model = sd3
    source, drawn = reference(sd3)
    own, other = texts(name, 1), texts(name, 3)
    patched = with_source_features(model, source, 1.0, 1.0)
    assert (sample(patched, source, own, own, cfg=1.0) - drawn).abs().max() <= 1e-4
    seen = Seen()
    patched = with_source_features(seen.patch(model), source, 0.0, 1.0)
    sample(patched, source, other, own, cfg=1.0)
    read = [call for call in seen.calls if call[0].shape[1] == TOKENS + 24]
    # Both texts are evaluated to choose a block, in two blocks each; then a step has those of the source up to it, and two.
    assert len(read) in (4 + 2 * source.steps, 4 + 3 * source.steps)
    last = scores[-2:]
    assert [[site.number for site in sites] for sites in chosen[-1]] == [
        [last.index(min(last))]
    ]  # the block that agrees least
