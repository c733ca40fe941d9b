"""FlowEdit on transformers of the flow kind, each found by ComfyUI's own detection from a small state dict."""

import comfy.ldm.flux.model as flux_model
import comfy.model_detection
import comfy.model_patcher
import comfy.ops
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from pix2pix_zero.host.sampling.flow_edit import FlowEditing, flow_edit_latent

CPU = torch.device("cpu")
BUILD = dict(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
TEXT_WIDTH = 4096


def flux(guided: bool):
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in flux_model.FluxParams.__dataclass_fields__ else {}
    return flux_model.Flux(
        in_channels=16,
        out_channels=16,
        vec_in_dim=768,
        context_in_dim=TEXT_WIDTH,
        hidden_size=128,
        mlp_ratio=4.0,
        num_heads=1,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=guided,
        **newer,
        **BUILD,
    )


def sd3():
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": TEXT_WIDTH, "out_features": 128}}
    return OpenAISignatureMMDITWrapper(
        input_size=None,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        depth=2,
        adm_in_channels=2048,
        context_embedder_config=embedder,
        num_patches=1024,
        pos_embed_max_size=32,
        **BUILD,
    )


FAMILIES = {
    "Flux": (lambda: flux(True), 768),
    "FluxSchnell": (lambda: flux(False), 768),
    "SD3": (sd3, 2048),
}


def random_weights(state: dict) -> dict:
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, weight in state.items():
        value = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            drawn[name] = 0.7 * value * weight[0].numel() ** -0.5
        else:
            drawn[name] = 0.02 * value + float(name.endswith("scale"))
    return drawn


@torch.inference_mode()
def detected(family: str):
    """(a MODEL of a family, the width of its pooled texts)."""
    make, pooled_width = FAMILIES[family]
    state = random_weights(make().state_dict())
    config = comfy.model_detection.model_config_from_unet(state, "")
    assert type(config).__name__ == family
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(state, "", device="cpu")
    model.load_model_weights(state, "")
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU), pooled_width


def text(seed: int, pooled_width: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, pooled_width, generator=generator)
    return [[torch.randn(1, 12, TEXT_WIDTH, generator=generator), {"pooled_output": pooled, "guidance": 3.5}]]


@pytest.mark.works("FlowEdit")
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_flow_transformer_edits_and_gives_the_unedited_picture_back(family):
    model, width = detected(family)
    latent = {"samples": torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(1))}
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}

    def changed(target: list, negative: list | None = None, source_cfg: float = 1.0) -> float:
        settings = FlowEditing(steps=4, cfg=2.0, source_cfg=source_cfg)
        samples, area = flow_edit_latent(model, text(1, width), target, negative, latent, settings)
        assert samples.isfinite().all() and area.shape == (1, 64, 96)
        return float((samples - latent["samples"]).norm() / latent["samples"].norm())

    assert changed(text(1, width)) <= 1e-5
    assert changed(text(2, width)) > 0.01
    assert changed(text(2, width), text(3, width), source_cfg=1.5) > 0.01
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())
