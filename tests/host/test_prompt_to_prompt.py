"""Prompt-to-Prompt through ComfyUI's own samplers, against the paper's formulas restated on what the layers saw."""

import comfy.samplers
import pytest
import torch
from pix2pix_zero.host.sampling.reference import ReferenceSettings, generate_reference
from prompt_to_prompt_runs import SOURCE, STEPS, Trace, apply_maps, branch, edit, encode, invert, maps_of, patch, sample
from small_unet import latent, small_model

pytestmark = pytest.mark.usefixtures("narrow_unet")


@pytest.fixture(scope="module")
def inversion(model, clip):
    return invert(model, clip)


def replaced(source, own):
    """SOURCE -> "a dog on a sofa": every map comes from the source."""
    return source


def refined(source, own):
    """SOURCE -> "a fluffy cat on a sofa": tokens after the new one move by one, and padding stays in its place."""
    edited = own.clone()
    edited[..., :2] = source[..., :2]
    edited[..., 3:8] = source[..., 2:7]  # cat on a sofa <end>
    edited[..., 8:] = source[..., 8:]
    return edited


def reweighted(source, own):
    """SOURCE with "cat: 3, sofa: 0"; outside the window of replacement too."""
    edited = own.clone()
    edited[..., 2] *= 3
    edited[..., 5] *= 0
    return edited


@pytest.mark.parametrize(
    ("target", "formula", "reweight"),
    [
        ("a dog on a sofa", replaced, ""),
        ("a fluffy cat on a sofa", refined, ""),
        (SOURCE, lambda source, own: reweighted(source, source), "cat: 3, sofa: 0"),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_follows_the_papers_formulas(model, clip, target, formula, reweight, batch):
    inversion = invert(model, clip, picture=latent(batch, 8, 12))
    with Trace(model) as trace:
        patched, positive = patch(trace.model, inversion, clip, target, cross=0.5, to_itself=0.25, reweight=reweight)
        sample(patched, inversion, positive, encode(clip, ""))
    steps = trace.steps()
    assert len(steps) == STEPS
    small = {8 * 12 // 4}
    for number, (source, call) in enumerate(steps):
        assert (source is None) == (number >= 2), "the source is needed in the windows only"
        if source is not None:
            model_input = inversion.trajectory[STEPS - number]
            assert torch.equal(source["x"], model_input), "the source branch is on the inversion's trajectory"
        for name in call["layers"]:
            for index in (0, 1):
                q, k, v, out = (branch(call, name, part, index) for part in ("to_q", "to_k", "to_v", "out"))
                own = maps_of(q, k)
                expected = own
                if index == 0 and name[3] == "attn1" and number < 1 and q.shape[1] in small:
                    expected = maps_of(source["layers"][name]["to_q"], source["layers"][name]["to_k"])
                if index == 0 and name[3] == "attn2" and number < 2:
                    of_source = maps_of(source["layers"][name]["to_q"], source["layers"][name]["to_k"])
                    expected = formula(of_source, own)
                elif index == 0 and name[3] == "attn2" and reweight:
                    expected = reweighted(None, own)
                difference = (out.double() - apply_maps(expected, v)).norm() / out.norm()
                assert difference <= 2e-6, (number, name, index)
                changed = (apply_maps(expected - own, v)).norm() / out.norm() > 1e-3
                assert changed == (expected is not own), "the formula must matter"


def test_a_swapped_word_of_more_tokens_gets_equal_shares(model, clip, inversion):
    target = "a tyrannosaurus on a sofa"
    pieces = [t for t in clip.tokenize("tyrannosaurus")["l"][0] if t[0] not in (49406, 49407)]
    assert len(pieces) > 1
    with Trace(model) as trace:
        patched, positive = patch(trace.model, inversion, clip, target, cross=1.0, to_itself=0.0)
        sample(patched, inversion, positive, encode(clip, ""))
    source, call = trace.steps()[0]
    name = ("middle", 0, 1, "attn2")
    maps = maps_of(source["layers"][name]["to_q"], source["layers"][name]["to_k"])
    n = len(pieces)
    own = maps_of(branch(call, name, "to_q", 0), branch(call, name, "to_k", 0))
    assert own.shape == maps.shape
    expected = torch.cat(
        [maps[..., :2], maps[..., 2:3].expand(-1, -1, -1, n) / n, maps[..., 3:7], maps[..., 6 + n :]], -1
    )
    out = apply_maps(expected, branch(call, name, "to_v", 0))
    assert (branch(call, name, "out", 0).double() - out).norm() <= 2e-6 * out.norm()


def test_the_same_text_gives_the_plain_reconstruction_or_better(model, clip, inversion):
    source = latent()["samples"]
    plain = sample(model, inversion, inversion.source, inversion.source, cfg=1.0) - source
    edited = edit(model, inversion, clip, SOURCE, cfg=1.0, cross=1.0, to_itself=1.0) - source
    assert edited.norm() <= plain.norm()
    direct = invert(model, clip, method="direct")
    exact = edit(model, direct, clip, SOURCE, cfg=1.0, cross=1.0, to_itself=1.0) - source
    assert exact.abs().max() <= 1e-4 * source.std()
    assert plain.abs().max() > 1e-2 * source.std()


def test_a_generated_picture_comes_back_with_its_own_text(model, clip):
    with torch.inference_mode():
        empty = {"samples": torch.zeros(1, 4, 8, 8)}
        negative = encode(clip, "ugly")
        inversion, samples = generate_reference(
            model, encode(clip, SOURCE), negative, empty, ReferenceSettings(STEPS, 3.0, 7)
        )
    again = edit(model, inversion, clip, SOURCE, cfg=3.0, negative=negative, cross=1.0, to_itself=1.0)
    assert (again - samples).abs().max() <= 1e-4 * samples.std()
    edited = edit(model, inversion, clip, "a dog on a sofa", cfg=3.0, negative=negative)
    assert (edited - samples).abs().max() > 1e-2 * samples.std()


def test_half_precision_gives_nearly_the_same_edit(clip):
    """Maps are drawn in fp32 whatever the model computes in."""
    edits = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            half = small_model(weight_dtype=dtype)
        edits.append(edit(half, invert(half, clip, method="direct"), clip, "a fluffy cat on a sofa"))
    assert (edits[0] - edits[1]).norm() <= 0.05 * edits[0].norm()


def test_without_windows_it_is_the_word_swap(model, clip, inversion):
    target = "a dog on a sofa"
    expected = sample(model, inversion, encode(clip, target), encode(clip, ""))
    swapped = edit(model, inversion, clip, target, cross=0.0, to_itself=0.0)
    assert (swapped - expected).abs().max() <= 1e-5 * expected.std()
    for window in (dict(cross=0.5, to_itself=0.0), dict(cross=0.0, to_itself=0.5)):
        edited = edit(model, inversion, clip, target, **window)
        assert (edited - expected).abs().max() > 1e-3 * expected.std()


def test_a_batch_equals_single_runs(model, clip):
    pictures = latent(batch=3, height=8, width=12)
    options = dict(target="a fluffy cat on a sofa", local_blend=0.5)
    together = edit(model, invert(model, clip, picture=pictures), clip, **options)
    for i in (0, 2):
        one = {"samples": pictures["samples"][i : i + 1]}
        alone = edit(model, invert(model, clip, picture=one), clip, **options)
        assert (together[i : i + 1] - alone).abs().max() <= 1e-4 * alone.std()


def test_a_longer_negative_text_changes_nothing_in_the_positive_half(model, clip, inversion):
    """ComfyUI then repeats the shorter text's tokens, so that both halves go through the UNet together."""
    negative = encode(clip, "ugly " * 100)
    assert negative[0][0].shape[1] == 154
    patched, positive = patch(model, inversion, clip, "a fluffy cat on a sofa", reweight="cat: 2", local_blend=0.5)
    together = sample(patched, inversion, positive, negative)

    def one_by_one(args):
        rest = args["input"], args["sigma"], {**args["model_options"], "sampler_calc_cond_batch_function": None}
        rest[2].pop("sampler_calc_cond_batch_function")
        return [comfy.samplers.calc_cond_batch(args["model"], [cond], *rest)[0] for cond in args["conds"]]

    patched.set_model_sampler_calc_cond_batch_function(one_by_one)
    alone = sample(patched, inversion, positive, negative)
    assert (together - alone).abs().max() <= 1e-4 * alone.std()


def test_prompts_of_more_than_one_chunk(model, clip):
    """77 tokens against 154: more words than one chunk holds."""
    source = ", ".join(["a cat"] * 30)
    for before, after in ((source, "a dog"), ("a cat", source.replace("cat", "dog")), (source, source + " at night")):
        inversion = invert(model, clip, before)
        edited = edit(model, inversion, clip, after, source=before)
        assert edited.isfinite().all()


def test_weights_in_a_prompt_do_not_move_its_words(model, clip):
    """(word:1.2) changes the encoding, not the tokens."""
    source = "a (cat:1.3) on a sofa"
    inversion = invert(model, clip, source)
    with Trace(model) as trace:
        patched, positive = patch(trace.model, inversion, clip, "a (dog:0.8) on a sofa", source=source, to_itself=0.0)
        sample(patched, inversion, positive, encode(clip, ""))
    source_call, call = trace.steps()[0]
    name = ("middle", 0, 0, "attn2")
    maps = maps_of(source_call["layers"][name]["to_q"], source_call["layers"][name]["to_k"])
    expected = apply_maps(maps, branch(call, name, "to_v", 0))
    assert (branch(call, name, "out", 0).double() - expected).norm() <= 2e-6 * expected.norm()


def test_levels_between_those_of_the_inversion_are_interpolated(model, clip, inversion):
    patched, positive = patch(model, inversion, clip, "a dog on a sofa", local_blend=0.5)
    sigmas = inversion.sigmas.flip(0)
    finer = torch.cat([sigmas, (sigmas[:-1] + sigmas[1:]) / 2]).sort(descending=True).values
    edited = sample(patched, inversion, positive, encode(clip, ""), sigmas=finer)
    assert edited.isfinite().all()


def test_shares_of_the_steps_end_at_the_same_levels_as_those_of_plug_and_play(model, clip, inversion):
    """On a grid of half steps: what lies between two levels of the inversion goes with the cleaner one."""
    levels = inversion.sigmas.flip(0)
    between = torch.stack([levels[:-1], (levels[:-1] + levels[1:]) / 2], 1).flatten()
    sigmas = torch.cat([between, levels[-1:]])
    with Trace(model) as trace:
        patched, positive = patch(trace.model, inversion, clip, "a dog on a sofa", cross=0.5, to_itself=0.0)
        sample(patched, inversion, positive, encode(clip, ""), sigmas=sigmas)
    from_source = [source is not None for source, _ in trace.steps()]
    assert from_source == [sigma >= inversion.lowest_sigma(0.5) for sigma in sigmas[:-1].tolist()]
    assert sum(from_source) == 3
