"""Pictures of the features that the decoder computes for an inverted picture."""

import comfy.samplers
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from einops import rearrange

from ...attention_patches.plug_and_play import Site, feature_site, residual_sites, self_attention_sites
from ...editing.principal_components import as_colours, principal_components
from ...editing.trajectory import Inversion
from ..methods.plug_and_play import read_features
from ..running import Run, look
from ..sampling.checks import BROKEN, check_finite, check_inversion, pixels_per_latent
from ..unet.jobs import for_own_sampler

KINDS = ("residual features", "queries", "keys", "values")


@torch.inference_mode()
def feature_pictures(
    model: ModelPatcher, inversion: Inversion, kind: str, percent: float, decoder_block: int = -1
) -> torch.Tensor:
    """The first three principal components of decoder features as colours: IMAGE of the picture's size, in 0..1.

    `kind`: one of `KINDS`. `percent`: when, as part of the sampling in 0..1. `decoder_block`: a number of ComfyUI's
    output blocks, or -1 for the one of `feature_site`. All pictures of the inversion share their colours. Raises
    ValueError if the inversion was made with another model, or the block has no such features.
    """
    check_inversion(inversion, model)
    residual, site = _sites(model.model.diffusion_model, kind, decoder_block)
    features = features_of_inversion(model, inversion, [residual, site], percent)
    height, width = features[residual][0].shape[2:]
    if kind == KINDS[0]:
        tensor = rearrange(features[residual][0], "b c h w -> b (h w) c")
    else:
        tensor = features[site][KINDS.index(kind) - 1]
    check_finite(tensor, "model", BROKEN)
    if tensor.shape[1] != height * width:
        raise ValueError(
            f"model: another node's patch gives its self-attention {tensor.shape[1]} {kind} for {height}x{width} places, which "
            f"are no picture any more. Take it out, or choose {KINDS[0]}."
        )
    colours = as_colours(principal_components(rearrange(tensor, "b n c -> (b n) c")))
    pictures = rearrange(colours, "(b h w) c -> b c h w", h=height, w=width)
    size = [pixels_per_latent(model) * side for side in inversion.trajectory.shape[-2:]]
    return F.interpolate(pictures, size=size, mode="nearest").movedim(1, -1)


def _sites(unet: torch.nn.Module, kind: str, decoder_block: int) -> tuple[Site, Site]:
    """The residual block of a decoder block, which tells the size, and the site of the features."""
    residuals = {site.number: site for site in residual_sites(unet)}
    number = feature_site(unet).number if decoder_block == -1 else decoder_block
    if number not in residuals:
        raise ValueError(f"decoder_block: {number} is not one of this model's, 0 to {max(residuals)}.")
    if kind == KINDS[0]:
        return residuals[number], residuals[number]
    attention = {site.number: site for site in self_attention_sites(unet)}  # the last of a block's counts
    if number not in attention:
        having = ", ".join(map(str, attention))
        raise ValueError(f"decoder_block: {number} has no self-attention in this model. Those that have: {having}.")
    return residuals[number], attention[number]


def features_of_inversion(
    model: ModelPatcher, inversion: Inversion, sites: list[Site], percent: float
) -> dict[Site, tuple[torch.Tensor, ...]]:
    """What the UNet computes at `sites` for the inverted pictures and their text, on the CPU, see `tapped`.

    `sites`: in the order of the forward pass. `percent`: of the sampling, 0..1; the noise level is kept within the
    inversion's. An area of the text counts for the whole picture.
    """
    lowest, highest = inversion.sigmas[[1, -1]].tolist()
    sigma = min(max(float(model.get_model_object("model_sampling").percent_to_sigma(percent)), lowest), highest)

    def read(run: Run) -> dict[Site, tuple[torch.Tensor, ...]]:
        entries = [{k: v for k, v in entry.items() if k != "area"} for entry in run.guider.conds["positive"]]
        x = inversion.latent_at(sigma).to(run.x)
        features = read_features(run.guider.inner_model, entries, x, sigma, sites, run.model_options)
        return {site: tuple(tensor.cpu() for tensor in tensors) for site, tensors in features.items()}

    guider = comfy.samplers.CFGGuider(for_own_sampler(model))
    guider.inner_set_conds({"positive": inversion.source})
    return look(guider, read, model.model.process_latent_out(inversion.latent(0)), torch.tensor([sigma, 0.0]))
