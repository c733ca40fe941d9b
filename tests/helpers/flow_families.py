"""Every flow family small: a MODEL of random weights that ComfyUI's own detection finds in the shapes of a real file.

What detection looks at is of full size, on the meta device, where it takes no memory. The network that is built is small.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.latent_formats
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch

CPU = torch.device("cpu")
META = dict(dtype=torch.float32, device="meta", operations=comfy.ops.disable_weight_init)
HEIGHT, WIDTH = 8, 12
TOKENS = 7


@dataclass(frozen=True)
class Family:
    """`file`: the shapes of a checkpoint, with few blocks. `small`: settings of the network that differ from its. `text`:
    width of its texts, `pooled`: of their pooled vectors, 0 without. `extra(rows, generator)`: further options of a text.
    `kind`: the host's class.
    """

    kind: str
    file: Callable[[], dict]
    text: int
    small: dict = field(default_factory=dict)
    pooled: int = 0
    extra: Callable[[int, torch.Generator], dict] = lambda rows, generator: {}
    guided: bool = False
    gain: float = 1.0

    @property
    def known(self) -> bool:
        """Whether this ComfyUI has it."""
        return hasattr(comfy.supported_models, self.kind)


def shapes(module: str, name: str, **arguments: Any) -> dict:
    """The state dict, without values, of a class of ComfyUI's."""
    network = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)(**arguments, **META)
    return dict(network.state_dict())


def sd3(**more) -> dict:
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
    return shapes(
        "modules.diffusionmodules.mmdit",
        "OpenAISignatureMMDITWrapper",
        input_size=None,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        depth=2,
        adm_in_channels=2048,
        context_embedder_config=embedder,
        num_patches=1024,
        pos_embed_max_size=32,
        qk_norm="rms",
        **more,
    )


LIKE_FLUX = dict(
    in_channels=16,
    out_channels=16,
    context_in_dim=4096,
    hidden_size=128,
    mlp_ratio=4.0,
    num_heads=1,
    depth=2,
    depth_single_blocks=2,
    axes_dim=[16, 56, 56],
    theta=10000,
    patch_size=2,
    qkv_bias=True,
)


def flux(guided: bool, pooled: int | None = 768, **more) -> dict:
    settings = {**LIKE_FLUX, "vec_in_dim": pooled, "guidance_embed": guided}
    fields = importlib.import_module("comfy.ldm.flux.model").FluxParams.__dataclass_fields__
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in fields else {}
    return shapes("flux.model", "Flux", **{**settings, **newer, **more})


def flux2() -> dict:
    return flux(
        False,
        None,
        in_channels=128,
        out_channels=128,
        context_in_dim=15360,
        mlp_ratio=3.0,
        axes_dim=[32, 32, 32, 32],
        theta=2000,
        patch_size=1,
        qkv_bias=False,
        txt_ids_dims=[3],
        global_modulation=True,
        mlp_silu_act=True,
        ops_bias=False,
    )


def chroma() -> dict:
    fields = importlib.import_module("comfy.ldm.chroma.model").ChromaParams.__dataclass_fields__
    newer = {name: value for name, value in {"txt_ids_dims": [], "vec_in_dim": None}.items() if name in fields}
    own = dict(in_channels=64, out_channels=64, in_dim=64, out_dim=128, hidden_dim=64, n_layers=2)
    return shapes("chroma.model", "Chroma", **{**LIKE_FLUX, **own, **newer})


def aura() -> dict:
    return shapes("aura.mmdit", "MMDiT", dim=64, n_layers=3, n_double_layers=1, n_heads=1, global_conddim=64)


def qwen() -> dict:
    return shapes(
        "qwen_image.model",
        "QwenImageTransformer2DModel",
        num_layers=2,
        attention_head_dim=128,
        num_attention_heads=1,
    )


def lumina(dim: int, **more) -> dict:
    return shapes(
        "lumina.model",
        "NextDiT",
        patch_size=2,
        in_channels=16,
        dim=dim,
        n_layers=2,
        n_heads=dim // 96 if dim == 2304 else 30,
        n_kv_heads=8 if dim == 2304 else 30,
        qk_norm=True,
        axes_dims=[32, 32, 32] if dim == 2304 else [32, 48, 48],
        axes_lens=[300, 512, 512],
        **more,
    )


def hidream() -> dict:
    return shapes(
        "hidream.model",
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=20,
        caption_channels=[4096, 4096],
        axes_dims_rope=[64, 32, 32],
        llama_layers=[0, 1],
    )


def hunyuan_image() -> dict:
    fields = importlib.import_module("comfy.ldm.hunyuan_video.model").HunyuanVideoParams.__dataclass_fields__
    newer = {"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
    return shapes(
        "hunyuan_video.model",
        "HunyuanVideo",
        in_channels=64,
        out_channels=64,
        vec_in_dim=None,
        context_in_dim=3584,
        hidden_size=128,
        mlp_ratio=4.0,
        num_heads=1,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[64, 64],
        theta=256,
        patch_size=[1, 1],
        qkv_bias=True,
        guidance_embed=False,
        byt5=True,
        meanflow=False,
        **{name: value for name, value in newer.items() if name in fields},
    )


def wan() -> dict:
    return shapes(
        "wan.model", "WanModel", in_dim=16, dim=128, ffn_dim=256, num_heads=1, num_layers=2, text_dim=4096, out_dim=16
    )


def kandinsky() -> dict:
    return shapes(
        "kandinsky5.model",
        "Kandinsky5",
        model_dim=2560,
        ff_dim=256,
        time_dim=64,
        visual_embed_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(32, 48, 48),
    )


def anima() -> dict:
    return shapes(
        "anima.model",
        "Anima",
        max_img_h=240,
        max_img_w=240,
        max_frames=128,
        in_channels=16,
        out_channels=16,
        patch_spatial=2,
        patch_temporal=1,
        model_channels=2048,
        num_blocks=2,
        num_heads=16,
        pos_emb_cls="rope3d",
        use_adaln_lora=True,
        adaln_lora_dim=256,
    )


def llama(rows: int, generator: torch.Generator) -> dict:
    return {"conditioning_llama3": torch.randn(rows, 2, 5, 4096, generator=generator)}


def byt5(rows: int, generator: torch.Generator) -> dict:
    return {"conditioning_byt5small": torch.randn(rows, 4, 1472, generator=generator)}


def t5_tokens(rows: int, generator: torch.Generator) -> dict:
    return {"t5xxl_ids": torch.randint(0, 32000, (6,), generator=generator), "t5xxl_weights": torch.ones(6)}


SMALL_LUMINA = {"dim": 96, "n_heads": 1, "n_kv_heads": 1, "ffn_dim_multiplier": 2.0}
SMALL_HIDREAM = {
    "num_attention_heads": 1,
    "num_layers": 1,
    "num_single_layers": 1,
    "llama_layers": [0, 1],
}
SMALL_ANIMA = {"model_channels": 128, "num_heads": 1, "num_blocks": 6, "crossattn_emb_channels": 128}
SMALL_ADAPTER = {"source_dim": 128, "target_dim": 128, "model_dim": 128, "num_layers": 1, "num_heads": 2}

FAMILIES = {
    "SD 3": Family("SD3", sd3, text=4096, pooled=2048),
    "SD 3.5 Medium": Family("SD3", lambda: sd3(x_block_self_attn_layers=[0]), text=4096, pooled=2048),
    "Flux dev": Family("Flux", lambda: flux(True), text=4096, pooled=768, guided=True),
    "Flux schnell": Family("FluxSchnell", lambda: flux(False), text=4096, pooled=768),
    "Flux 2": Family("Flux2", flux2, text=256, small={"context_in_dim": 256}, guided=True),
    "Chroma": Family("Chroma", chroma, text=4096, small={"out_dim": 128, "hidden_dim": 64, "n_layers": 2}),
    "AuraFlow": Family(
        "AuraFlow",
        aura,
        text=2048,
        small={"dim": 64, "n_heads": 1, "global_conddim": 64, "cond_seq_dim": 2048},
        gain=1.2,
    ),
    "Qwen-Image": Family("QwenImage", qwen, text=3584, small={"num_attention_heads": 1}),
    "Lumina 2": Family(
        "Lumina2",
        lambda: lumina(2304, cap_feat_dim=2304),
        text=2304,
        small={**SMALL_LUMINA, "axes_dims": [32, 32, 32]},
        gain=1.5,
    ),
    "Z-Image": Family(
        "ZImage",
        lambda: lumina(3840, cap_feat_dim=2560, z_image_modulation=True, pad_tokens_multiple=32),
        text=2560,
        small={**SMALL_LUMINA, "dim": 256, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48]},
    ),
    "HiDream": Family("HiDream", hidream, text=4096, pooled=2048, small=SMALL_HIDREAM, extra=llama),
    "Hunyuan-Image": Family("HunyuanImage21", hunyuan_image, text=3584, extra=byt5),
    "Kandinsky 5": Family("Kandinsky5Image", kandinsky, text=3584, pooled=768, small={"model_dim": 128}),
    "Wan 2.1": Family("WAN21_T2V", wan, text=4096),
    "Anima": Family("Anima", anima, text=128, small=SMALL_ANIMA, extra=t5_tokens),
}


def small_family(name: str):
    """A loaded MODEL of a family. To be called in inference mode."""
    family = FAMILIES[name]
    file = family.file()
    config = comfy.model_detection.model_config_from_unet(file, "")
    assert type(config).__name__ == family.kind
    config.unet_config |= family.small
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, device="cpu")
    if hasattr(base.diffusion_model, "llm_adapter"):
        adapter = base.diffusion_model.llm_adapter  # built in one size only, it reads 400 MB in every call
        base.diffusion_model.llm_adapter = type(adapter)(**SMALL_ADAPTER, **{**META, "device": CPU})
    draw_weights(base.diffusion_model, family.gain)
    model = comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)
    comfy.model_management.load_models_gpu([model])
    return model


LAST_LAYERS = (
    "final_layer.linear.weight",
    "final_linear.weight",
    "proj_out.weight",
    "head.head.weight",
    "out_layer.out_layer.weight",
)


def draw_weights(network: torch.nn.Module, gain: float) -> None:
    """Random weights under which the velocity changes slowly with the latent."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in [*network.named_parameters(), *network.named_buffers()]:
        if not weight.is_floating_point():
            continue
        value = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            value *= (0.2 if name in LAST_LAYERS else gain) * weight[0].numel() ** -0.5
        else:
            value = 0.02 * value + float(name.endswith(("scale", "norm.weight", "ln_q.weight", "ln_k.weight")))
        weight.data = value.to(weight.dtype)


def texts(name: str, seed: int, rows: int = 1, **options: Any) -> list:
    """A CONDITIONING as the family wants it."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    cond = torch.randn(rows, TOKENS, family.text, generator=generator)
    pooled = torch.randn(rows, family.pooled, generator=generator) if family.pooled else None
    options["pooled_output"] = pooled  # encoders without one say so
    if family.guided:
        options.setdefault("guidance", 3.5)
    return [[cond, {**family.extra(rows, generator), **options}]]


def picture(model, batch: int = 1, seed: int = 3) -> dict:
    """A LATENT of random values in the VAE's space, as its VAE Encode gives it."""
    form = model.get_model_object("latent_format")
    frame = (1,) if form.latent_dimensions == 3 else ()
    size = (batch, form.latent_channels, *frame, HEIGHT, WIDTH)
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return {"samples": model.model.process_latent_out(values)}
