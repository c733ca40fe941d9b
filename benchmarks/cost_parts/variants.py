"""The implementations that are compared: the same edit of the same picture, by the same number of steps."""

from dataclasses import dataclass, replace
from unittest.mock import patch

import comfy.model_management
import comfy.sample
import torch
from diffusers.utils import logging

from ...editing.regularization import NoiseRegularization
from ...host.sampling.edit import PRESETS, EditSettings, sample_edit
from ...host.sampling.invert import InversionSettings, invert_latent
from ..peer_pipeline import peer_pipeline
from .unets import Shape, comfyui_model, diffusers_unet

CFG = 7.5
STRENGTH = 0.1
USUAL_STEPS = 50
LATENT_SCALE = 0.18215
logging.set_verbosity_error()


@dataclass(frozen=True)
class Edit:
    """What is edited: `latent` [1, 4, h, w] in the UNet's space and texts [1, tokens, channels]."""

    latent: torch.Tensor
    source: torch.Tensor
    direction: torch.Tensor
    negative: torch.Tensor

    @property
    def positive(self) -> torch.Tensor:
        return self.source + self.direction

    @classmethod
    def draw(cls, shape: Shape, size: int) -> "Edit":
        """A random one for pictures of size x size pixels; the edited text differs by half a standard deviation."""
        generator = torch.Generator().manual_seed(0)
        latent = 0.8 * torch.randn(1, 4, size // 8, size // 8, generator=generator)
        texts = [torch.randn(1, shape.tokens, shape.context_dim, generator=generator) for _ in range(3)]
        return cls(latent, texts[0], 0.5 * texts[1], texts[2])


class Diffusers:
    """diffusers' pipeline as it is."""

    texts_per_gradient = 2  # its distance is averaged over the heads of both branches
    uses_inversion_again = False

    def __init__(self, shape: Shape, dtype: torch.dtype):
        self.device, self.dtype = comfy.model_management.get_torch_device(), dtype
        self.unet = self.prepare(diffusers_unet(shape, dtype, self.device))
        self.pipe = peer_pipeline(self.unet)

    def prepare(self, unet):
        return unet

    @torch.no_grad()
    def one_forward(self, edit: Edit) -> None:
        self.unet(self._here(edit.latent), 500, encoder_hidden_states=self._here(edit.source))

    def invert(self, edit: Edit, steps: int) -> torch.Tensor:
        return self.pipe.invert(
            image=self._here(edit.latent),
            prompt_embeds=self._here(edit.source),
            num_inference_steps=steps,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).latents

    def redraw(self, edit: Edit, inverted: torch.Tensor, steps: int) -> torch.Tensor:
        return self.pipe(
            source_embeds=torch.zeros_like(self._here(edit.direction)),
            target_embeds=self._here(edit.direction),
            prompt_embeds=self._here(edit.source),
            negative_prompt_embeds=self._here(edit.negative),
            latents=inverted.clone(),
            num_inference_steps=steps,
            height=edit.latent.shape[-2] * 8,
            width=edit.latent.shape[-1] * 8,
            guidance_scale=CFG,
            cross_attention_guidance_amount=STRENGTH,
            output_type="latent",
        ).images

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype)


class Authors(Diffusers):
    """The authors' update: the same passes, but of the weights only those of cross-attention get gradients."""

    def prepare(self, unet):
        # The pipeline sets cross-attention to require gradients and self-attention not to; the rest it leaves alone.
        return unet.requires_grad_(False)


class Pack:
    """This pack through ComfyUI's guider. To be used in inference mode, as in the executor.

    Each step is guided and evaluates both texts, or none is guided (`strength` 0): a preset that spreads its guidance over
    many steps would else show none of it in few. `usual_shares` says how its steps are mixed.
    """

    texts_per_gradient = 1
    uses_inversion_again = True

    def __init__(self, shape: Shape, dtype: torch.dtype, preset: str):
        self.preset = preset
        self.strength = STRENGTH
        self.model = comfyui_model(shape, dtype)
        self.unet = self.model.model.diffusion_model

    def one_forward(self, edit: Edit) -> None:
        device, dtype = comfy.model_management.get_torch_device(), self.model.model.get_dtype_inference()
        x, text = (tensor.to(device, dtype) for tensor in (edit.latent, edit.source))
        self.unet(x, torch.full((1,), 500.0, device=device), context=text, transformer_options={})

    def invert(self, edit: Edit, steps: int):
        options = {"map_memory": 0} if self.preset == "low memory" else {}
        return invert_latent(
            self.model,
            _conditioning(edit.source),
            _latent(edit),
            InversionSettings(steps, 0, NoiseRegularization(), **options),
        )

    def redraw(self, edit: Edit, inverted, steps: int) -> torch.Tensor:
        texts = _conditioning(edit.positive), _conditioning(edit.negative)
        each_step = replace(PRESETS[self.preset], guided_steps=None, share=1.0, holds_negative=False)
        with patch.dict(PRESETS, {self.preset: each_step}):
            return sample_edit(self.model, inverted, *texts, EditSettings(CFG, self.strength, preset=self.preset))[0]


class Unguided(Pack):
    """The floor of any edit by inversion: neither regularization nor guidance."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        super().__init__(shape, dtype, "default")
        self.strength = 0.0

    def invert(self, edit: Edit, steps: int):
        unregularized = NoiseRegularization(steps=0)
        return invert_latent(
            self.model,
            _conditioning(edit.source),
            _latent(edit),
            InversionSettings(steps, 0, unregularized, method="ddim"),
        )


class KSampler(Unguided):
    """ComfyUI's own sampling of a new picture, nothing inverted."""

    def invert(self, edit: Edit, steps: int) -> None:
        return None

    def redraw(self, edit: Edit, inverted: None, steps: int) -> torch.Tensor:
        latent = _latent(edit)["samples"]
        noise = comfy.sample.prepare_noise(latent, 0)
        texts = _conditioning(edit.positive), _conditioning(edit.negative)
        return comfy.sample.sample(
            self.model, noise, steps, CFG, "ddim", "ddim_uniform", *texts, latent, disable_pbar=True, seed=0
        )


PEERS = {"diffusers": Diffusers, "authors": Authors}
SCALE = {"unguided": Unguided, "ksampler": KSampler}


def variant_names() -> list[str]:
    return [*PEERS, *PRESETS, *SCALE]


def usual_shares(name: str) -> tuple[float, float]:
    """Of a usual edit's steps: the part that is guided, and the part that evaluates no negative text."""
    if name not in PRESETS:
        return 1.0, 0.0
    schedule = PRESETS[name].schedule(STRENGTH, USUAL_STEPS)
    guided = sum(schedule.strength_at(1.0, step, USUAL_STEPS) > 0 for step in range(USUAL_STEPS))
    held = sum(schedule.holds_negative_at(step) for step in range(USUAL_STEPS))
    return guided / USUAL_STEPS, held / USUAL_STEPS


def runs_in_executor(name: str) -> bool:
    """Whether it is to be loaded and used in inference mode."""
    return name not in PEERS


def load_variant(name: str, shape: Shape, dtype: torch.dtype) -> Diffusers | Pack:
    kinds = PEERS | SCALE
    if name in kinds:
        return kinds[name](shape, dtype)
    return Pack(shape, dtype, name)


def _latent(edit: Edit) -> dict:
    return {"samples": edit.latent / LATENT_SCALE}


def _conditioning(text: torch.Tensor) -> list:
    return [[text, {}]]
