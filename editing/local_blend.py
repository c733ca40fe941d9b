"""Local blend: find where an edit acts, and keep the source picture everywhere else.

Prompt-to-Prompt (Hertz et al. 2022, section 4) blends by the attention maps of the words that differ, DiffEdit (Couairon
et al. 2022, section 3.2) by where the predictions for the two texts differ. Here it is the latter, gathered while the
edit is drawn, since an edit direction moves all words of a text.
"""

import torch
import torch.nn.functional as F

START = 0.1  # share of the steps after which the mask is trusted
PEAK = 0.99
EVERYWHERE = 0.7  # a mask larger than this part of the picture belongs to an edit of the whole: night, another style


class LocalBlend:
    """The mask of one edit, which sharpens as it is drawn.

    `threshold`: in 0..1, part of the strongest contrast at which a place counts as edited. `mask`: [B, 1, H, W] in 0..1, 1
    where the edit acts, or None as long as too little is known. `keeps_some` [B, 1, 1, 1]: whether any of a picture is to be
    kept, so far as is known; None before the first step.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.mask: torch.Tensor | None = None
        self.keeps_some: torch.Tensor | None = None
        self._total: torch.Tensor | None = None

    def observe(self, contrast: torch.Tensor, progress: float) -> None:
        """Add a step's contrast [B, 1, H, W]: how far apart edited and source prediction were. `progress`: in 0..1."""
        self._total = contrast if self._total is None else self._total + contrast
        found = edit_mask(self._total, self.threshold)
        self.keeps_some = found.amin((1, 2, 3), keepdim=True) < 1
        if progress >= START:
            self.mask = found

    def keep_source(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """`x` where the edit acts, `source` elsewhere, both [B, C, H, W] at one noise level."""
        return x if self.mask is None else torch.lerp(source, x, self.mask)


def edit_mask(contrast: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where `contrast` [B, 1, H, W] exceeds `threshold` times its peak: [B, 1, H, W] in 0..1.

    The mask rises from 0 at half the threshold to 1 at one and a half. The contrast is smoothed over about a tenth of the
    picture first. The peak is taken per picture, outliers left out. Where nearly all of a picture exceeds it, all does.
    """
    reach = max(1, round(min(contrast.shape[-2:]) / 32))
    padded = F.pad(contrast, (reach,) * 4, mode="replicate")
    smooth = F.avg_pool2d(padded, 2 * reach + 1, stride=1)
    peak = smooth.flatten(1).quantile(PEAK, dim=1).clamp_min(torch.finfo(smooth.dtype).tiny)
    mask = (smooth / peak.view(-1, 1, 1, 1) / threshold - 0.5).clamp(0, 1)
    return torch.where(mask.mean((1, 2, 3), keepdim=True) > EVERYWHERE, 1.0, mask)
