"""The methods that are compared, each with the one knob that trades how much is edited for how much is kept."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from comfy_extras import nodes_custom_sampler as stock
from torch import Tensor

import nodes as host_nodes

from ...editing.trajectory import Inversion
from ...host.sampling.checks import AUTO, fitting_scheduler
from ...host.sampling.edit import EditSettings, sample_edit
from ...host.sampling.flow_edit import WHOLE, FlowEditing, flow_edit_latent
from ...host.sampling.invert import inverted_noise
from ...nodes.plug_and_play import Pix2PixZeroPlugAndPlay
from ...nodes.prompt_to_prompt import Pix2PixZeroPromptToPrompt
from ...nodes.sampler import Pix2PixZeroKSampler
from . import diffusers_pipeline
from .workbench import Workbench, node_default, one_of, row_of

CFG = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
THEIR_CFG = CFG[1:]  # at 1 diffusers' pipeline leaves the caption as it is
FAST_STEPS = 15
SDEDIT_CFG = 3.0
GUIDED = 0.05
SETTINGS = ("guidance_strength", "start_percent", "end_percent", "preset", "local_blend", "feature_until")


@dataclass(frozen=True)
class Method:
    """`draw(bench, knob)` gives LATENT samples [B, C, H, W], one for each scene."""

    name: str
    knob: str
    values: tuple[float, ...]
    draw: Callable[[Workbench, float], Tensor]

    def with_values(self, count: int) -> "Method":
        """The same with `count` values of its knob, those in the middle."""
        skipped = max(0, len(self.values) - count + 1) // 2
        return replace(self, values=self.values[skipped : skipped + count])


def this_pack(
    bench: Workbench, cfg: float, steps: int | None = None, inversion: Inversion | None = None, **changes
) -> Tensor:
    """The guided sampler's node with its defaults, but for the bench's settings and `changes`."""
    values = {name: node_default(Pix2PixZeroKSampler, name) for name in SETTINGS} | bench.settings | changes
    settings = EditSettings(
        cfg,
        values["guidance_strength"],
        (values["start_percent"], values["end_percent"]),
        values["preset"],
        values["local_blend"],
        values["feature_until"],
    )
    inversion = inversion or bench.inversion(steps)
    return bench.keep_area(sample_edit(bench.model, inversion, bench.moved, bench.described, settings))


def aligned(bench: Workbench, cfg: float) -> Tensor:
    """On an inversion beside whose own steps the edit is evaluated."""
    return this_pack(bench, cfg, inversion=bench.inversion(method="aligned"))


def fast(bench: Workbench, cfg: float) -> Tensor:
    return this_pack(bench, cfg, min(FAST_STEPS, bench.steps), preset="fast")


def without_blend(bench: Workbench, cfg: float) -> Tensor:
    return this_pack(bench, cfg, local_blend=0.0)


def shapes_kept(bench: Workbench, cfg: float) -> Tensor:
    """For edits that keep every shape: the sampler's features for as long as Plug-and-Play's paper takes them."""
    return this_pack(bench, cfg, feature_until=node_default(Pix2PixZeroPlugAndPlay, "feature_until"))


def official(bench: Workbench, cfg: float) -> Tensor:
    return this_pack(bench, cfg, preset="official", guidance_strength=0.0)


def paper(bench: Workbench, cfg: float) -> Tensor:
    """Guidance alone, by the paper's gradient step."""
    return this_pack(bench, cfg, preset="paper", guidance_strength=0.0)


def guided(bench: Workbench, cfg: float) -> Tensor:
    """Guidance beside what holds the picture by default."""
    return this_pack(bench, cfg, guidance_strength=GUIDED)


def word_swap(bench: Workbench, cfg: float) -> Tensor:
    """Nothing but another caption, on the same inversion and with its residuals."""
    return sample_edit(bench.model, bench.inversion(), bench.wanted, bench.described, EditSettings(cfg, 0.0))[0]


def reconstruction(bench: Workbench, _: float = 0.0) -> Tensor:
    """The unedited picture by plain DDIM, without the residuals that would bring it back exactly."""
    plain = replace(bench.inversion(), residuals=None)
    return sample_edit(bench.model, plain, bench.described, bench.described, EditSettings(1.0, 0.0))[0]


def sdedit(bench: Workbench, denoise: float) -> Tensor:
    """SDEdit (Meng et al., ICLR 2022): the host's KSampler from a noisy picture, with the edited caption."""
    (negative,) = host_nodes.CLIPTextEncode().encode(bench.clip, "")
    scheduler = fitting_scheduler(bench.model, bench.scheduler)
    settings = (0, bench.steps, SDEDIT_CFG, "ddim", scheduler)
    latent = {"samples": bench.latent}
    return host_nodes.KSampler().sample(bench.model, *settings, bench.wanted, negative, latent, denoise)[0]["samples"]


def prompt_to_prompt(bench: Workbench, cfg: float, **changes) -> Tensor:
    """The node's defaults, picture by picture since each has a caption of its own."""
    inversion = bench.inversion()
    values = {name: node_default(Pix2PixZeroPromptToPrompt, name) for name in ("cross_until", "self_until")} | changes
    edited = []
    for index, texts in enumerate(zip(bench.captions, bench.wanted_captions)):
        source = one_of(inversion, index)
        model, positive = Pix2PixZeroPromptToPrompt.execute(bench.model, source, bench.clip, *texts, **values).result
        edited.append(_stock_sampler(model, source, positive, row_of(bench.described, index), cfg))
    return torch.cat(edited)


def plug_and_play(bench: Workbench, cfg: float, **changes) -> Tensor:
    names = ("feature_until", "attention_until", "negative_alpha")
    values = {name: node_default(Pix2PixZeroPlugAndPlay, name) for name in names} | changes
    inversion = bench.inversion()
    (model,) = Pix2PixZeroPlugAndPlay.execute(bench.model, inversion, **values).result
    return _stock_sampler(model, inversion, bench.wanted, bench.described, cfg)


def plug_and_play_shorter(bench: Workbench, cfg: float) -> Tensor:
    """For edits that change shapes: with features for half of the steps."""
    return plug_and_play(bench, cfg, feature_until=0.5)


def flow_edit(bench: Workbench, cfg: float, **changes) -> Tensor:
    """FlowEdit, which needs no inversion, with the node's defaults. `changes`: of its settings."""
    chosen = {} if bench.scheduler == AUTO else {"scheduler": bench.scheduler}
    settings = FlowEditing(steps=bench.steps, cfg=cfg, **chosen, **changes)
    return flow_edit_latent(bench.model, bench.described, bench.moved, None, {"samples": bench.latent}, settings)[0]


def flow_edit_whole(bench: Workbench, cfg: float) -> Tensor:
    return flow_edit(bench, cfg, preset=WHOLE)


def _stock_sampler(model, inversion, positive: list, negative: list, cfg: float) -> Tensor:
    (guider,) = stock.CFGGuider.execute(model, positive, negative, cfg).result
    (nothing,) = stock.DisableNoise.execute().result
    (sampler,) = stock.KSamplerSelect.execute("euler").result
    noise, sigmas = {"samples": inverted_noise(inversion, model)}, inversion.sigmas.flip(0)
    return stock.SamplerCustomAdvanced.execute(nothing, guider, sampler, sigmas, noise).result[0]["samples"]


DIFFUSING = ("official", "diffusers")  # what is defined only for models that diffuse
NEEDING_A_UNET = ("shapes kept",)  # on a transformer, features of KSampler do nothing
METHODS = [
    Method("default", "cfg", CFG, this_pack),
    Method("aligned", "cfg", CFG, aligned),
    Method("fast", "cfg", CFG, fast),
    Method("shapes kept", "cfg", CFG, shapes_kept),
    Method("without blend", "cfg", CFG, without_blend),
    Method("guided", "cfg", CFG, guided),
    Method("paper", "cfg", CFG, paper),
    Method("official", "cfg", THEIR_CFG, official),
    Method("diffusers", "cfg", THEIR_CFG, diffusers_pipeline.redraw),
    Method("word swap", "cfg", CFG, word_swap),
    Method("SDEdit", "denoise", (0.3, 0.45, 0.6, 0.75, 0.9), sdedit),
    Method("Prompt-to-Prompt", "cfg", CFG, prompt_to_prompt),
    Method("Plug-and-Play", "cfg", (*CFG, 7.5), plug_and_play),
    Method("Plug-and-Play 0.5", "cfg", (*CFG, 7.5), plug_and_play_shorter),
    Method("FlowEdit", "cfg", CFG, flow_edit),
    Method("FlowEdit, whole picture", "cfg", CFG, flow_edit_whole),
]
