"""The teacher's own networks as a feature extractor: no other network has to be downloaded."""

from __future__ import annotations

import copy

import comfy.model_management
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor, nn

from ...attention_patches.attention import is_unet
from ..unet.gradients import differentiable_attention, input_gradients, uncompiled

FIRST_BLOCKS = 6  # of a UNet: two sizes of SD 1.5's and SDXL's
NOISE = 0.05  # part of the whole way up the noise levels at which the UNet looks at pictures
TEXT_TOKENS = 77
NOT_THIS_MODEL = (
    "model: its features cannot be used; UNets of the VAE's latents can, such as SD 1.5's and SDXL's. Leave it open: the VAE's "
    "features do without it."
)


class EncoderFeatures(nn.Module):
    """Feature maps of a VAE's encoder: call with pictures [B, 3, H, W] in 0..1, get a list of maps, shallow to deep.

    The encoder is copied, so that the host's stays as it is. Its maps are taken where its sides get smaller, and at its end.
    """

    name = "a vae"

    def __init__(self, vae: VAE, device: torch.device | str):
        super().__init__()
        network = vae.first_stage_model
        with torch.inference_mode(False):
            self.network = copy.deepcopy(network, {id(getattr(network, "decoder", None)): None})
            for module in self.network.modules():  # tensors of inference mode cannot take part in a graph
                for held in (module._parameters, module._buffers):
                    for name, tensor in held.items():
                        if tensor is not None:
                            plain = tensor.detach().float().to(device).clone()
                            held[name] = nn.Parameter(plain, False) if held is module._parameters else plain
        self.network.eval()
        self._process = vae.process_input
        self._maps: list[Tensor] = []
        inner = list(self.network.encoder.modules())
        smaller = [module for module in inner if isinstance(module, nn.Conv2d) and module.stride[0] > 1]
        last_norm = [module for module in inner if isinstance(module, nn.GroupNorm)][-1:]
        for module in [*smaller, *last_norm]:
            module.register_forward_pre_hook(lambda _, inputs: self._maps.append(inputs[0]))
        self.network.encoder.register_forward_hook(lambda _, __, output: self._maps.append(output))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        return self.look(pictures)[0]

    def look(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        """The maps, and the latents [B, C, H/8, W/8] that the VAE encodes the pictures to."""
        self._maps = []
        latents = self.network.encode(self._process(pictures))
        maps, self._maps = self._maps, []
        return maps, latents


class TeacherFeatures:
    """The maps of a VAE's encoder, then those that a UNet's first blocks make of its latents at a low noise level.

    The UNet is the host's, loaded as for sampling with all its patches, asked without a text; it stays as it is. Raises
    ValueError, naming the socket, for a model that is no UNet of these latents.
    """

    name = "a vae and a model"

    def __init__(self, model: ModelPatcher, encoder: EncoderFeatures):
        with torch.inference_mode():  # in which its weights were made, and are patched
            comfy.model_management.load_models_gpu([model])
        self.encoder, self.base, self.options = encoder, model.model, model.model_options["transformer_options"]
        unet = self.base.diffusion_model
        if not is_unet(unet):
            raise ValueError(NOT_THIS_MODEL)
        self.last = min(FIRST_BLOCKS, len(unet.input_blocks)) - 1
        self.sigma = float(self.base.model_sampling.percent_to_sigma(1 - NOISE))
        self.conditions = _no_text(self.base)
        try:
            with torch.no_grad():
                self(torch.zeros(1, 3, 64, 64, device=model.load_device))
        except (AttributeError, RuntimeError, TypeError) as failure:
            raise ValueError(NOT_THIS_MODEL) from failure

    def __call__(self, pictures: Tensor) -> list[Tensor]:
        maps, latents = self.encoder.look(pictures)
        return maps + self._first_blocks(self.base.process_latent_in(latents))

    def _first_blocks(self, latents: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []

        def keep(h: Tensor, options: dict) -> Tensor:
            maps.append(h.float())
            if options["block"][1] == self.last:
                raise _LastBlockReached
            return h

        asked = {
            name: value.to(latents).expand(len(latents), *value.shape[1:]) for name, value in self.conditions.items()
        }
        sigmas = latents.new_full((len(latents),), self.sigma)
        recording = torch.is_grad_enabled()
        with uncompiled(self.base), input_gradients(self.base), torch.set_grad_enabled(recording):
            options = differentiable_attention(self.options)
            patches = options.get("patches", {})
            patches = {**patches, "input_block_patch": [*patches.get("input_block_patch", []), keep]}
            try:
                self.base.apply_model(latents, sigmas, transformer_options={**options, "patches": patches}, **asked)
            except _LastBlockReached:
                return maps
        raise ValueError(NOT_THIS_MODEL)


class _LastBlockReached(Exception):  # noqa: N818 - a signal, not an error
    """Raised out of the UNet once its first blocks are read."""


def _no_text(base: BaseModel) -> dict[str, Tensor]:
    """What a UNet is told beside the latents, all zeros and one row."""
    unet, found = base.diffusion_model, {}
    texts = [module for module in unet.modules() if isinstance(module, SpatialTransformer)]
    if texts:
        width = texts[0].transformer_blocks[0].attn2.to_k.in_features
        found["c_crossattn"] = torch.zeros(1, TEXT_TOKENS, width)
    if base.adm_channels:
        found["y"] = torch.zeros(1, base.adm_channels)
    return found
