"""The attention that each row of a text draws in a diffusion transformer, as *Attention Heatmap* shows it."""

import math
from collections.abc import Callable

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ...attention_patches.joint import JointSite, patch_side, reading_sites
from ...attention_patches.joint_maps import ReadTextMaps
from ...editing.token_alignment import Prompt
from ...editing.trajectory import Inversion
from ..running import Run
from ..sampling.checks import estimates
from ..text.caption_rows import T5_IDS, caption_words, rows_read
from ..unet.jobs import LEFT_OUT, only_job


def joint_words(clip: CLIP, text: str, inversion: Inversion) -> Prompt:
    """The words of a caption, with their rows in the source's text. Raises ValueError for a text that does not fit."""
    encoder = "t5xxl" if T5_IDS in inversion.source[0][1] else None
    return caption_words(clip, text, rows_read(*inversion.source[0]), "caption", encoder)


def joint_shapes(model: ModelPatcher, inversion: Inversion, resolution: str) -> dict[JointSite, tuple[int, int]]:
    """(height, width) of the maps of each site where the text is read. Raises ValueError for another resolution."""
    dit = model.model.diffusion_model
    side = patch_side(dit)
    only = f"1/{side}" if side > 1 else "1"
    if resolution not in ("all", only):
        raise ValueError(f"resolution: this model has no attention to the text at {resolution}. It has it at {only}.")
    shape = tuple(math.ceil(length / side) for length in inversion.trajectory.shape[-2:])
    return {site: shape for site in reading_sites(dit)}


def record_joint(
    run: Run, inversion: Inversion, level: int, sites: list[JointSite], keep: Callable[[torch.Tensor], None]
) -> None:
    """Hand the maps [B, 1, picture's rows, text's rows] of each site to `keep`, at a stored latent of some level.

    Raises ValueError where another pack's wrapper has answered in place of the model.
    """
    x = inversion.trajectory[level].to(run.x)
    timestep = x.new_full((len(x),), float(inversion.sigmas[level]))
    read = 0

    def hand_on(maps: torch.Tensor) -> None:
        nonlocal read
        read += 1
        keep(maps.unsqueeze(1))

    job = ReadTextMaps(sites, rows_read(*inversion.source[0]), hand_on)
    entries = run.guider.conds["positive"]
    estimates(run.guider.inner_model, [entries], x, timestep, only_job(run.model_options, job))
    if read < len(sites):
        raise ValueError(LEFT_OUT)
