"""Plug-and-Play as a user wires it, on the small UNet, and recorders of what the UNet went on with."""

import contextlib

import comfy.ldm.modules.attention
import torch
from comfy_extras import nodes_custom_sampler as stock
from pix2pix_zero.attention_patches.plug_and_play import feature_site
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent, inverted_noise
from pix2pix_zero.nodes.plug_and_play import Pix2PixZeroPlugAndPlay
from small_unet import NARROW, SHALLOW, conditioning, latent, small_model

STEPS = 5
OFF = NoiseRegularization(steps=0)
SITES = [(number, 0) for number in (1, 2, 3)]  # of the small UNet's decoder attention, from its feature block on
# One transformer at each of them, and little besides.
CONFIG = {**SHALLOW, **NARROW, "transformer_depth_output": [1, 1, 1, 1]}


@torch.inference_mode()
def invert(model, picture=None, positive=None, steps=STEPS):
    return invert_latent(
        model, positive or conditioning(), picture or latent(), InversionSettings(steps, 0, OFF, "ddim")
    )


@torch.inference_mode()
def patch(model, inversion, feature_until=1.0, attention_until=1.0, negative_alpha=1.0):
    return Pix2PixZeroPlugAndPlay.execute(model, inversion, feature_until, attention_until, negative_alpha).result[0]


@torch.inference_mode()
def sample(model, inversion, positive=None, negative=None, cfg=2.0, sampler="euler", noise=None, sigmas=None):
    """As a user wires it: the inversion's noise and sigmas into SamplerCustomAdvanced, with DisableNoise."""
    noise = {"samples": inverted_noise(inversion, model) if noise is None else noise}
    positive, negative = positive or conditioning(seed=1), negative or conditioning(seed=2)
    (guider,) = stock.CFGGuider.execute(model, positive, negative, cfg).result
    (nothing,) = stock.DisableNoise.execute().result
    (sampler,) = stock.KSamplerSelect.execute(sampler).result
    sigmas = inversion.sigmas.flip(0) if sigmas is None else sigmas
    return stock.SamplerCustomAdvanced.execute(nothing, guider, sampler, sigmas, noise).result[0]["samples"]


class Recorder:
    """What the UNet went on with in each of its calls: `branch` [rows, C, H, W], `q` and `k` by decoder block."""

    def __init__(self):
        self.calls = []

    @contextlib.contextmanager
    def recording(self, unet):
        """By forward hooks alone. A residual block's branch is what it returned less its skip."""
        site = feature_site(unet)
        block = unet.output_blocks[site.number][site.index]
        handles = [
            unet.register_forward_pre_hook(lambda module, args: self.calls.append({})),
            block.register_forward_hook(
                lambda module, args, out: self.calls[-1].update(branch=out - module.skip_connection(args[0]))
            ),
        ]
        for number, index in SITES:
            attention = unet.output_blocks[number][1].transformer_blocks[index].attn1
            for name, layer in (("q", attention.to_q), ("k", attention.to_k), ("own v", attention.to_v)):
                handles.append(layer.register_forward_hook(self._keep((name, number))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name):
        return lambda module, args, out: self.calls[-1].setdefault(name, out)

    def patch(self, model):
        """Another pack's attn1 replace patches, which see the q and k that attention goes on with."""
        model = model.clone()

        def replace(number, index):
            def attend(q, k, v, extra_options):
                if extra_options["block_index"] == index:
                    self.calls[-1].update({("q", number): q, ("k", number): k, ("v", number): v})
                return comfy.ldm.modules.attention.attention_basic(q, k, v, extra_options["n_heads"])

            return attend

        for number, index in SITES:
            model.set_model_attn1_replace(replace(number, index), "output", number)
        return model


@torch.inference_mode()
def source_features(inversion, level, text, crop=slice(None), **extra):
    """The features of a fresh copy of the model at a latent of the trajectory."""
    fresh = small_model().model
    recorder = Recorder()
    x = inversion.trajectory[level][..., crop]
    with recorder.recording(fresh.diffusion_model):
        t = inversion.sigmas[level].repeat(len(x))
        fresh.apply_model(x, t, c_crossattn=text.expand(len(x), -1, -1), transformer_options={}, **extra)
    return without_values(recorder.calls[0])


def without_values(call):
    return {name: tensor for name, tensor in call.items() if name[0] != "own v"}


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.inference_mode()
def edited_calls(model, inversion, rows, positive=None, cfg=2.0, **windows):
    """The recorded UNet calls of the edit, without those of the source, which have a batch of their own."""
    recorder = Recorder()
    patched = patch(recorder.patch(model), inversion, **windows)
    with recorder.recording(model.model.diffusion_model):
        sample(patched, inversion, positive, cfg=cfg)
    return [call for call in recorder.calls if len(call.get("branch", ())) == rows]
