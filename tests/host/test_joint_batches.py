"""Batches on diffusion transformers: the blocks of each picture are those that it has alone, and so are the words of its text."""

from dataclasses import replace
from types import MappingProxyType
from unittest.mock import patch

import pytest
import torch
from flow_families import FAMILIES, TOKENS, picture, texts
from joint_runs import noted
from pix2pix_zero.host.methods import joint_blocks, plug_and_play
from pix2pix_zero.host.methods.plug_and_play import with_source_features
from pix2pix_zero.host.sampling import edit as edit_room
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent, inverted_noise
from pix2pix_zero.host.sampling.passes import UNetPasses
from pix2pix_zero.host.text.conditionings import WORDS, stack_conditionings
from pix2pix_zero.host.unet import map_jobs
from pix2pix_zero.host.unet.transformer_memory import graph_parts, reference_memory
from plain_dit import sharp_family
from plug_and_play_runs import sample

SEEDS = (3, 4, 5)
SCORED = [("SD 3", {}, 1), ("Qwen-Image", {"num_layers": 6}, 5)]
"""(family, settings of its network, how many blocks are chosen)"""


class Pictures:
    """Pictures of a family with a source's text and an edit's for each, inverted together or alone."""

    def __init__(self, name, settings=MappingProxyType({}), beside=MappingProxyType({})):
        family = FAMILIES[name]
        with patch.dict(FAMILIES, {name: replace(family, small={**family.small, **settings})}):
            self.name, self.model = name, sharp_family(name)
        self.beside = beside

    def samples(self, seeds):
        return torch.cat([picture(self.model, seed=seed)["samples"] for seed in seeds])

    def source(self, seeds):
        return stack_conditionings([texts(self.name, seed) for seed in seeds], "positive")

    def edited(self, seeds):
        """Texts with further options, `beside`, by seed."""
        own = [texts(self.name, 100 + seed, **self.beside.get(seed, {})) for seed in seeds]
        return stack_conditionings(own, "positive")

    def inverted(self, seeds):
        return invert_latent(self.model, self.source(seeds), {"samples": self.samples(seeds)}, InversionSettings(2))

    def guided(self, seeds, strength=0.3):
        settings = EditSettings(3.0, strength)
        return sample_edit(self.model, self.inverted(seeds), self.edited(seeds), self.source(seeds), settings)[0]

    def together_and_alone(self, draw):
        return draw(SEEDS), torch.cat([draw([seed]) for seed in SEEDS])


def differ(choices):
    return len(choices) == len(SEEDS) and any(choice != choices[0] for choice in choices)


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize(("name", "settings", "count"), SCORED)
@torch.inference_mode()
def test_guidance_reads_the_blocks_of_each_picture(name, settings, count, rows, monkeypatch):
    """However many are worked on at once."""
    monkeypatch.setattr(joint_blocks, "CHOSEN", count)
    chosen = noted(monkeypatch, edit_room, "matched_sites")
    if rows is not None:
        monkeypatch.setattr(edit_room, "affordable_rows", lambda *args, **needs: rows)
    pictures = Pictures(name, settings)
    together, alone = pictures.together_and_alone(pictures.guided)
    assert differ(chosen[0]) and [choice for (choice,) in chosen[1:]] == chosen[0]
    assert (together - alone).abs().max() <= 1e-4
    assert (together - pictures.guided(SEEDS, 0.0)).abs().amax((1, 2, 3)).min() > 1e-2


@torch.inference_mode()
def test_pictures_with_the_same_blocks_cost_as_much_as_one(monkeypatch):
    monkeypatch.setattr(joint_blocks, "CHOSEN", 1)
    pictures = Pictures("SD 3")
    counted = noted(monkeypatch, map_jobs, "attention_maps")
    matched = noted(monkeypatch, map_jobs.MatchedAttention, "apply")
    counts = []
    for seeds in ((3,), (3, 3, 3), (3, 4, 5)):
        pictures.guided(seeds)
        counts.append((len(counted), len(matched)))
        counted.clear(), matched.clear()
    assert counts[0] == counts[1] == (2, 2) and counts[2] == (4, 4)


@torch.inference_mode()
def test_blocks_of_several_choices_take_no_more_memory_than_is_counted(monkeypatch):
    """Of maps and of what autograd keeps, all blocks being chosen by one picture or another."""
    pictures = Pictures("Qwen-Image", {"num_layers": 6})
    chosen = noted(monkeypatch, edit_room, "matched_sites")
    recorded = noted(monkeypatch, UNetPasses, "record_maps")
    kept, peaks = {}, []
    gradient = map_jobs._Matching.gradient

    def counting(self, x):
        peaks.append(sum(kept.values()))
        kept.clear()
        return gradient(self, x)

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    monkeypatch.setattr(map_jobs._Matching, "gradient", counting)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pictures.guided(SEEDS)
    assert {site for sites in chosen[0] for site in sites} > set(chosen[0][0])
    dit, shape = pictures.model.model.diffusion_model, (3, 16, 8, 12)
    assert {sum(each.nbytes for each in maps.values()) for maps in recorded} == {reference_memory(dit, shape, TOKENS)}
    parts = graph_parts(dit, shape, "none", 4, TOKENS)
    assert len(peaks) == 2 and 0 < max(peaks) <= parts["activations"] + parts["gradients"]


def masked(rows):
    return torch.tensor([[float(row < rows) for row in range(TOKENS)]])


BESIDE = {
    "words": {3: {WORDS: (((1, 2), (2, 4)),)}, 4: {WORDS: (((0, 1), (2, 2), (5, 5)),)}},  # none are known of the third
    "no words": {3: {WORDS: (((1, 2), (2, 4)),)}, 4: {WORDS: (((0, 1), (2, TOKENS)),)}, 5: {WORDS: (((0, TOKENS),),)}},
    "masks": {seed: {"attention_mask": masked(rows)} for seed, rows in ((3, 4), (4, 6), (5, 7))},
}


@pytest.mark.parametrize("kind", BESIDE)
@torch.inference_mode()
def test_guidance_compares_the_words_of_each_text(kind, monkeypatch):
    pictures = Pictures("Qwen-Image", beside=BESIDE[kind])
    together, alone = pictures.together_and_alone(pictures.guided)
    assert (together - alone).abs().max() <= 1e-4
    monkeypatch.setattr(edit_room, "affordable_rows", lambda *args, **needs: 2)
    assert (pictures.guided(SEEDS) - together).abs().max() <= 1e-4
    monkeypatch.setattr(pictures, "beside", {})
    assert (pictures.guided(SEEDS)[:2] - together[:2]).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("repeated", [False, True])
@torch.inference_mode()
def test_plug_and_play_takes_the_features_of_the_blocks_of_each_picture(repeated, monkeypatch):
    """Of several pictures, and of one that is drawn with several texts."""
    monkeypatch.setattr(joint_blocks, "CHOSEN", 1)
    chosen = noted(monkeypatch, plug_and_play, "scored_sites")
    pictures = Pictures("SD 3")

    def draw(seeds):
        inversion = pictures.inverted([5] if repeated else seeds)
        patched = with_source_features(pictures.model, inversion, 0.7, 0.7)
        noise = inverted_noise(inversion, pictures.model)
        noise = noise.repeat(len(seeds) // len(noise), 1, 1, 1)
        source = pictures.source([5] if repeated else seeds)
        return sample(patched, inversion, pictures.edited(seeds), source, noise=noise)

    together, alone = pictures.together_and_alone(draw)
    assert differ(chosen[0])
    assert (together - alone).abs().max() <= 1e-4
