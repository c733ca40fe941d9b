"""How each way of inverting a picture brings it back, and what the inversion says of it."""

import math
import re
from dataclasses import replace

import comfy.model_base
import comfy.samplers
import pytest
import torch
from pix2pix_zero.host import running
from pix2pix_zero.host.sampling.invert import inverted_noise
from pix2pix_zero.nodes.inversion import Pix2PixZeroInversion
from small_edit import OFF, edit, invert
from small_unet import conditioning, latent, small_model

pytestmark = pytest.mark.usefixtures("shallow_unet", "narrow_unet")


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
        noise = inverted_noise(inversion, model)
        euler = comfy.samplers.sampler_object("euler")
        again = guider.sample(torch.zeros_like(noise), noise, euler, inversion.sigmas.flip(0))
    for psnr, ours, source in zip(inversion.reconstruction_psnr, again, picture["samples"], strict=True):
        mean_squared = float((ours - source).square().mean())
        peak = float(source.max() - source.min())
        assert float(psnr) == pytest.approx(10 * math.log10(peak**2 / mean_squared), abs=0.02)


@pytest.mark.parametrize("method", ["direct", "ddim"])
@pytest.mark.parametrize("measured", [False, True])
def test_the_node_reports_how_each_picture_comes_back(model, method, measured, caplog, monkeypatch):
    shown = []
    monkeypatch.setattr(running, "show", shown.append)
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
    with caplog.at_level("INFO"), torch.inference_mode():
        output = Pix2PixZeroInversion.execute(model=[model], positive=[conditioning()], latent_image=pictures, **inputs)
    inversions, _, _, reports = output.result
    assert len(reports) == 2
    for inversion, report, batch in zip(inversions, reports, (1, 2)):
        figures = re.findall(r"\d+\.\d", report)
        assert len(figures) == (batch if measured else 0)
        for figure, psnr in zip(figures, inversion.reconstruction_psnr if measured else []):
            assert float(figure) == pytest.approx(float(psnr), abs=0.051)
        assert ("dB" in report) == measured
        assert ("exact" in report) == (method == "direct")
        assert report in caplog.text
    assert output.ui == {"text": list(dict.fromkeys(reports))}, "it stays on the node"
    redrawn = [text for text in shown if text.startswith("Redrawing")]
    assert redrawn == [f"Redrawing without an edit {step}/3" for step in (1, 2, 3)] * (2 if measured else 0)


@pytest.mark.parametrize("method", ["direct", "fixed-point"])
def test_what_no_correction_brings_back_is_not_called_exact(model, method):
    """Finite estimates of a million times the picture, of which float32 keeps seven digits."""
    wild = model.clone()
    wild.set_model_sampler_post_cfg_function(lambda args: args["denoised"] + 1e7 * torch.sin(args["denoised"]))
    with pytest.raises(ValueError, match="model: its estimates are so large"):
        invert(wild, method=method, regularization=OFF)


def test_an_empty_latent_comes_back_exactly(model):
    nothing = {"samples": torch.zeros(1, 4, 8, 8)}
    again = edit(model, invert(model, picture=nothing), conditioning(), conditioning(), strength=0.0)
    assert again.abs().max() <= 1e-3


@pytest.mark.parametrize(("method", "steps"), [("ddim", 40), ("fixed-point", 10)])
def test_v_prediction_inverts_and_reconstructs(method, steps):
    with torch.inference_mode():
        model = small_model(comfy.model_base.ModelType.V_PREDICTION)
    inversion = invert(model, steps=steps, regularization=OFF, method=method)
    plain = replace(inversion, residuals=None)
    again = edit(model, plain, conditioning(), strength=0.0)
    source = latent()["samples"]
    assert (again - source).norm() / source.norm() < 0.1
