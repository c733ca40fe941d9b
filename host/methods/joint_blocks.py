"""Which blocks of a diffusion transformer hold the layout, where no paper says so: scored at the beginning of each edit.

A block is scored by how well its map, of where the picture reads the edited text, agrees with where the predictions for both
texts differ. Those that agree draw the edit. The layout is held better by those that agree least: in three of four cases with
ground truth, on the demo's transformer (README). It costs two evaluations. Blocks are chosen for one edit and not kept, or what
was edited before would change the next; and for each picture of a batch, or what is edited beside it would.
"""

import math

import torch
from comfy.samplers import CFGGuider

from ...attention_patches.joint import (
    CHOSEN,
    JointSite,
    holding_sites,
    joint_sites,
    known_blocks,
    patch_side,
    reading_calls,
    reading_sites,
)
from ...attention_patches.joint_prompts import JointEdit
from ...editing.block_scores import agreement, best
from ...editing.trajectory import Inversion
from ..sampling.checks import estimates
from ..text.caption_rows import rows_read
from ..unet.jobs import only_job

Chosen = list[list[JointSite]]
"""Attentions of each picture in the order of the forward pass: one choice for all pictures, or one for each."""


def matched_sites(guider: CFGGuider, inversion: Inversion, source: list[dict], model_options: dict) -> Chosen:
    """The attentions whose maps an edit by a running guider is guided by: few, where the picture reads what the edit is about.

    Those that are known to tell things apart, or else those of the `scored_sites`.
    """
    dit = guider.model_patcher.model.diffusion_model
    if known_blocks(dit) is not None:
        return [reading_sites(dit)]
    scored = scored_sites(guider, inversion, source, model_options)
    chosen = [{site[:2] for site in sites} for sites in scored]
    return [[site for site in reading_calls(dit) if site[:2] in blocks] for blocks in chosen]


def scored_sites(
    guider: CFGGuider,
    inversion: Inversion,
    source: list[dict],
    model_options: dict,
    words: list[int] | None = None,
    least: bool = False,
) -> Chosen:
    """The blocks that agree best with an edit by a running guider, or with `least` those that hold the layout against it.

    `source`: the processed conditioning of the source's text. `words`: rows of the edited text that tell the edit, None for all.
    Those that are known of a model to hold the layout are taken as they are; where both texts predict the same, some are spread
    evenly. One choice for each picture, or for each of as many as there are texts where the pictures are repeated for them.
    """
    dit = guider.model_patcher.model.diffusion_model
    positive = guider.conds["positive"]
    few = len(joint_sites(dit)) <= CHOSEN
    if few or known_blocks(dit) is not None or len(positive) != 1 or positive[0].get("cross_attn") is None:
        return [holding_sites(dit)]
    level = (inversion.steps + 1) // 2
    x = inversion.latent(level).to(guider.model_patcher.load_device)
    x = x.repeat(math.lcm(len(x), len(positive[0]["cross_attn"])) // len(x), 1, 1, 1)
    timestep = x.new_full((len(x),), float(inversion.sigmas[level]))
    reading, maps = reading_calls(dit), []
    rows = rows_read(positive[0]["cross_attn"], positive[0])
    predicted = []
    for entries, watched in ((source, []), (positive, reading)):
        uuids = {entry["uuid"] for entry in entries}
        job = JointEdit(uuids, {}, False, None, reading, watched, maps.append, rows)
        predicted += estimates(guider.inner_model, [entries], x, timestep, only_job(model_options, job))
    if len(maps) != len(reading):
        return [holding_sites(dit)]
    difference = (predicted[1] - predicted[0]).abs().mean(1, keepdim=True)
    difference = torch.nn.functional.avg_pool2d(difference, patch_side(dit), ceil_mode=True).flatten(1)
    columns = slice(None) if words is None else words
    sign = -1 if least else 1
    scores = torch.stack([sign * agreement(each[..., columns].sum(-1), difference) for each in maps], 1)
    chosen = [best(of_picture, CHOSEN) for of_picture in scores.tolist()]
    sites = [
        [site for i, site in enumerate(joint_sites(dit)) if i in blocks] or holding_sites(dit) for blocks in chosen
    ]
    return sites[:1] if all(each == sites[0] for each in sites) else sites
