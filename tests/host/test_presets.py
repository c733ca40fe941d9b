"""What the presets of the guided sampler compute, and what happens when memory runs out."""

import pytest
import torch
from pix2pix_zero.editing import guidance
from pix2pix_zero.editing.guidance import plain_step
from pix2pix_zero.host import running
from small_edit import counted_edits, edit, invert

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")


@pytest.fixture(scope="module")
def inversion(model):
    return invert(model)


@pytest.fixture(scope="module")
def without_maps(model):
    """An inversion that keeps none of its maps."""
    return invert(model, map_memory=0)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. (test)")


def short_of_memory(model, times, error=OUT_OF_MEMORY):
    """A clone in which another pack's patch fails as the allocator would, so many times in guided passes; and the failures."""
    failures = []

    def allocate(q, k, v, options):
        if torch.is_grad_enabled() and len(failures) < times and options["block"] == ("middle", 0):
            failures.append(options["block"])
            raise error
        return q, k, v

    short = model.clone()
    short.set_model_attn1_patch(allocate)
    return short, failures


@pytest.mark.parametrize("preset", ["default", "fast", "low memory", "official", "paper"])
def test_a_guided_step_that_runs_out_of_memory_goes_on_with_less(model, inversion, preset, caplog):
    enough, _ = short_of_memory(model, times=0)
    short, failures = short_of_memory(model, times=1)
    expected, edited = (edit(patched, inversion, preset=preset) for patched in (enough, short))
    assert len(failures) == 1
    assert (edited - expected).abs().max() <= 1e-4 * expected.std()
    warnings = [record for record in caplog.records if "out of memory" in record.message.lower()]
    assert [record.levelname for record in warnings] == ["WARNING"]


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, RuntimeError("could not create a primitive")], ids=["CUDA", "oneDNN"])
def test_a_guided_step_for_which_memory_never_suffices_says_so_and_the_next_edit_works(model, inversion, error):
    expected = edit(model, inversion)
    short, failures = short_of_memory(model, times=100, error=error)
    with pytest.raises(
        torch.OutOfMemoryError, match="^model: memory ran out in a guided step.*picture smaller"
    ) as told:
        edit(short, inversion, preset="low memory")
    assert told.value.__context__ is None, "nothing holds the tensors of the step that failed"
    assert 1 <= len(failures) < 10
    assert torch.equal(edit(model, inversion), expected)


def test_low_memory_gives_the_edit_of_the_default(model, inversion):
    default, lean = edit(model, inversion), edit(model, inversion, preset="low memory")
    assert (lean - default).abs().max() <= 1e-4 * default.std()


@pytest.mark.parametrize(("steps", "guided"), [(24, 10), (4, 4)])
def test_fast_guides_a_part_of_many_steps(model, steps, guided):
    inversion = invert(model, steps=steps, map_memory=0)
    edited, recorded = counted_edits(model, inversion, preset="fast", strength=1e-4)
    assert recorded == guided
    assert (edited - edit(model, inversion, strength=0.0)).abs().max() > 0.01 * edited.std()


@pytest.mark.parametrize("strength", [0.0, 1e-4])
def test_fast_holds_the_distance_of_the_two_predictions(model, strength):
    """At odd steps the negative's noise is that of the positive less what it was less in the step before."""
    inversion, estimates = invert(model, steps=4), []

    def note(args):
        sigma = float(args["sigma"].flatten()[0])
        predictions = [(args["input"] - args[name]) / sigma for name in ("cond_denoised", "uncond_denoised")]
        estimates.append((args["input"], sigma, *predictions))
        return args["denoised"]

    watched = model.clone()
    watched.set_model_sampler_post_cfg_function(note)
    edit(watched, inversion, preset="fast", strength=strength, cfg=4.0)
    assert len(estimates) == 4
    for index in (1, 3):
        distances = [positive - negative for _, _, positive, negative in estimates[index - 1 : index + 1]]
        torch.testing.assert_close(*distances, rtol=1e-3, atol=1e-4)
    fresh = [positive - negative for _, _, positive, negative in estimates[::2]]
    assert (fresh[1] - fresh[0]).abs().max() > 1e-2 * fresh[0].abs().max(), "even steps evaluate it"


@pytest.fixture(scope="module")
def official(model, inversion):
    """The edit of this preset without guidance."""
    return edit(model, inversion, preset="official", strength=0.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(local_blend=0.3, feature_until=0.5), "local_blend and feature_until"),
        (dict(strength=0.1, local_blend=0.3, feature_until=0.5), "guidance_strength, local_blend and feature_until"),
        (dict(feature_until=0.5), "feature_until"),
        ({}, None),
    ],
)
def test_official_says_on_the_node_what_it_leaves_out(model, inversion, official, options, named, monkeypatch):
    shown = []
    monkeypatch.setattr(running, "show", shown.append)
    edited = edit(model, inversion, preset="official", **{"strength": 0.0, **options})
    assert torch.equal(edited, official)
    told = [text for text in shown if "leaves out" in text]
    assert told == ([] if named is None else [f"preset official leaves out {named}."])


def test_paper_is_guidance_alone_in_every_step_by_the_papers_own(model, without_maps, monkeypatch):
    inversion, shown, asked = without_maps, [], []
    monkeypatch.setattr(running, "show", shown.append)

    def noted(gradient, sigma, size, path):
        asked.append(size)
        return plain_step(gradient, sigma, size, path)

    monkeypatch.setattr(guidance, "plain_step", noted)
    edited, recorded = counted_edits(
        model, inversion, preset="paper", strength=0.4, window=(0.0, 0.5), local_blend=0.3, feature_until=0.5
    )
    assert recorded == inversion.steps
    assert asked == [pytest.approx(0.1 * 50 / inversion.steps)] * inversion.steps
    assert torch.equal(edited, edit(model, inversion, preset="paper", strength=0.0))
    assert [text for text in shown if "leaves out" in text] == [
        "preset paper leaves out guidance_strength, local_blend and feature_until."
    ]


@pytest.mark.parametrize("preset", ["default", "fast", "low memory"])
def test_no_preset_but_the_papers_guides_unless_it_is_asked_to(model, without_maps, preset):
    assert counted_edits(model, without_maps, preset=preset, strength=0.0)[1] == 0
    assert counted_edits(model, without_maps, preset="paper", strength=0.0)[1] == without_maps.steps
