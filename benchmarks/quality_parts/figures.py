"""What is measured of edited pictures, one number for each, and how sure a mean over scenes is."""

import torch
from torch import Tensor

from ...editing import metrics
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
    pictures, sources, outside = (images.movedim(-1, 1).double() for images in (pictures, sources, outside))
    pictures = torch.lerp(sources, pictures, outside)
    squared = metrics.weighted_mean((pictures - sources).square(), outside)
    return {
        "background": 255 * metrics.weighted_mean((pictures - sources).abs(), outside),
        "psnr": metrics.peak_signal_to_noise(squared.clamp_min(NO_ERROR)),
        "ssim": metrics.structural_similarity(pictures, sources, outside, reflect=True),
    }


def structure_error(judge: Judge, pictures: Tensor, truths: Tensor) -> Tensor:
    """How far the layout of pictures [B, H, W, 3] is from the ground truth's, times 1000: [B].

    As the structure distance of Tumanyan et al. (CVPR 2022) the mean squared difference of two self-similarities: cosines
    between the features of all pairs of places. In place of a ViT's keys the features are the judge's after its second
    block, 16x16 places of 48 channels; it has learned to look past fur, light and drawing style.
    """
    return 1000 * metrics.structure_distance(*(_places(judge, images) for images in (pictures, truths)))


def _places(judge: Judge, pictures: Tensor) -> Tensor:
    second_block = judge.network.features[:12]
    features = second_block(pictures.detach().float().cpu().clamp(0, 1).movedim(-1, 1) - 0.5)
    return features.flatten(2).mT


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
