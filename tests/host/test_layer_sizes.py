"""How large the picture is at each layer of a UNet: one answer for maps, memory and Plug-and-Play, seen on a real call."""

import copy

import comfy.ops
import prompt_to_prompt_runs as prompted
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from pix2pix_zero.attention_patches.attention import layers, map_shapes, size_after
from pix2pix_zero.attention_patches.plug_and_play import residual_sites
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.nodes.attention_heatmap import Pix2PixZeroAttentionHeatmap
from pix2pix_zero.nodes.feature_pca import Pix2PixZeroFeaturePCA
from small_unet import CONFIG, CONTEXT_DIM, TOKENS

KINDS = {"convolutions resize": False, "residual blocks resize": True}
SIZES = [(8, 12), (16, 8)]


def unet_of(resblock_updown):
    settings = {**CONFIG, "channel_mult": (1, 2, 2), "num_res_blocks": [1, 1, 1], "transformer_depth": [1, 1, 1]}
    settings |= {"transformer_depth_output": [1, 1, 1, 1, 1, 1], "num_heads": 4, "num_head_channels": -1}
    return UNetModel(**settings, resblock_updown=resblock_updown, operations=comfy.ops.disable_weight_init)


@torch.inference_mode()
def seen_sizes(unet, size):
    """(height, width) of every layer's input in a call, by hooks."""
    seen, handles = [], []
    for layer in layers(unet):
        handles.append(
            layer.module.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
        )
    for parameter in unet.parameters():
        parameter.data.zero_()
    unet(torch.zeros(1, 4, *size), torch.zeros(1), context=torch.zeros(1, TOKENS, CONTEXT_DIM), transformer_options={})
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_as_large_as_a_call_makes_them(kind, size):
    unet = unet_of(KINDS[kind])
    found = list(layers(unet))
    assert [size_after(layer.halvings, size) for layer in found] == seen_sizes(unet, size)
    assert len({layer.halvings for layer in found}) == 3


def test_odd_sizes_are_as_a_call_makes_them():
    unet = unet_of(False)
    assert [size_after(layer.halvings, (7, 13)) for layer in layers(unet)] == seen_sizes(unet, (7, 13))


def test_maps_and_features_are_sized_alike_however_the_unet_resizes():
    plain, resizing = (unet_of(kind) for kind in KINDS.values())
    shapes = [list(map_shapes(unet, (8, 12)).values()) for unet in (plain, resizing)]
    assert shapes[0] == shapes[1]
    assert len(set(shapes[0])) == 3
    assert residual_sites(plain) == residual_sites(resizing), "a block that resizes is no site"


@pytest.mark.parametrize("ratio", [4, 64])
def test_pictures_are_as_large_as_the_models_latent_format_says(model, clip, run_node, ratio):
    of_another_size = copy.copy(model.model.latent_format)
    of_another_size.spacial_downscale_ratio = ratio
    patched = model.clone()
    patched.add_object_patch("latent_format", of_another_size)
    inversion, text = prompted.invert(patched, clip), prompted.encode(clip, prompted.SOURCE)
    with torch.inference_mode():
        _, area = sample_edit(patched, inversion, text, text, EditSettings(guidance_strength=0.0))
    given = {"model": [patched], "inversion": [inversion]}
    (heat,) = run_node(
        Pix2PixZeroAttentionHeatmap, **given, clip=[clip], caption=[prompted.SOURCE], words=["cat"],
        start_percent=[0.0], end_percent=[1.0], resolution=["all"],
    )  # fmt: skip
    (features,) = run_node(Pix2PixZeroFeaturePCA, model=patched, inversion=inversion, features="queries", percent=1.0)
    side = 8 * ratio
    assert area.shape == (1, side, side)
    assert features.shape[1:3] == (side, side)
    assert heat[0].shape[2] == max(side, 384), "heatmaps are enlarged until words can be read"
