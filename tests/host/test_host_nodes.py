"""All of the host's own MODEL to MODEL nodes, found in its registry, before and behind every node of this pack.

Each combination draws a finite picture, which is the stock sampler's where this pack does nothing, or is refused in words.
"""

import re
from functools import partial

import comfy.sample
import comfy.samplers
import plug_and_play_runs as plugged
import prompt_to_prompt_runs as prompted
import pytest
import torch
from composed_run import edit, invert
from host_nodes import Inputs, model_nodes, patched
from pix2pix_zero.host.sampling.checks import ddim_grid, noise_path
from pix2pix_zero.host.sampling.reference import ReferenceSettings, generate_reference
from pix2pix_zero.host.views.attention_heat import mean_attention
from small_unet import NARROW, SHALLOW, changed, latent, loaded_small_model
from tiny_clip import tiny_clip

# Their own function fails on the model of these tests, which is none of theirs.
FOR_OTHER_NETWORKS = {"ARVideoI2V", "HiDreamO1PatchSeamSmoothing", "ModelNoiseScale", "TripoSplatSamplingPreview"}
SIZE = (8, 8)
TARGET = "a dog on a sofa"


class Bench:
    """A model, its inversion and every model that the host's nodes make of it."""

    def __init__(self, folder):
        with torch.inference_mode(), changed(SHALLOW | NARROW):
            self.model, self.clip = loaded_small_model(), tiny_clip()
            self.inputs = Inputs(self.model, folder)
            self.source, self.positive = (prompted.encode(self.clip, text) for text in (prompted.SOURCE, TARGET))
            self.negative = prompted.encode(self.clip, "")
        self.inversion = invert(self.model, self.source, latent(1, *SIZE), map_memory=0)
        self.patched, self.unfit = {}, {}
        for name in model_nodes():
            try:
                self.patched[name] = self.patch(name, self.model)
            except Exception as error:
                self.unfit[name] = error

    @torch.inference_mode()
    def patch(self, name, model):
        return patched(name, self.inputs, model)

    @torch.inference_mode()
    def sample(self, model, positive=None, sigmas=None, cfg=2.0):
        """Euler from the inverted noise by the stock guider."""
        return plugged.sample(model, self.inversion, positive or self.positive, self.negative, cfg)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def stock(bench):
    """By node: the picture of the stock sampler, or the error that it ends in."""
    return {name: outcome(bench.sample, model) for name, model in bench.patched.items()}


def outcome(run, *arguments):
    try:
        return run(*arguments)
    except Exception as error:
        return error


def fault(found, expected=None, tolerance=1e-4):
    """What is wrong with an outcome, or None. `expected`: of the stock sampler, where both must be the same."""
    if isinstance(found, Exception):
        if type(found) is ValueError and re.match(r"[a-z_]+(, [a-z_]+)*: .{20,}", str(found)):
            return None
        if isinstance(expected, Exception) and repr(found) == repr(expected):
            return None
        return f"{type(found).__name__}: {found}"
    if not found.isfinite().all():
        return None if isinstance(expected, torch.Tensor) and not expected.isfinite().all() else "not finite"
    if isinstance(expected, torch.Tensor) and expected.isfinite().all():
        difference = float((found - expected).abs().max() / expected.std())
        return f"differs by {difference:.2g}" if difference > tolerance else None
    return None


def faults(bench, run, stock, same=False, tolerance=1e-4):
    """By node of the host: what is wrong with `run(name, model)`. `same`: it must be the stock sampler's picture."""
    found = {
        name: fault(
            outcome(run, name, model), stock[name] if same or isinstance(stock[name], Exception) else None, tolerance
        )
        for name, model in bench.patched.items()
    }
    return {name: what for name, what in found.items() if what is not None}


def test_every_node_of_the_host_is_tried(bench):
    assert len(bench.patched) > 30
    assert set(bench.unfit) <= FOR_OTHER_NETWORKS, bench.unfit


def test_the_stock_sampler_works_with_most(stock):
    assert sum(isinstance(picture, Exception) for picture in stock.values()) < 0.2 * len(stock)


def test_without_guidance_the_guided_sampler_is_the_stock_sampler(bench, stock):
    def run(name, model):
        return edit(model, bench.inversion, bench.positive, bench.negative)

    assert faults(bench, run, stock, same=True) == {}


def test_guided_edits_are_finite_or_refused_in_words(bench, stock):
    def run(name, model):
        settings = dict(strength=1e-3, local_blend=0.3, feature_until=0.5)
        return edit(model, bench.inversion, bench.positive, bench.negative, **settings)

    assert faults(bench, run, stock) == {}


def test_a_patched_model_is_inverted_or_refused_in_words(bench, stock):
    assert faults(bench, lambda name, model: invert(model, bench.source, latent(1, *SIZE)).trajectory, stock) == {}


def plug(bench, model, until):
    return plugged.patch(model, bench.inversion, until, until, 1 - until)


def prompt(bench, model, until, **options):
    return prompted.patch(model, bench.inversion, bench.clip, TARGET, cross=until, to_itself=until, **options)[0]


def test_model_edits_that_change_nothing_leave_the_stock_sampler_as_it_is(bench, stock):
    """Plug-and-Play without features and Prompt-to-Prompt without attention, both on one model."""
    assert (
        faults(bench, lambda name, model: bench.sample(prompt(bench, plug(bench, model, 0.0), 0.0)), stock, same=True)
        == {}
    )


@pytest.mark.parametrize("change", [plug, partial(prompt, local_blend=0.3)], ids=["Plug-and-Play", "Prompt-to-Prompt"])
def test_model_edits_behind_a_node_are_finite_or_refused_in_words(bench, stock, change):
    assert faults(bench, lambda name, model: bench.sample(change(bench, model, 0.5)), stock) == {}


def test_model_edits_before_a_node_are_finite_or_refused_in_words(bench, stock):
    """Both on one model."""
    first = prompt(bench, plug(bench, bench.model, 0.5), 0.5, local_blend=0.3)
    assert faults(bench, lambda name, model: bench.sample(bench.patch(name, first)), stock) == {}


def test_heatmaps_are_finite_or_refused_in_words(bench, stock):
    def run(name, model):
        return mean_attention(model, bench.inversion, bench.source[0][0].shape[1], (0.0, 1.0), "all")

    assert faults(bench, run, stock) == {}


def test_a_generated_reference_is_the_stock_samplers_picture(bench, stock):
    """Both from the noise that the inversion has ended on, which is scaled once more on the way here."""
    noise = bench.inversion.trajectory[-1] / (1 + bench.inversion.sigmas[-1] ** 2) ** 0.5

    @torch.inference_mode()
    def run(name, model):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comfy.sample, "prepare_noise", lambda *_: noise)
            reference = generate_reference(
                model, bench.positive, bench.negative, latent(1, *SIZE), ReferenceSettings(2, 2.0)
            )
        return reference[1]

    @torch.inference_mode()
    def on_own_levels(model):
        levels = ddim_grid(model, 2, ReferenceSettings.scheduler)
        euler, texts = comfy.samplers.sampler_object("euler"), (bench.positive, bench.negative)
        return comfy.sample.sample_custom(model, noise, 2.0, euler, levels, *texts, torch.zeros_like(noise))

    # A node that makes the model a flow gives it other noise levels than those of the inversion.
    flows = {name: model for name, model in bench.patched.items() if noise_path(model).straight}
    stock = {**stock, **{name: outcome(on_own_levels, model) for name, model in flows.items()}}
    assert len(flows) > 3
    assert faults(bench, run, stock, same=True, tolerance=1e-3) == {}
