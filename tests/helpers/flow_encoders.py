"""The text encoders of flow models, small: ComfyUI's own tokenizers and classes with few channels and random weights."""

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import comfy.sd
import comfy.supported_models_base
import torch
from comfy.text_encoders import flux
from small_vocabularies import mistral_tokenizer, sentencepiece_model

T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2}
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CLIP = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "projection_dim": 32,
}
SMALL = {
    "t5xxl_model_config": T5,
    "llama_model_config": LLAMA,
    "clip_l_model_config": CLIP,
    "clip_g_model_config": CLIP,
    "pile_t5xl_model_config": T5,
    "umt5xxl_model_config": {**T5, "vocab_size": 512},
    "gemma2_2b_model_config": {**LLAMA, "vocab_size": 512},
    **{f"{name}_model_config": LLAMA for name in ("qwen25_7b", "qwen3_4b", "qwen3_06b")},
}

# SD 3 puts its texts end to end with CLIP's, at full width; Flux 2 takes them from layers as far up as the 27th.
WANTED = {
    "SD3Tokenizer": {"t5xxl_model_config": {**T5, "d_model": 4096}},
    "KleinTokenizer": {"qwen3_4b_model_config": {**LLAMA, "num_hidden_layers": 28}},
    "Flux2Tokenizer": {"mistral3_24b_model_config": {**LLAMA, "num_hidden_layers": 31, "vocab_size": 1024}},
    "HunyuanImageTokenizer": {"_model_config": T5},  # of its ByT5, which has no name
}

# What a checkpoint brings beside its weights: the vocabularies that the host does not ship.
VOCABULARIES = {
    "LuminaTokenizer": lambda: {"spiece_model": sentencepiece_model(pad_id=0, eos_id=1, bos_id=2, unk_id=3)},
    "WanT5Tokenizer": lambda: {"spiece_model": sentencepiece_model(pad_id=0, eos_id=1, bos_id=-1, unk_id=2)},
}


def _of(module: str, tokenizer: str, make: Callable[[Any], type]) -> Callable:
    return partial(_build, module, tokenizer, make)


def _build(module: str, tokenizer: str, make: Callable) -> comfy.sd.CLIP:
    small = SMALL | WANTED.get(tokenizer, {})
    source = importlib.import_module(f"comfy.text_encoders.{module}")
    target = comfy.supported_models_base.ClipTarget(getattr(source, tokenizer), make(source))
    target.params["model_options"] = {}
    brought = VOCABULARIES.get(tokenizer, dict)()
    options = {**small, "initial_device": torch.device("cpu")}
    with patch.object(flux, "load_mistral_tokenizer", mistral_tokenizer):
        return comfy.sd.CLIP(target, tokenizer_data=brought, model_options=options)


ENCODERS = {
    "SD 3": _of("sd3_clip", "SD3Tokenizer", lambda module: module.sd3_clip(dtype_t5=torch.float32)),
    "Flux": _of("flux", "FluxTokenizer", lambda module: module.flux_clip(dtype_t5=torch.float32)),
    "Chroma": _of("pixart_t5", "PixArtTokenizer", lambda module: module.pixart_te(dtype_t5=torch.float32)),
    "AuraFlow": _of("aura_t5", "AuraT5Tokenizer", lambda module: module.AuraT5Model),
    "Qwen-Image": _of("qwen_image", "QwenImageTokenizer", lambda module: module.te()),
    "Z-Image": _of("z_image", "ZImageTokenizer", lambda module: module.te()),
    "HiDream": _of(
        "hidream",
        "HiDreamTokenizer",
        lambda module: module.hidream_clip(dtype_t5=torch.float32, dtype_llama=torch.float32),
    ),
    "Hunyuan-Image": _of("hunyuan_image", "HunyuanImageTokenizer", lambda module: module.te()),
    "Flux 2": _of("flux", "Flux2Tokenizer", lambda module: module.flux2_te(dtype_llama=torch.float32)),
    "Lumina 2": _of("lumina2", "LuminaTokenizer", lambda module: module.te(dtype_llama=torch.float32)),
    "Wan 2.1": _of("wan", "WanT5Tokenizer", lambda module: module.te(dtype_t5=torch.float32)),
    "Flux 2 Klein": _of("flux", "KleinTokenizer", lambda module: module.klein_te(model_type="qwen3_4b")),
    "Anima": _of("anima", "AnimaTokenizer", lambda module: module.te()),
}


@cache
@torch.inference_mode()
def small_encoder(name: str) -> comfy.sd.CLIP:
    """The CLIP of a flow family."""
    clip = ENCODERS[name]()
    for module in clip.cond_stage_model.modules():
        if hasattr(module, "visual"):  # built in one size only, and no text comes by it
            del module.visual
    generator = torch.Generator().manual_seed(0)
    for key, weight in clip.cond_stage_model.named_parameters():
        rows = min(509, len(weight)) if weight.ndim else 1  # of a vocabulary, many tokens have the same
        value = torch.randn((rows, *weight.shape[1:]), generator=generator)
        value = value[torch.arange(len(weight)) % rows] if weight.ndim else value[0]
        if weight.ndim > 1:
            value *= 1.0 if "embed" in key or "shared" in key else weight[0].numel() ** -0.5
        else:
            value = 0.02 * value + float(key.endswith("weight"))
        weight.data = value.to(weight.dtype)
    return clip
