"""Figures of edits against plain float64 restatements of their definitions."""

import numpy as np
import pytest
import torch
from pix2pix_zero.editing import metrics


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian_window():
    y, x = np.mgrid[-5:6, -5:6]
    window = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    return window / window.sum()


def ssim_map(a, b):
    """Wang et al. 2004, eq. 13, one window after the other: [H - 10, W - 10] of two [H, W] in 0..1."""
    window, (height, width) = gaussian_window(), a.shape
    values = np.empty((height - 10, width - 10))
    for y in range(height - 10):
        for x in range(width - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            variance_p, variance_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
            covariance = (window * (p - mean_p) * (q - mean_q)).sum()
            values[y, x] = ((2 * mean_p * mean_q + 0.01**2) * (2 * covariance + 0.03**2)) / (
                (mean_p**2 + mean_q**2 + 0.01**2) * (variance_p + variance_q + 0.03**2)
            )
    return values


def test_ssim_is_that_of_its_definition_for_each_picture_of_a_batch():
    a = pictures(2, 3, 16, 21)
    b = (a + 0.2 * pictures(2, 3, 16, 21, seed=1)).clamp(0, 1)
    expected = [
        np.mean([ssim_map(a[i, c].double().numpy(), b[i, c].double().numpy()) for c in range(3)]) for i in range(2)
    ]
    assert metrics.structural_similarity(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    assert metrics.structural_similarity(a, a).tolist() == pytest.approx([1, 1])


def test_ssim_of_nearly_flat_pictures_keeps_its_digits():
    a = 0.9 + 1e-4 * pictures(1, 1, 14, 14)
    b = 0.9 + 1e-4 * pictures(1, 1, 14, 14, seed=1)
    expected = ssim_map(a[0, 0].double().numpy(), b[0, 0].double().numpy()).mean()
    assert metrics.structural_similarity(a, b).item() == pytest.approx(expected, abs=1e-7)


def test_a_weight_counts_a_window_as_its_centre():
    a, b = pictures(1, 1, 15, 18), pictures(1, 1, 15, 18, seed=1)
    weight = pictures(1, 1, 15, 18, seed=2)
    w = weight[0, 0].double().numpy()[5:-5, 5:-5]
    expected = (ssim_map(a[0, 0].double().numpy(), b[0, 0].double().numpy()) * w).sum() / w.sum()
    assert metrics.structural_similarity(a, b, weight).item() == pytest.approx(expected, abs=1e-6)


def test_reflected_edges_count_the_windows_beyond_the_picture():
    a, b = pictures(1, 1, 13, 17), pictures(1, 1, 13, 17, seed=1)
    padded = (np.pad(t[0, 0].double().numpy(), 5, mode="reflect") for t in (a, b))
    expected = ssim_map(*padded)
    assert metrics.structural_similarity(a, b, reflect=True).item() == pytest.approx(expected.mean(), abs=1e-6)
    weight = pictures(1, 1, 13, 17, seed=2)
    expected = np.average(expected, weights=weight[0, 0].numpy())
    assert metrics.structural_similarity(a, b, weight, reflect=True).item() == pytest.approx(expected, abs=1e-6)


def test_ssim_refuses_pictures_under_its_window():
    with pytest.raises(ValueError, match="11 by 11"):
        metrics.structural_similarity(torch.zeros(1, 3, 10, 40), torch.zeros(1, 3, 10, 40))


def test_errors_count_the_weighted_pixels_only():
    a, b = pictures(2, 3, 6, 5), pictures(2, 3, 6, 5, seed=1)
    square = (a.double().numpy() - b.double().numpy()) ** 2
    mse = metrics.mean_squared_error(a, b)
    assert mse.tolist() == pytest.approx([square[0].mean(), square[1].mean()])
    assert metrics.peak_signal_to_noise(mse).tolist() == pytest.approx(
        [10 * np.log10(1 / square[i].mean()) for i in range(2)]
    )

    mask = torch.zeros(1, 1, 6, 5)
    mask[..., 2:4, 1:] = 1
    assert metrics.mean_squared_error(a, b, mask).tolist() == pytest.approx(
        [square[i, :, 2:4, 1:].mean() for i in range(2)]
    )
    soft = pictures(2, 1, 6, 5, seed=3)
    expected = [
        sum((square[i, c] * soft[i, 0].numpy()).sum() for c in range(3)) / (3 * soft[i].sum().item()) for i in range(2)
    ]
    assert metrics.mean_squared_error(a, b, soft).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_same_picture_has_no_error_and_endless_psnr():
    a = pictures(1, 3, 4, 4)
    assert metrics.mean_squared_error(a, a).item() == 0
    assert metrics.peak_signal_to_noise(metrics.mean_squared_error(a, a)).item() == float("inf")


def test_nothing_to_look_at_is_no_figure():
    a = pictures(1, 3, 12, 12)
    assert metrics.mean_squared_error(a, a, torch.zeros(1, 1, 12, 12)).isnan().all()
    assert metrics.structural_similarity(a, a, torch.zeros(1, 1, 12, 12)).isnan().all()


def test_structure_distance_compares_the_angles_between_tokens():
    a, b = pictures(2, 7, 4) - 0.5, pictures(2, 7, 4, seed=1) - 0.5

    def angles(keys):
        keys = keys.double().numpy()
        return np.array([[p @ q / (np.linalg.norm(p) * np.linalg.norm(q)) for q in keys] for p in keys])

    expected = [((angles(a[i]) - angles(b[i])) ** 2).mean() for i in range(2)]
    assert metrics.structure_distance(a, b).tolist() == pytest.approx(expected, rel=1e-5)
    turned = 3 * a @ torch.linalg.qr(pictures(4, 4, seed=2))[0]
    assert metrics.structure_distance(a, turned).tolist() == pytest.approx([0, 0], abs=1e-10)


def test_perceptual_distance_sums_the_layers_and_averages_the_places():
    a = [pictures(2, 3, 4, 5), pictures(2, 6, 2, 3, seed=1)]
    b = [pictures(2, 3, 4, 5, seed=2), pictures(2, 6, 2, 3, seed=3)]
    weights = [pictures(3, seed=4), pictures(6, seed=5)]
    expected = [0.0, 0.0]
    for p, q, w in zip(a, b, weights):
        p, q, w = (t.double().numpy() for t in (p, q, w))
        for i in range(2):
            places = [
                (
                    w
                    * (p[i, :, y, x] / np.linalg.norm(p[i, :, y, x]) - q[i, :, y, x] / np.linalg.norm(q[i, :, y, x]))
                    ** 2
                )
                for y in range(p.shape[2])
                for x in range(p.shape[3])
            ]
            expected[i] += np.sum(places, axis=1).mean()
    assert metrics.perceptual_distance(a, b, weights).tolist() == pytest.approx(expected, rel=1e-5)
