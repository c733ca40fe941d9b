"""The demo DiT: SD 3's transformer in small, on the latents and texts of the demo model, trained as a rectified flow.

Width 128 (two heads of 64), five joint blocks, patches of two latent pixels: 64 tokens for a picture of 128 pixels.
"""

from pathlib import Path

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models_base
import torch
from torch import Tensor

from .eight_bits import in_eight_bits
from .loader import load_diffusion, read_weights
from .networks import TEXT_WIDTH, DemoLatentFormat

TRANSFORMER_WEIGHTS = Path(__file__).parent / "transformer.safetensors"
WIDTH = 128
TRANSFORMER_SETTINGS = {
    "in_channels": 4,
    "patch_size": 2,
    "out_channels": 4,
    "depth": WIDTH // 64,
    "num_blocks": 5,
    "input_size": None,
    "adm_in_channels": TEXT_WIDTH,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": TEXT_WIDTH, "out_features": WIDTH},
    },
    "qk_norm": "rms",
    "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [],
}


class DemoTransformerConfig(comfy.supported_models_base.BASE):
    """What ComfyUI's own detection says of the weights, and `num_blocks`, which it takes to be the number of heads."""

    unet_config = TRANSFORMER_SETTINGS
    unet_extra_config: dict = {}
    sampling_settings = {"shift": 1.0}
    latent_format = DemoLatentFormat
    supported_inference_dtypes = [torch.float32]
    memory_usage_factor = 0.1
    best_side = 128  # of its pictures, in pixels

    def get_model(self, state_dict: dict, prefix: str = "", device=None) -> comfy.model_base.SD3:
        return comfy.model_base.SD3(self, device=device)


def build_transformer(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> comfy.model_base.SD3:
    """An untrained `comfy.model_base.SD3` with the demo's transformer; its weights are not initialized."""
    config = DemoTransformerConfig(dict(TRANSFORMER_SETTINGS))
    config.set_inference_dtype(dtype, None)
    return config.get_model({}, "", device=device)


def packed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in half precision; those that modulate the blocks, a third of all, in 8 bits with a scale for each row."""
    tensors = {}
    for name, value in state.items():
        if "adaLN" in name and value.ndim == 2:
            tensors |= in_eight_bits(name, value)
        else:
            tensors[name] = value.half().contiguous()
    return tensors


def load_transformer(path: str | Path = TRANSFORMER_WEIGHTS) -> comfy.model_patcher.ModelPatcher:
    """A MODEL that flows, of the weights that `dev.py train dit` writes; it goes with the demo's CLIP and VAE.

    ValueError if the file is missing or holds another network.
    """
    return load_transformer_patcher(str(path))


def load_transformer_patcher(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The same; ComfyUI calls this when it needs an independent copy of the weights."""
    config = DemoTransformerConfig(dict(TRANSFORMER_SETTINGS))
    patcher = load_diffusion(read_weights(path), config, "transformer", disable_dynamic)
    patcher.cached_patcher_init = (load_transformer_patcher, (path,))
    return patcher
