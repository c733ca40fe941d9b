"""The UNet that every variant runs: one set of random weights for diffusers, for ComfyUI and in float64."""

import logging
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from comfy.utils import unet_to_diffusers
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from ..small_sd import SETTINGS, SmallSD

SEED = 1234
FOLDER = Path(__file__).resolve().parents[2] / ".comfyui" / "benchmarks"


@dataclass(frozen=True)
class Shape:
    """A UNet's architecture. `sharpness` scales the queries and keys of the text, whose maps would else be flat."""

    name: str
    settings: dict
    sharpness: float
    tokens: int

    @property
    def context_dim(self) -> int:
        return self.settings["cross_attention_dim"]


FULL = Shape("sd15", dict(sample_size=64, cross_attention_dim=768), 4.0, 77)
QUICK = Shape(
    "quick",
    dict(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=4,
        cross_attention_dim=32,
    ),
    1.5,
    7,
)


def make_weights(shape: Shape) -> None:
    """Draw the weights once and keep them where the jobs find them."""
    path = _path(shape)
    if path.exists():
        return
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        unet = UNet2DConditionModel(**shape.settings)
    weights = unet.state_dict()
    for name, weight in weights.items():
        if ".attn2.to_q" in name or ".attn2.to_k" in name:
            weight *= shape.sharpness
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    save_file(weights, unfinished)
    unfinished.replace(path)


def diffusers_unet(shape: Shape, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shape.settings)
    # Copies: a tensor of the file itself would enter memory only when it is first read.
    weights = {name: weight.to(device, dtype, copy=True) for name, weight in load_file(_path(shape)).items()}
    unet.load_state_dict(weights, assign=True)
    return unet.eval()


def comfyui_model(shape: Shape, dtype: torch.dtype) -> comfy.model_patcher.ModelPatcher:
    """A loaded MODEL. To be called in inference mode, as the executor calls the nodes that load models."""
    weights = load_file(_path(shape))
    if shape is FULL:
        missing_shortcuts = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)
        model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})
        logging.getLogger().setLevel(missing_shortcuts)
    else:
        config = SmallSD({**SETTINGS, "dtype": dtype})
        config.manual_cast_dtype = None
        device = comfy.model_management.get_torch_device()
        base = comfy.model_base.BaseModel(config, device=device)
        names = unet_to_diffusers(config.unet_config)
        base.diffusion_model.load_state_dict({names[name]: weight for name, weight in weights.items()})
        offload = comfy.model_management.unet_offload_device()
        model = comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=offload)
    comfy.model_management.load_models_gpu([model])
    return model


def float64_unet(shape: Shape) -> torch.nn.Module:
    """ComfyUI's UNet in float64 on the CPU, of ordinary tensors."""
    return comfyui_model(shape, torch.float32).model.diffusion_model.to("cpu", torch.float64).requires_grad_(False)


def _path(shape: Shape) -> Path:
    recipe = zlib.crc32(repr((SEED, shape)).encode())
    return FOLDER / f"{shape.name}_{recipe:08x}.safetensors"
