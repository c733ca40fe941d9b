"""What is measured of edited pictures, one number for each, and how sure a mean over scenes is."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..judge import Judge
from .workbench import Workbench

RESAMPLINGS = 2000
NO_ERROR = 1e-10  # mean squared error of pictures that are taken for equal: 100 dB


def measure(bench: Workbench, judge: Judge, pictures: Tensor) -> dict[str, Tensor]:
    """Figures of edited pictures [B, H, W, 3], each [B].

    hit: 1 where the judge sees the edit. whole: mean absolute error to the ground truth, 0..255. structure: see
    `structure_error`. Where the edit leaves a background: inside, the error to the ground truth where the picture should
    change, 0..255; background, the error to the source elsewhere, 0..255; its psnr, in dB; its ssim. Source and ground
    truth are taken through the autoencoder, whose own error is not the method's.
    """
    question, wanted = bench.edit.asked
    hits = torch.tensor([float(answer == wanted) for answer in judge.answers(pictures)[question]])
    error = 255 * (pictures - bench.truth).abs()
    figures = {
        "hit": hits,
        "whole": error.mean((1, 2, 3)),
        "structure": structure_error(judge, pictures, bench.truth),
    }
    if not bench.edit.whole_picture:
        inside = 1 - bench.scenes.outside
        figures["inside"] = (error * inside).sum((1, 2, 3)) / (3 * inside.sum((1, 2, 3)))
        figures |= background_figures(pictures, bench.source, bench.scenes.outside)
    return figures


def background_figures(pictures: Tensor, sources: Tensor, outside: Tensor) -> dict[str, Tensor]:
    """Errors of pictures [B, H, W, 3] where `outside` [B, H, W, 1] is 1; all else is taken for unchanged."""
    pictures = torch.lerp(sources, pictures, outside)
    area = 3 * outside.sum((1, 2, 3))
    error = (pictures - sources).double()
    squared = error.square().sum((1, 2, 3)) / area
    return {
        "background": 255 * error.abs().sum((1, 2, 3)) / area,
        "psnr": -10 * squared.clamp_min(NO_ERROR).log10(),
        "ssim": (similarity(pictures, sources) * outside).sum((1, 2, 3)) / area,
    }


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of each pixel and channel (Wang et al. 2004, eq. 13): Gaussian windows of 11 pixels, sigma 1.5.

    Pictures [B, H, W, C] in 0..1, reflected at their edges; so is the result, in -1..1.
    """
    place = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-(place**2) / (2 * 1.5**2))
    line = line / line.sum()
    a, b = (picture.movedim(-1, 1).double() for picture in (a, b))

    def mean(picture: Tensor) -> Tensor:
        padded = F.pad(picture.flatten(0, 1)[:, None], (5,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(padded, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1)).view_as(picture)

    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    ratio = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return ratio.movedim(1, -1)


def structure_error(judge: Judge, pictures: Tensor, truths: Tensor) -> Tensor:
    """How far the layout of pictures [B, H, W, 3] is from the ground truth's, times 1000: [B].

    As the structure distance of Tumanyan et al. (CVPR 2022) the mean squared difference of two self-similarities: cosines
    between the features of all pairs of places. In place of a ViT's keys the features are the judge's after its second
    block, 16x16 places of 48 channels; it has learned to look past fur, light and drawing style.
    """
    a, b = (_self_similarity(judge, images) for images in (pictures, truths))
    return 1000 * (a - b).square().mean((1, 2))


def _self_similarity(judge: Judge, pictures: Tensor) -> Tensor:
    second_block = judge.network.features[:12]
    features = second_block(pictures.detach().float().cpu().clamp(0, 1).movedim(-1, 1) - 0.5)
    places = F.normalize(features.flatten(2), dim=1)
    return places.mT @ places


def summarize(figures: dict[str, Tensor]) -> dict[str, list[float]]:
    """Of each figure its mean over scenes and the ends of its interval: [mean, low, high]."""
    return {name: [values.double().mean().item(), *interval(values)] for name, values in figures.items()}


def interval(values: Tensor) -> tuple[float, float]:
    """The bootstrap 95 % interval of a mean (percentiles over resampled scenes). `values`: [B]."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (RESAMPLINGS, len(values)), generator=generator)
    means = values.double()[chosen].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
