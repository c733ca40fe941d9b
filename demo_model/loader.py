"""Loads the demo weights as ordinary MODEL, CLIP and VAE.

The file has SD 1.x key names, plus `scale_factor` of the latents and the captioner under `captioner.`.
"""

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from torch import Tensor, nn

from .autoencoder import LightAutoencoder
from .eight_bits import unpacked
from .networks import UNET_SETTINGS, DemoModelConfig

WEIGHTS = Path(__file__).parent / "weights.safetensors"
UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model.transformer."
VAE_PREFIX = "first_stage_model."
CAPTIONER_PREFIX = "captioner."
SCALE_FACTOR = "scale_factor"
SMALLEST = 8  # side of a picture, in pixels: one latent pixel

# comfy.sd.VAE wants a network it knows: a minute AutoencoderKL that LightAutoencoder then replaces.
_PLACEHOLDER = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


class DemoVAE(comfy.sd.VAE):
    """`comfy.sd.VAE` around the light autoencoder, in fp32 on every device since it costs next to nothing."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        settings = {"ddconfig": _PLACEHOLDER, "embed_dim": 4}
        placeholder = AutoencoderKL(**settings)
        super().__init__(sd=placeholder.state_dict(), config={"params": settings}, dtype=torch.float32)
        network = LightAutoencoder().eval().requires_grad_(False)
        network.load_state_dict(state)
        self.first_stage_model = network
        comfy.model_management.archive_model_dtypes(network)
        offload_device = comfy.model_management.vae_offload_device()
        self.patcher = comfy.model_patcher.CoreModelPatcher(
            network, load_device=self.device, offload_device=offload_device
        )
        self.memory_used_encode = lambda shape, dtype: 2000 * shape[2] * shape[3]
        self.memory_used_decode = lambda shape, dtype: 2000 * 64 * shape[2] * shape[3]
        self.size = None
        self.model_size()

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Latents of pictures [B, height, width, 3]. Raises ValueError for one without a whole latent pixel."""
        height, width = pixel_samples.shape[-3:-1]
        if min(height, width) < SMALLEST:
            raise ValueError(
                f"pixels: a picture of {width}x{height} is too small, {SMALLEST}x{SMALLEST} is the least. Put Crop to Edit ahead "
                "of VAE Encode."
            )
        return super().encode(pixel_samples)


def read_weights(path: str | Path = WEIGHTS) -> dict[str, Tensor]:
    """All tensors of the weights file, those kept in 8 bits in fp32. ValueError if it is missing."""
    if not Path(path).is_file():
        raise ValueError(f"The demo model's weights are missing: {path}. Reinstall the pix2pix-zero pack.")
    return unpacked(comfy.utils.load_torch_file(str(path), safe_load=True))


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}


def check_keys(state: dict[str, Tensor], network: nn.Module, part: str) -> None:
    """ValueError unless `state` holds exactly the tensors of `network`, in their shapes."""
    expected = {k: v.shape for k, v in network.state_dict().items()}
    found = {k: v.shape for k, v in state.items()}
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = sorted(k for k in expected.keys() & found.keys() if expected[k] != found[k])
    if missing or extra or wrong:
        faults = (("missing", missing), ("left over", extra), ("misshaped", wrong))
        told = "; ".join(f"{word} {names[:3]}" for word, names in faults if names)
        raise ValueError(f"The demo model's weights do not fit its {part}: {told}. Reinstall the pix2pix-zero pack.")


def load_diffusion(
    weights: dict[str, Tensor], config: comfy.supported_models_base.BASE, part: str, disable_dynamic: bool
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of the weights of a checkpoint. ValueError, which calls it `part`, if any is missing, left over or misshaped."""
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    state = _part(weights, UNET_PREFIX)
    supported = list(config.supported_inference_dtypes)
    size = sum(v.numel() for v in state.values())
    dtype = comfy.model_management.unet_dtype(model_params=size, supported_dtypes=supported)
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, load_device, supported))
    model = config.get_model({}, "", device=offload_device)
    check_keys(state, model.diffusion_model, part)
    model.latent_format.scale_factor = weights[SCALE_FACTOR].item()
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=load_device, offload_device=offload_device)
    model.load_model_weights({UNET_PREFIX + k: v for k, v in state.items()}, UNET_PREFIX, assign=patcher.is_dynamic())
    return patcher


def _load_patcher(
    weights: dict[str, Tensor], path: str | Path, disable_dynamic: bool
) -> comfy.model_patcher.ModelPatcher:
    patcher = load_diffusion(weights, DemoModelConfig(dict(UNET_SETTINGS)), "UNet", disable_dynamic)
    patcher.cached_patcher_init = (load_model_patcher, (str(path),))
    return patcher


def _load_clip(weights: dict[str, Tensor], path: str | Path, disable_dynamic: bool) -> comfy.sd.CLIP:
    state = _part(weights, TEXT_PREFIX)
    size = sum(v.numel() for v in state.values())
    target = DemoModelConfig(dict(UNET_SETTINGS)).clip_target()
    clip = comfy.sd.CLIP(target, parameters=size, disable_dynamic=disable_dynamic)
    check_keys(state, clip.cond_stage_model.clip_l.transformer, "text encoder")
    clip.load_sd(state)
    clip.patcher.cached_patcher_init = (load_clip_patcher, (str(path),))
    return clip


def load_model_patcher(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """A fresh UNet patcher; ComfyUI calls this when it needs an independent copy of the weights."""
    return _load_patcher(read_weights(path), path, disable_dynamic)


def load_clip_patcher(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """A fresh text encoder patcher, for the same purpose."""
    return _load_clip(read_weights(path), path, disable_dynamic).patcher


def load_vae_patcher(path: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """A fresh autoencoder patcher, for the same purpose."""
    return DemoVAE(_part(read_weights(path), VAE_PREFIX)).patcher


def load_demo_model(path: str | Path = WEIGHTS) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the demo. ValueError if the file is missing, or if any key is missing or left over."""
    weights = read_weights(path)
    known = (UNET_PREFIX, TEXT_PREFIX, VAE_PREFIX, CAPTIONER_PREFIX, SCALE_FACTOR)
    stray = sorted(k for k in weights if not k.startswith(known))
    if stray or SCALE_FACTOR not in weights:
        fault = f"left over {stray[:3]}" if stray else f"missing ['{SCALE_FACTOR}']"
        raise ValueError(f"The demo model's weights do not fit: {fault}. Reinstall the pix2pix-zero pack.")
    check_keys(_part(weights, VAE_PREFIX), LightAutoencoder(), "autoencoder")
    model = _load_patcher(weights, path, disable_dynamic=False)
    clip = _load_clip(weights, path, disable_dynamic=False)
    vae = DemoVAE(_part(weights, VAE_PREFIX))
    vae.patcher.cached_patcher_init = (load_vae_patcher, (str(path),))
    return model, clip, vae
