"""A model's features in its calls (Plug-and-Play, Tumanyan et al., CVPR 2023, section 4).

Sites are counted on the model at hand. A UNet has features and self-attention in its decoder, whose family may be any that
ComfyUI's UNetModel can be; a diffusion transformer has what its early blocks' attention gives, and keys and values.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from einops import rearrange

from .attention import AttentionSite, is_unet, joined, layers, with_attention
from .joint import Attention, JointSite, early_sites, holding_sites, with_joint_attention

# In latent pixels a side: SD 1.x's block 4 of its output blocks, which the paper chose, and SDXL's block 1.
FEATURE_STRIDE = 4


class ResidualSite(NamedTuple):
    """What a residual block of the decoder adds to its input: module `index` of `output_blocks[number]`."""

    number: int
    index: int


class OutputSite(NamedTuple):
    """What the attention of a diffusion transformer's block gives the picture."""

    attention: JointSite


Site = ResidualSite | AttentionSite | OutputSite | JointSite
Visit = Callable[[Site, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]


def residual_sites(unet: torch.nn.Module) -> list[ResidualSite]:
    """The residual blocks of the decoder in the order of the forward pass. Raises ValueError for other models."""
    return [site for site, _ in _residual_sites_and_strides(unet)]


def feature_site(unet: torch.nn.Module) -> ResidualSite:
    """The block whose features carry layout but not appearance: the second of those with `FEATURE_STRIDE`.

    A UNet that does not go down so far has it at its coarsest. Raises ValueError for a model that is no UNet.
    """
    blocks = _residual_sites_and_strides(unet)
    stride = max(stride for _, stride in blocks if stride <= FEATURE_STRIDE)
    coarse = [site for site, of_site in blocks if of_site == stride]
    return coarse[min(1, len(coarse) - 1)]


def self_attention_sites(unet: torch.nn.Module, first_block: int = 0) -> list[AttentionSite]:
    """The self-attentions of the decoder from `output_blocks[first_block]` on, in the order of the forward pass.

    Raises ValueError for a model that is no UNet.
    """
    _check(unet)
    return [
        AttentionSite("output", layer.number, index)
        for layer in layers(unet)
        if layer.block == "output" and layer.number >= first_block and isinstance(layer.module, SpatialTransformer)
        for index, transformer in enumerate(layer.module.transformer_blocks)
        if not transformer.disable_self_attn
    ]


def _residual_sites_and_strides(unet: torch.nn.Module) -> list[tuple[ResidualSite, int]]:
    """With each site the latent pixels, along a side, that one of its own pixels stands for."""
    _check(unet)
    return [
        (ResidualSite(layer.number, layer.index), 2**layer.halvings)
        for layer in layers(unet)
        if layer.block == "output" and isinstance(layer.module, ResBlock) and not layer.module.updown
    ]


def _check(unet: torch.nn.Module) -> None:
    if not is_unet(unet):
        raise ValueError(
            "model: it is not a UNet, so it has no decoder whose features could be read. "
            "Use an SD 1.x, SD 2.x or SDXL model."
        )


def source_sites(model: torch.nn.Module) -> tuple[list[Site], list[Site]]:
    """(sites of features, sites of attention) at which a picture's layout is put into a diffusion model.

    Each in the order of the forward pass. Raises ValueError for a model of unknown class.
    """
    if is_unet(model):
        residual = feature_site(model)
        return [residual], self_attention_sites(model, residual.number)
    return joint_source_sites(model, holding_sites(model))


def joint_source_sites(dit: torch.nn.Module, holding: list[JointSite]) -> tuple[list[Site], list[Site]]:
    """The same of a diffusion transformer, with the blocks that hold its layout."""
    return [OutputSite(site) for site in early_sites(dit, holding)], holding


@contextlib.contextmanager
def tapped(call, sites: Iterable[Site], visit: Visit, transformer_options: dict) -> Iterator[dict]:
    """While active, the model goes on with what `visit(site, tensors)` returns in place of the tensors it is given.

    They are, at a `ResidualSite`, the output of the second convolution [B, C, H, W], ahead of the skip's addition; at
    an `AttentionSite` the self-attention's q, k and v [B, H*W, heads*d]; at an `OutputSite` the attention's output and at a
    `JointSite` its k and v, of the picture's rows alone [B, rows, heads*d]. Yields the transformer options to call the
    model with. Nothing stays on it afterwards; a replace patch or an override of another pack still computes the attention.
    """
    sites = list(sites)
    model = call.model.diffusion_model
    with contextlib.ExitStack() as stack:
        for site in sites:
            if isinstance(site, ResidualSite):
                convolution = model.output_blocks[site.number][site.index].out_layers[-1]
                stack.enter_context(convolution.register_forward_hook(partial(_visit_output, visit, site)))

        def attend(site, attention, q, k, v, options):
            return attention(*visit(site, (q, k, v)), options)

        attending = [site for site in sites if isinstance(site, AttentionSite)]
        if attending:
            transformer_options = with_attention(transformer_options, "attn1", attending, attend)
        joint = {getattr(site, "attention", site) for site in sites if isinstance(site, (JointSite, OutputSite))}
        if joint:
            taps = with_joint_attention(call, joint, _PictureRows(visit, sites).attend, transformer_options)
            transformer_options = stack.enter_context(taps)
        yield transformer_options


def _visit_output(visit: Visit, site: ResidualSite, module, args, output: torch.Tensor) -> torch.Tensor:
    (output,) = visit(site, (output,))
    return output


@dataclass
class _PictureRows:
    """What `visit` is shown of a diffusion transformer's attention at some sites."""

    visit: Visit
    sites: Collection[Site]

    def attend(self, site: JointSite, attention: Attention, q, k, v) -> torch.Tensor:
        here = attention.picture
        if site in self.sites:
            taken = self.visit(site, tuple(joined(tensor[:, :, here]) for tensor in (k, v)))
            k, v = (
                _with_rows(
                    tensor, (slice(None), slice(None), here), rearrange(new, "b n (h d) -> b h n d", h=len(tensor[0]))
                )
                for tensor, new in zip((k, v), taken)
            )
        out = attention(q, k, v)
        if OutputSite(site) in self.sites:
            (taken,) = self.visit(OutputSite(site), (out[:, here],))
            out = _with_rows(out, (slice(None), here), taken)
        return out


def _with_rows(tensor: torch.Tensor, here: tuple[slice, ...], rows: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[here] = rows.to(tensor)
    return tensor
