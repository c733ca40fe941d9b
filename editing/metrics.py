"""How much of a picture an edit kept: errors and similarities of a source picture and its edit, in fp32.

Pictures are [B, C, H, W] in 0..1 and every figure is [B], one per picture. A `weight` [B or 1, 1, H, W] in 0..1 says where to
look, such as 1 outside the edited area; a picture whose weight is 0 everywhere gets NaN.
"""

import torch
import torch.nn.functional as F

WINDOW = 11
EDGE = WINDOW // 2
"""What the window leaves out on each side of a picture."""


def weighted_mean(values: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of [B, C, H, W] over everything but the batch: [B]."""
    if weight is None:
        return values.mean(dim=(1, 2, 3))
    weight = weight.expand(len(values), 1, *values.shape[2:])
    return (values.mean(dim=1, keepdim=True) * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))


def mean_squared_error(source: torch.Tensor, edited: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared difference: [B], from 0 (the same) to 1."""
    return weighted_mean((source.float() - edited.float()) ** 2, weight)


def peak_signal_to_noise(mse: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of mean squared errors of pictures in 0..1: higher is closer, inf is the same."""
    return -10 * torch.log10(mse)


def structural_similarity(
    source: torch.Tensor, edited: torch.Tensor, weight: torch.Tensor | None = None, reflect: bool = False
) -> torch.Tensor:
    """SSIM of Wang et al. 2004, eq. 13, mean over the channels and over every window inside the picture: [B], up to 1.

    The window is their 11x11 Gaussian of sigma 1.5, K1 = 0.01 and K2 = 0.03; a window's weight is that of its centre.
    `reflect`: also counts the windows that reach beyond the edges, on mirrored pixels, as torchmetrics does.
    Raises ValueError for a picture smaller than the window.
    """
    from kornia.metrics import ssim  # importing kornia takes a second, and most runs never measure

    if min(source.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW} by {WINDOW} pixels.")
    # A variance is the small difference of two means of squares, and single precision would lose it in flat areas.
    source, edited = source.double(), edited.double()
    if reflect:
        source, edited = (F.pad(picture, (EDGE,) * 4, mode="reflect") for picture in (source, edited))
    elif weight is not None:
        weight = weight[..., EDGE:-EDGE, EDGE:-EDGE]
    return weighted_mean(ssim(source, edited, WINDOW, padding="valid"), weight).float()


def self_similarity(keys: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every two tokens (Splice, Tumanyan et al., CVPR 2022, eq. 4): [B, T, D] to [B, T, T]."""
    keys = F.normalize(keys.float(), dim=-1)
    return keys @ keys.transpose(1, 2)


def structure_distance(source_keys: torch.Tensor, edited_keys: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the self-similarities of a vision transformer's keys [B, T, D]: [B].

    Splice's structure loss (eq. 3) as a mean over the entries, which is what editing papers report.
    """
    return (self_similarity(source_keys) - self_similarity(edited_keys)).square().mean(dim=(1, 2))


def perceptual_distance(
    source: list[torch.Tensor], edited: list[torch.Tensor], channel_weights: list[torch.Tensor]
) -> torch.Tensor:
    """LPIPS (Zhang et al., CVPR 2018, eq. 1) from the layers' features, each [B, C, h, w]: [B].

    `channel_weights`: for each layer [C], the learned w squared, as its checkpoints hold it.
    """
    total = torch.zeros(len(source[0]), device=source[0].device)
    for a, b, weights in zip(source, edited, channel_weights):
        difference = _unit_channels(a.float()) - _unit_channels(b.float())
        total = total + (difference.square() * weights.float().view(1, -1, 1, 1)).sum(dim=1).mean(dim=(1, 2))
    return total


def _unit_channels(features: torch.Tensor) -> torch.Tensor:
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
