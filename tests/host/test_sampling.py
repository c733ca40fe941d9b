"""Inversion and the guided sampler on a small random UNet, through the real guider."""

import math
import re
from dataclasses import replace

import comfy.model_management
import comfy.samplers
import pytest
import torch
from pix2pix_zero.editing.local_blend import LocalBlend
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host import progress, sampling
from pix2pix_zero.host.plug_and_play import with_source_features
from pix2pix_zero.nodes.inversion import Pix2PixZeroInversion
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler
from small_unet import conditioning, latent, small_model

OFF = NoiseRegularization(steps=0)
MILD = NoiseRegularization(kl_weight=1.0, steps=1, rolls=2)


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        model = small_model()
        comfy.model_management.load_models_gpu([model])
        return model


@torch.inference_mode()
def edit(model, inversion, positive=None, negative=None, strength=6e-4, cfg=2.0, **options):
    positive = positive or conditioning(seed=1)
    return sampling.sample_edit(model, inversion, positive, negative or conditioning(), cfg, strength, **options)


@torch.inference_mode()
def invert(model, positive=None, picture=None, steps=3, regularization=MILD, **options):
    return sampling.invert_latent(
        model, positive or conditioning(), picture or latent(), steps, 0, regularization, **options
    )


def test_a_batch_equals_single_runs(model):
    texts, edits = conditioning(rows=3), conditioning(rows=3, seed=1)
    pictures = latent(batch=3, height=8, width=12)
    together = edit(model, invert(model, texts, pictures), edits, texts, strength=6e-5)
    for i in (0, 2):
        one_text, one_edit = [[texts[0][0][i : i + 1], {}]], [[edits[0][0][i : i + 1], {}]]
        picture = {"samples": pictures["samples"][i : i + 1]}
        alone = edit(model, invert(model, one_text, picture), one_edit, one_text, strength=6e-5)
        difference = model.model.process_latent_in(together[i : i + 1] - alone)
        assert difference.abs().max() <= 1e-4


def test_captions_that_come_as_a_list_go_to_their_pictures(model, run_node):
    texts, edits = conditioning(rows=2), conditioning(rows=2, seed=1)
    as_list = [[[text[None], {}]] for text in texts[0][0]]
    edits_as_list = [[[text[None], {}]] for text in edits[0][0]]
    pictures = latent(batch=2)
    settings = dict(
        steps=[3],
        seed=[0],
        autocorrelation_weight=[MILD.autocorrelation_weight],
        kl_weight=[MILD.kl_weight],
        regularization_steps=[MILD.steps],
        autocorrelation_rolls=[MILD.rolls],
        method=["direct"],
    )
    inversions, *others = run_node(
        Pix2PixZeroInversion, model=[model], positive=as_list, latent_image=[pictures], **settings
    )
    assert [len(output) for output in (inversions, *others)] == [1, 1, 1, 1]
    window = dict(start_percent=[0.0], end_percent=[1.0], preset=["default"])
    latents, areas = run_node(
        Pix2PixZeroKSampler,
        model=[model],
        inversion=inversions,
        positive=edits_as_list,
        negative=as_list,
        cfg=[2.0],
        guidance_strength=[6e-4],
        **window,
    )
    expected = edit(model, invert(model, texts, pictures), edits, texts)
    assert len(latents) == len(areas) == 1
    assert torch.equal(latents[0]["samples"], expected)


def test_stock_sampling_from_noise_and_sigmas_equals_the_unguided_sampler(model):
    """The outputs `noise` and `sigmas` drive SamplerCustomAdvanced with euler, which is DDIM in sigma space."""
    with torch.inference_mode():
        inversion = invert(model, method="ddim")
        expected = edit(model, inversion, strength=0.0)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(conditioning(seed=1), conditioning())
        guider.set_cfg(2.0)
        noise = sampling.inverted_noise(inversion, model)
        stock = guider.sample(
            torch.zeros_like(noise), noise, comfy.samplers.sampler_object("euler"), inversion.sigmas.flip(0)
        )
    assert (stock - expected).abs().max() <= 1e-4 * expected.std()


def test_features_of_the_picture_are_put_in_as_plug_and_play_does(model):
    """Without guidance, blend and residuals it is euler on the MODEL of the other node, without its attention."""
    with torch.inference_mode():
        inversion = invert(model, method="ddim", steps=4)
        edits = [edit(model, inversion, strength=0.0, feature_until=share) for share in (0.0, 0.5)]
        guider = comfy.samplers.CFGGuider(with_source_features(model, inversion, 0.5, 0.0))
        guider.set_conds(conditioning(seed=1), conditioning())
        guider.set_cfg(2.0)
        noise = sampling.inverted_noise(inversion, model)
        stock = guider.sample(
            torch.zeros_like(noise), noise, comfy.samplers.sampler_object("euler"), inversion.sigmas.flip(0)
        )
    assert (edits[1] - stock).abs().max() <= 1e-4 * stock.std()
    assert (edits[1] - edits[0]).abs().max() > 1e-2 * stock.std()


def test_features_leave_the_unedited_picture_and_the_kept_maps_as_they_are(model):
    inversion = invert(model)
    same = edit(model, inversion, conditioning(), conditioning(), feature_until=1.0)
    assert (same - latent()["samples"]).abs().max() <= 1e-3 * same.std()
    kept, recorded = (edit(model, of_maps, feature_until=0.7) for of_maps in (inversion, replace(inversion, maps=None)))
    assert (kept - recorded).abs().max() <= 1e-3 * kept.std()


def test_the_unedited_picture_comes_back_exactly(model):
    source = latent()["samples"]
    exact, plain = (
        edit(model, invert(model, method=method), conditioning(), conditioning(), strength=0.0) - source
        for method in ("direct", "ddim")
    )
    assert exact.abs().max() <= 1e-4 * source.std()
    assert plain.abs().max() > 1e-2 * source.std()


def test_fixed_points_bring_the_picture_back_by_plain_sampling_and_with_residuals_exactly(model):
    source = latent()["samples"]
    errors = []
    for options in ({"method": "ddim"}, *({"method": "fixed-point", "fixed_point_iterations": n} for n in (1, 3, 10))):
        inversion = invert(model, **options)
        plain = edit(model, replace(inversion, residuals=None), conditioning(), conditioning(), strength=0.0)
        errors.append(float((plain - source).abs().max() / source.std()))
    assert errors[1] < 0.5 * errors[0]
    assert errors[3] < 1e-3 < 0.5 * errors[1]
    assert errors == sorted(errors, reverse=True)
    inversion = invert(model, method="fixed-point", fixed_point_iterations=1)
    exact = edit(model, inversion, conditioning(), conditioning(), strength=0.0)
    assert (exact - source).abs().max() <= 1e-4 * source.std()


def test_fixed_point_inversion_without_iterations_begins_as_direct_inversion(model):
    direct, fixed = invert(model), invert(model, method="fixed-point", fixed_point_iterations=0)
    torch.testing.assert_close(fixed.trajectory[:3], direct.trajectory[:3])
    torch.testing.assert_close(fixed.residuals[:2], direct.residuals[:2])


@pytest.mark.parametrize("method", ["direct", "ddim", "official", "fixed-point"])
def test_the_measured_reconstruction_is_that_of_a_stock_sampler(model, method):
    """SamplerCustomAdvanced with euler, from the outputs `noise` and `sigmas`."""
    picture = latent(batch=2, height=6)
    inversion = invert(model, picture=picture, method=method, measure_reconstruction=True)
    without = invert(model, picture=picture, method=method)
    assert without.reconstruction_psnr is None
    assert torch.equal(without.trajectory, inversion.trajectory)
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(conditioning(), conditioning())
        guider.set_cfg(1.0)
        noise = sampling.inverted_noise(inversion, model)
        euler = comfy.samplers.sampler_object("euler")
        again = guider.sample(torch.zeros_like(noise), noise, euler, inversion.sigmas.flip(0))
    for psnr, ours, source in zip(inversion.reconstruction_psnr, again, picture["samples"], strict=True):
        mean_squared = float((ours - source).square().mean())
        peak = float(source.max() - source.min())
        assert float(psnr) == pytest.approx(10 * math.log10(peak**2 / mean_squared), abs=0.02)


@pytest.mark.parametrize("method", ["direct", "ddim"])
@pytest.mark.parametrize("measured", [False, True])
def test_the_node_reports_how_each_picture_comes_back(model, run_node, method, measured, caplog, monkeypatch):
    shown = []
    monkeypatch.setattr(progress, "show", shown.append)
    settings = dict(
        steps=3,
        seed=0,
        autocorrelation_weight=0.0,
        kl_weight=0.0,
        regularization_steps=0,
        autocorrelation_rolls=0,
        method=method,
        measure_reconstruction=measured,
    )
    inputs = {name: [value] for name, value in settings.items()}
    pictures = [latent(seed=1), latent(batch=2, seed=2)]
    with caplog.at_level("INFO"):
        inversions, _, _, reports = run_node(
            Pix2PixZeroInversion, model=[model], positive=[conditioning()], latent_image=pictures, **inputs
        )
    assert len(reports) == 2
    for inversion, report, batch in zip(inversions, reports, (1, 2)):
        figures = re.findall(r"\d+\.\d", report)
        assert len(figures) == (batch if measured else 0)
        for figure, psnr in zip(figures, inversion.reconstruction_psnr if measured else []):
            assert float(figure) == pytest.approx(float(psnr), abs=0.051)
        assert ("dB" in report) == measured
        assert ("exact" in report) == (method == "direct")
        assert report in caplog.text
    assert shown[-1].split("\n") == reports
    redrawn = [text for text in shown if text.startswith("Redrawing")]
    assert redrawn == [f"Redrawing {step}/3" for step in (1, 2, 3)] * (2 if measured else 0)


@pytest.mark.parametrize("method", ["ddim", "fixed-point"])
@pytest.mark.parametrize("strength", [0.0, 6e-4])
def test_the_caption_as_negative_takes_the_scale_of_guidance_out(model, method, strength):
    """Negative-prompt inversion (Miyake et al. 2023): without an edit any cfg redraws the picture as cfg 1 does."""
    inversion = invert(model, method=method)
    source, others = conditioning(), conditioning(seed=2)
    plain = edit(model, inversion, source, source, strength, cfg=1.0)
    guided = edit(model, inversion, source, source, strength, cfg=7.5)
    assert (guided - plain).abs().max() <= 1e-4 * plain.std()
    another = edit(model, inversion, source, others, strength, cfg=7.5)
    assert (another - plain).abs().max() > 1e-2 * plain.std()


def test_unmasked_part_is_the_source_exactly(model):
    picture = latent()
    picture["noise_mask"] = torch.zeros(1, 8, 8)
    picture["noise_mask"][..., :4] = 1.0
    edited = edit(model, invert(model, picture=picture))
    assert (edited - picture["samples"])[..., 4:].abs().max() < 1e-5
    assert (edited - picture["samples"])[..., :4].abs().mean() > 0.1


@pytest.mark.parametrize("shape", [(8, 12), (6, 10), (2, 4)])
def test_any_size_the_model_takes(model, shape):
    edited = edit(model, invert(model, picture=latent(1, *shape)))
    assert edited.shape == (1, 4, *shape)
    assert edited.isfinite().all()


def test_guidance_pulls_the_maps_towards_the_source(model):
    inversion = invert(model)
    distances = []

    class Passes(sampling.UNetPasses):
        def denoise_and_match(self, *args):
            denoised, gradient, distance = super().denoise_and_match(*args)
            distances[-1].append(distance.item())
            return denoised, gradient, distance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "UNetPasses", Passes)
        for strength in (1e-9, 1.2e-3):
            distances.append([])
            edit(model, inversion, strength=strength)
    free, guided = distances
    assert guided[0] == pytest.approx(free[0])
    assert sum(guided) < sum(free)


def test_the_guidance_window_is_respected(model):
    inversion = invert(model)
    free = edit(model, inversion, strength=0.0)
    assert torch.equal(edit(model, inversion, window=(0.99999, 1.0)), free)
    assert not torch.equal(edit(model, inversion, window=(0.0, 0.5)), free)


def test_generated_reference_is_the_picture_its_trajectory_ends_on(model):
    with torch.inference_mode():
        empty = {"samples": torch.zeros(2, 4, 8, 8)}
        inversion, samples = sampling.generate_reference(model, conditioning(), conditioning(seed=2), empty, 3, 2.0, 7)
        again = edit(model, inversion, conditioning(), conditioning(seed=2), strength=0.0)
    assert (again - samples).abs().max() <= 1e-4 * samples.std()
    assert not torch.equal(samples[0], samples[1])


@pytest.mark.parametrize("steps", [0, 1001, -3])
def test_steps_out_of_range_are_refused(model, steps):
    with pytest.raises(ValueError, match="steps"):
        invert(model, steps=steps)


def test_nan_latent_is_refused(model):
    picture = latent()
    picture["samples"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="latent_image.*NaN"):
        invert(model, picture=picture)


def test_latent_of_another_kind_is_refused(model):
    with pytest.raises(ValueError, match="latent_image.*VAE"):
        invert(model, picture={"samples": torch.randn(1, 16, 8, 8)})


def test_inversion_of_another_model_is_refused(model):
    inversion = invert(model)
    with torch.inference_mode():
        other = small_model(seed=5)
    with pytest.raises(ValueError, match="inversion.*another model"):
        edit(other, inversion)


def test_texts_that_do_not_match_the_batch_are_refused(model):
    with pytest.raises(ValueError, match="positive.*3 texts for 2 pictures"):
        invert(model, conditioning(rows=3), latent(batch=2))
    inversion = invert(model, picture=latent(batch=2))
    with pytest.raises(ValueError, match="negative.*3 texts for 2 pictures"):
        edit(model, inversion, negative=conditioning(rows=3))


def test_edited_text_of_another_length_is_refused_when_guided(model):
    inversion = invert(model)
    with pytest.raises(ValueError, match="positive.*tokens"):
        edit(model, inversion, conditioning(tokens=14))


def test_flow_and_edm_models_are_refused():
    for model_type in (comfy.model_base.ModelType.FLOW, comfy.model_base.ModelType.EDM):
        with pytest.raises(ValueError, match=f"(?i)^model: this one is an? {model_type.name} model.*Use a model"):
            invert(small_model(model_type))


@pytest.mark.parametrize(("method", "steps"), [("ddim", 40), ("fixed-point", 10)])
def test_v_prediction_inverts_and_reconstructs(method, steps):
    with torch.inference_mode():
        model = small_model(comfy.model_base.ModelType.V_PREDICTION)
    inversion = invert(model, steps=steps, regularization=OFF, method=method)
    plain = replace(inversion, residuals=None)
    again = edit(model, plain, conditioning(), strength=0.0)
    source = latent()["samples"]
    assert (again - source).norm() / source.norm() < 0.1


def counted_edits(model, inversion, **options):
    """(the edit, how often its reference maps had to be recorded)."""
    recorded = 0

    class Passes(sampling.UNetPasses):
        def record_maps(self, *args):
            nonlocal recorded
            recorded += 1
            return super().record_maps(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "UNetPasses", Passes)
        return edit(model, inversion, **options), recorded


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


@pytest.mark.parametrize("preset", ["default", "fast", "low memory", "official"])
def test_a_guided_step_that_runs_out_of_memory_goes_on_with_less(model, preset, caplog):
    """Another pack's patch fails as the allocator would, in the first guided pass."""
    inversion = invert(model)
    expected = edit(model, inversion, preset=preset)
    failures = 0

    def allocate(q, k, v, options):
        nonlocal failures
        if torch.is_grad_enabled() and failures < 1 and options["block"] == ("middle", 0):
            failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. (test)")
        return q, k, v

    short = model.clone()
    short.set_model_attn1_patch(allocate)
    if preset == "low memory":  # which has nothing left to give up
        with pytest.raises(torch.OutOfMemoryError):
            edit(short, inversion, preset=preset)
        return
    edited = edit(short, inversion, preset=preset)
    assert failures == 1
    assert (edited - expected).abs().max() <= 1e-4 * expected.std()
    assert [record.levelname for record in caplog.records if "out of memory" in record.message] == ["WARNING"]


def test_low_memory_gives_the_edit_of_the_default(model):
    inversion = invert(model)
    default, lean = edit(model, inversion), edit(model, inversion, preset="low memory")
    assert (lean - default).abs().max() <= 1e-4 * default.std()


@pytest.mark.parametrize(("steps", "guided"), [(50, 13), (4, 4)])
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


@pytest.mark.parametrize("negative_seed", [0, 9], ids=["the caption as negative", "another negative"])
@pytest.mark.parametrize("cfg", [2.0, 1.0])
@pytest.mark.parametrize("strength", [0.0, 6e-4])
def test_contrast_is_that_of_edited_and_source_text(model, negative_seed, cfg, strength):
    """Whatever branches the sampler needs for itself. Checked against two evaluations of their own at each latent."""
    inversion, blend, seen = invert(model), LocalBlend(0.3), []

    class Passes(sampling.UNetPasses):
        def contrast(self, x, sigma):
            contrast = super().contrast(x, sigma)
            edited, source = (self.denoise_branch(branch, x, sigma) for branch in ("positive", "source"))
            seen.append((contrast, (edited - source).abs().mean(1, keepdim=True)))
            return contrast

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(sampling, "UNetPasses", Passes)
        sampling.sample_edit(
            model, inversion, conditioning(seed=1), conditioning(seed=negative_seed), cfg, strength, blend=blend
        )
    assert len(seen) == inversion.steps
    for ours, expected in seen:
        assert expected.max() > 0
        assert (ours - expected).abs().max() <= 1e-4 * expected.max()
    assert blend.mask.shape == (1, 1, 8, 8)


def sampled(model, run_node, inversion, **settings):
    inputs = dict(
        model=model,
        inversion=inversion,
        positive=conditioning(seed=1),
        negative=conditioning(),
        cfg=2.0,
        guidance_strength=6e-4,
        start_percent=0.0,
        end_percent=1.0,
        preset="default",
        **settings,
    )
    return run_node(Pix2PixZeroKSampler, **{name: [value] for name, value in inputs.items()})


def test_the_sampler_shows_where_it_let_the_picture_change(model, run_node, monkeypatch):
    class LeftHalf(sampling.UNetPasses):
        def contrast(self, x, sigma):
            contrast = super().contrast(x, sigma)
            contrast[..., 8:] = 0.0
            return contrast

    monkeypatch.setattr(sampling, "UNetPasses", LeftHalf)
    inversion = invert(model, picture=latent(1, 16, 16))
    (free,), (everywhere,) = sampled(model, run_node, inversion)
    assert torch.equal(everywhere, torch.ones(1, 128, 128))
    (blended,), (area,) = sampled(model, run_node, inversion, local_blend=0.5)
    assert area.shape == (1, 128, 128)
    assert area[..., :64].max() > 0.9
    assert area[..., 80:].max() == 0
    source = inversion.trajectory[0] / model.model.latent_format.scale_factor
    assert (blended["samples"] - source)[..., 10:].abs().max() < 1e-5
    assert (free["samples"] - source)[..., 10:].abs().mean() > 0.1


def test_a_mask_on_the_sampler_limits_the_edit_like_a_noise_mask(model, run_node):
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1.0
    picture = latent()
    (ours,), (area,) = sampled(model, run_node, invert(model, picture=picture), mask=mask)
    (theirs,), (other_area,) = sampled(model, run_node, invert(model, picture={**picture, "noise_mask": mask}))
    assert torch.equal(ours["samples"], theirs["samples"])
    assert torch.equal(area, other_area)
    assert (ours["samples"] - picture["samples"])[..., 4:].abs().max() < 1e-5
    assert area[..., :28].min() > 0.99
    assert area[..., 36:].max() < 0.01
