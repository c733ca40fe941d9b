"""Small CLIP objects with random weights, built from ComfyUI's own classes: one text encoder as in SD 1.x, two as in SDXL,
the second of them alone as in SDXL's refiner."""

from functools import cache

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models_base
import torch

from nodes import CLIPTextEncode

WIDTH_L, WIDTH_G = 32, 48


def _config(width: int, layers: int) -> dict:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
    }


class _EncoderL(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}, **kwargs):
        super().__init__(device=device, dtype=dtype, textmodel_json_config=_config(WIDTH_L, 3), **kwargs)


class SD1Model(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(device, dtype, model_options, clip_model=_EncoderL, return_projected_pooled=False)


class _EncoderG(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}, **kwargs):
        super().__init__(
            device=device,
            dtype=dtype,
            layer="hidden",
            layer_idx=-2,
            textmodel_json_config=_config(WIDTH_G, 4),
            special_tokens={"start": 49406, "end": 49407, "pad": 0},
            layer_norm_hidden_state=False,
        )


class RefinerModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(device, dtype, model_options, clip_name="g", clip_model=_EncoderG)


class SDXLModel(torch.nn.Module):
    """Like comfy.sdxl_clip.SDXLClipModel, which fixes the sizes of its encoders."""

    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__()
        self.clip_l = comfy.sd1_clip.SDClipModel(
            textmodel_json_config=_config(WIDTH_L, 3),
            device=device,
            dtype=dtype,
            layer="hidden",
            layer_idx=-2,
            layer_norm_hidden_state=False,
        )
        self.clip_g = _EncoderG(device, dtype)
        self.dtypes = {dtype}

    set_clip_options = comfy.sdxl_clip.SDXLClipModel.set_clip_options
    reset_clip_options = comfy.sdxl_clip.SDXLClipModel.reset_clip_options
    encode_token_weights = comfy.sdxl_clip.SDXLClipModel.encode_token_weights


@cache
def _tokenizer(kind: str):
    return {"sd1": comfy.sd1_clip.SD1Tokenizer}.get(kind, comfy.sdxl_clip.SDXLTokenizer)()


def tiny_clip(kind: str = "sd1", seed: int = 0) -> comfy.sd.CLIP:
    """A CLIP of kind "sd1", "sdxl" or "refiner" whose weights depend on the seed only."""
    model = {"sd1": SD1Model, "sdxl": SDXLModel, "refiner": RefinerModel}[kind]
    target = comfy.supported_models_base.ClipTarget(lambda **_: _tokenizer(kind), model)
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    generator = torch.Generator().manual_seed(seed)
    for name, weight in clip.cond_stage_model.named_parameters():
        if weight.ndim > 1:
            scale = 1.0 if "embedding" in name else weight.shape[-1] ** -0.5
            weight.data = scale * torch.randn(weight.shape, generator=generator)
        elif "norm" in name and name.endswith("weight"):
            weight.data = 1 + 0.1 * torch.randn(weight.shape, generator=generator)
        else:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return clip


def encode(clip, text):
    """The CONDITIONING that CLIP Text Encode makes of a text."""
    with torch.inference_mode():
        return CLIPTextEncode().encode(clip, text)[0]
