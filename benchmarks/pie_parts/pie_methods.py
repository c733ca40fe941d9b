"""The methods that are compared on PIE-Bench, wired as a user wires the nodes and at the nodes' defaults."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from comfy_extras import nodes_custom_sampler as stock
from pix2pix_zero.host.networks.captioner import Captioner
from pix2pix_zero.nodes.directions import Pix2PixZeroApplyDirection, Pix2PixZeroEditDirectionFromSentences
from pix2pix_zero.nodes.inversion import Pix2PixZeroInversion
from pix2pix_zero.nodes.plug_and_play import Pix2PixZeroPlugAndPlay
from pix2pix_zero.nodes.prompt_to_prompt import Pix2PixZeroPromptToPrompt
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler
from pix2pix_zero.nodes.sockets import with_defaults

import nodes as host_nodes

from .pie_data import PieCase

BLEND_THRESHOLD = 0.3
WORD_FACTOR = 2
SDEDIT_DENOISE = 0.6


def run_node(node_class: type, **inputs) -> tuple:
    """The outputs of a node, with its own defaults for the inputs that are not given."""
    inputs = with_defaults(node_class, inputs)
    if not node_class.GET_SCHEMA().is_input_list:
        return node_class.execute(**inputs).result
    return tuple(output[0] for output in node_class.execute(**{key: [item] for key, item in inputs.items()}).result)


@dataclass
class Editor:
    """A checkpoint and the settings that all methods share."""

    model: object
    clip: object
    vae: object
    steps: int
    cfg: float
    guidance: float
    captioner: Captioner | None = None


@dataclass
class Edit:
    """One edit of the benchmark on its way through the methods, which share its inversions."""

    editor: Editor
    case: PieCase
    picture: torch.Tensor
    inversions: dict = field(default_factory=dict)

    def __post_init__(self):
        captioner = self.editor.captioner
        self.caption = captioner.caption(self.picture)[0] if captioner else self.case.source_text
        self.latent = {"samples": self.editor.vae.encode(self.picture)}

    def encode(self, text: str) -> list:
        return host_nodes.CLIPTextEncode().encode(self.editor.clip, text)[0]

    def invert(self, text: str, method: str) -> tuple:
        """(inversion, noise, sigmas) of the picture with this caption."""
        if (text, method) not in self.inversions:
            *outputs, _ = run_node(
                Pix2PixZeroInversion,
                model=self.editor.model,
                positive=self.encode(text),
                latent_image=self.latent,
                steps=self.editor.steps,
                method=method,
                **({"map_memory": 0} if method == "ddim" else {}),  # only pix2pix-zero reads maps
            )
            self.inversions[text, method] = outputs
        return self.inversions[text, method]

    def decode(self, latent: dict) -> torch.Tensor:
        return self.editor.vae.decode(latent["samples"])

    def sample(self, model, positive: list, negative: list, noise: dict, sigmas: torch.Tensor) -> torch.Tensor:
        """As SamplerCustomAdvanced with DisableNoise."""
        (guider,) = stock.CFGGuider.execute(model, positive, negative, self.editor.cfg).result
        (nothing,) = stock.DisableNoise.execute().result
        (euler,) = stock.KSamplerSelect.execute("euler").result
        return self.decode(stock.SamplerCustomAdvanced.execute(nothing, guider, euler, sigmas, noise).result[0])


def pix2pix_zero(edit: Edit, preset: str, method: str = "direct", **settings) -> torch.Tensor:
    """Moves the caption by the difference of the benchmark's two texts, one sentence each, as its authors did."""
    editor, case = edit.editor, edit.case
    described = edit.encode(edit.caption)
    (direction,) = run_node(
        Pix2PixZeroEditDirectionFromSentences,
        clip=editor.clip,
        source_sentences=case.source_text,
        target_sentences=case.target_text,
    )
    (moved,) = run_node(Pix2PixZeroApplyDirection, conditioning=described, direction=direction)
    latent, _ = run_node(
        Pix2PixZeroKSampler,
        model=editor.model,
        inversion=edit.invert(edit.caption, method)[0],
        positive=moved,
        negative=described,
        cfg=editor.cfg,
        preset=preset,
        **{"guidance_strength": editor.guidance, **settings},
    )
    return edit.decode(latent)


def word_swap(edit: Edit) -> torch.Tensor:
    """The target text on the source's inversion, and nothing else."""
    inversion, noise, sigmas = edit.invert(edit.case.source_text, "ddim")
    target, source = edit.encode(edit.case.target_text), edit.encode(edit.case.source_text)
    return edit.sample(edit.editor.model, target, source, noise, sigmas)


def prompt_to_prompt(edit: Edit) -> torch.Tensor:
    """With the local blend and the doubled word that the benchmark's authors use wherever a word is annotated."""
    case = edit.case
    inversion, noise, sigmas = edit.invert(case.source_text, "direct")
    model, positive = run_node(
        Pix2PixZeroPromptToPrompt,
        model=edit.editor.model,
        inversion=inversion,
        clip=edit.editor.clip,
        source=case.source_text,
        target=case.target_text,
        **_annotated_words(case),
    )
    return edit.sample(model, positive, edit.encode(case.source_text), noise, sigmas)


def _annotated_words(case: PieCase) -> dict:
    if len(case.blended_words) != 2:
        return {}
    before, after = case.blended_words
    if not (_names(case.source_text, before) and _names(case.target_text, after)):
        return {}
    return {
        "local_blend": BLEND_THRESHOLD,
        "blend_words": ", ".join(dict.fromkeys((before, after))),
        "reweight": f"{after}: {WORD_FACTOR}",
    }


def _names(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def plug_and_play(edit: Edit) -> torch.Tensor:
    case = edit.case
    inversion, noise, sigmas = edit.invert(case.source_text, "ddim")
    (model,) = run_node(Pix2PixZeroPlugAndPlay, model=edit.editor.model, inversion=inversion)
    return edit.sample(model, edit.encode(case.target_text), edit.encode(case.source_text), noise, sigmas)


def sdedit(edit: Edit) -> torch.Tensor:
    (latent,) = host_nodes.KSampler().sample(
        edit.editor.model, 0, edit.editor.steps, edit.editor.cfg, "euler", "ddim_uniform",
        edit.encode(edit.case.target_text), edit.encode(""), edit.latent, SDEDIT_DENOISE,
    )  # fmt: skip
    return edit.decode(latent)


METHODS: dict[str, Callable[[Edit], torch.Tensor]] = {
    "default": lambda edit: pix2pix_zero(edit, "default"),
    "fast": lambda edit: pix2pix_zero(edit, "fast"),
    "official": lambda edit: pix2pix_zero(edit, "official", "official"),
    "prompt-to-prompt": prompt_to_prompt,
    "plug-and-play": plug_and_play,
    "word-swap": word_swap,
    "sdedit": sdedit,
}
