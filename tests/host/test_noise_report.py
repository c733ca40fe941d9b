"""The noise report as a node: scale, batches, comparison and refusals. Its figures are tested on their own."""

import re

import pytest
import torch
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent, inverted_noise
from pix2pix_zero.nodes.noise_report import Pix2PixZeroNoiseReport
from pix2pix_zero.pictures import charts
from small_unet import conditioning, latent, small_model


def noise(batch=1, height=16, width=16, channels=4, seed=0):
    return {"samples": torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))}


def figure(line, name):
    return float(re.search(rf"{name} (-?[\d.]+)", line)[1])


def colours(picture):
    """How many pixels are close to each series' colour."""
    return [int(((picture * 255 - torch.tensor(colour)).abs().amax(-1) < 12).sum()) for colour in charts.SERIES]


def test_an_inversions_noise_is_measured_on_the_scale_of_true_noise(run_node):
    with torch.inference_mode():
        model = small_model()
        off = NoiseRegularization(steps=0)
        inversion = invert_latent(model, conditioning(), latent(height=16, width=16), InversionSettings(3, 0, off))
        output = {"samples": inverted_noise(inversion, model)}
    _, report = run_node(Pix2PixZeroNoiseReport, noise=output, inversion=inversion)
    seen = inversion.trajectory[-1] / (1 + inversion.sigmas[-1] ** 2) ** 0.5
    assert figure(report, "variance") == pytest.approx(float(seen[0].var((1, 2), correction=0).mean()), abs=6e-4)
    assert figure(report, "mean") == pytest.approx(float(seen.mean()), abs=6e-4)


def test_without_an_inversion_only_the_shape_of_the_noise_counts(run_node):
    plain = noise()
    louder = {"samples": 80 * plain["samples"]}
    (one, report), (other, same) = (run_node(Pix2PixZeroNoiseReport, noise=each) for each in (plain, louder))
    assert report == same
    assert "no inversion" in report
    assert torch.equal(one, other)


def test_every_latent_of_a_batch_gets_a_picture_and_a_line(run_node):
    batch = noise(batch=3)
    pictures, report = run_node(Pix2PixZeroNoiseReport, noise=batch)
    assert pictures.shape == (3, *pictures.shape[1:3], 3)
    assert [line.split(":")[0] for line in report.splitlines()[:-1]] == ["1", "2", "3"]
    alone, _ = run_node(Pix2PixZeroNoiseReport, noise={"samples": batch["samples"][1:2]})
    assert torch.equal(pictures[1], alone[0])


def test_another_noise_is_drawn_beside_it(run_node):
    blurred = {"samples": torch.nn.functional.avg_pool2d(noise(seed=1)["samples"], 3, 1, 1)}
    (alone,), report = run_node(Pix2PixZeroNoiseReport, noise=noise())
    (beside,), both = run_node(Pix2PixZeroNoiseReport, noise=noise(), compare_with=blurred)
    (first, none), (_, second) = colours(alone), colours(beside)
    assert first > 500
    assert none == 0
    assert second > 500
    own, other = both.splitlines()[:2]
    assert own == report.splitlines()[0]
    assert abs(figure(own, "autocorrelation")) < 0.1 < 0.4 < figure(other, "autocorrelation")


def test_noise_lies_within_the_band_and_patterns_outside(run_node):
    """The report names the shift that chance explains least, with what chance reaches there."""
    samples = noise(seed=3)["samples"]
    stripes = {"samples": samples + samples.roll(3, -1)}
    _, report = run_node(Pix2PixZeroNoiseReport, noise=noise(seed=3))
    assert abs(figure(report, "autocorrelation")) < figure(report, "noise within")
    _, report = run_node(Pix2PixZeroNoiseReport, noise=stripes)
    assert "at shift 3 (" in report
    assert figure(report, "autocorrelation") > 2 * figure(report, "noise within")


def test_one_noise_may_be_compared_with_all_of_a_batch(run_node):
    pictures, _ = run_node(Pix2PixZeroNoiseReport, noise=noise(batch=2), compare_with=noise(seed=4, height=8))
    assert len(pictures) == 2


@pytest.mark.parametrize("size", [(2, 2), (2, 4), (7, 33)])
def test_any_size_is_drawn(run_node, size):
    pictures, _ = run_node(Pix2PixZeroNoiseReport, noise=noise(height=size[0], width=size[1], channels=16))
    assert pictures.isfinite().all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"noise": {"samples": torch.zeros(1, 16, 3, 8, 8)}}, "noise: its shape"),
        ({"noise": noise(height=1)}, "noise: its shape.*at least 2 x 2"),
        ({"noise": {"samples": torch.full((1, 4, 8, 8), float("nan"))}}, "noise: .*NaN"),
        ({"noise": noise(3), "compare_with": noise(2)}, "compare_with: it holds 2 latents for 3"),
        ({"noise": noise(), "compare_with": {"samples": torch.zeros(1, 4)}}, "compare_with: its shape"),
        ({"noise": {}}, "noise: it holds no samples"),
        ({"noise": {"samples": torch.zeros(0, 4, 8, 8)}}, "noise: its shape"),
        ({"noise": noise(), "inversion": {}}, "inversion: .*Connect Invert Picture"),
    ],
)
def test_latents_that_are_no_noise_are_named(run_node, inputs, message):
    with pytest.raises(ValueError, match=message):
        run_node(Pix2PixZeroNoiseReport, **inputs)


def test_a_constant_latent_is_no_reason_to_fail(run_node):
    pictures, _ = run_node(Pix2PixZeroNoiseReport, noise={"samples": torch.zeros(1, 4, 8, 8)})
    assert pictures.isfinite().all()
