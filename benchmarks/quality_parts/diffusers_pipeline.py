"""diffusers' pix2pix-zero pipeline on the demo weights."""

from functools import cache

import comfy.model_management
import torch
from comfy.utils import unet_to_diffusers
from diffusers import UNet2DConditionModel
from torch import Tensor

from ...demo_model.loader import UNET_PREFIX, read_weights
from ...demo_model.networks import UNET_SETTINGS
from ..peer_pipeline import peer_pipeline
from .workbench import Workbench


def demo_unet() -> UNet2DConditionModel:
    """The demo's UNet as diffusers builds it. Raises RuntimeError if a weight is missing or left over."""
    channels = [UNET_SETTINGS["model_channels"] * factor for factor in UNET_SETTINGS["channel_mult"]]
    unet = UNet2DConditionModel(
        sample_size=UNET_SETTINGS["image_size"],
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=[width // UNET_SETTINGS["num_head_channels"] for width in channels],  # number of heads
        cross_attention_dim=UNET_SETTINGS["context_dim"],
    )
    weights, names = read_weights(), unet_to_diffusers(UNET_SETTINGS)
    unet.load_state_dict({name: weights[UNET_PREFIX + names[name]].float() for name in unet.state_dict()})
    return unet.eval().requires_grad_(False)


@cache
@torch.inference_mode(False)
def make_pipeline():
    """The pipeline in fp32 on ComfyUI's device, with Stable Diffusion's schedules for the demo's v-prediction."""
    device = comfy.model_management.get_torch_device()
    return peer_pipeline(demo_unet().to(device), "v_prediction")


def redraw(bench: Workbench, cfg: float) -> Tensor:
    """The pipeline's own inversion and edit with its defaults, one picture at a time: of a batch it edits the first only."""
    pipe = make_pipeline()
    noise = bench.once("their inversion", lambda: [_invert(pipe, bench, index) for index in range(len(bench))])
    return torch.cat([_edit(pipe, bench, index, noise[index], cfg) for index in range(len(bench))])


def _invert(pipe, bench: Workbench, index: int) -> Tensor:
    latent = bench.model.model.process_latent_in(bench.latent[index : index + 1])
    with torch.inference_mode(False):
        return pipe.invert(
            image=_for(pipe, latent),
            prompt_embeds=_for(pipe, bench.described[0][0][index : index + 1]),
            num_inference_steps=bench.steps,
            output_type="np",
            generator=torch.Generator(pipe.device).manual_seed(0),
        ).latents


def _edit(pipe, bench: Workbench, index: int, noise: Tensor, cfg: float) -> Tensor:
    height, width = (pipe.vae_scale_factor * side for side in noise.shape[-2:])
    with torch.inference_mode(False):
        source, target = (_for(pipe, text[0][0][index : index + 1]) for text in (bench.described, bench.moved))
        edited = pipe(
            prompt_embeds=source,
            negative_prompt_embeds=source,
            source_embeds=source,
            target_embeds=target,
            latents=noise.clone(),
            num_inference_steps=bench.steps,
            height=height,
            width=width,
            guidance_scale=cfg,
            output_type="latent",
        ).images
    return bench.model.model.process_latent_out(edited.cpu())


def _for(pipe, tensor: Tensor) -> Tensor:
    return tensor.clone().to(pipe.device, pipe.unet.dtype)
