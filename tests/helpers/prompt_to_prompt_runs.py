"""Prompt-to-Prompt by the node and a stock sampler on the small UNet, and what the attention layers saw."""

import comfy.samplers
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent, inverted_noise
from pix2pix_zero.nodes.prompt_to_prompt import Pix2PixZeroPromptToPrompt
from small_unet import latent

import nodes as host_nodes

SOURCE = "a cat on a sofa"
STEPS = 4
HEADS = 4
OFF = NoiseRegularization(steps=0)


def encode(clip, text):
    with torch.inference_mode():
        return host_nodes.CLIPTextEncode().encode(clip, text)[0]


def invert(model, clip, text=SOURCE, picture=None, method="ddim"):
    with torch.inference_mode():
        picture = picture or latent()
        return invert_latent(model, encode(clip, text), picture, InversionSettings(STEPS, 0, OFF, method, map_memory=0))


def patch(model, inversion, clip, target, source=SOURCE, cross=0.5, to_itself=0.5, **options):
    """(the patched MODEL, the encoded target), by the node."""
    with torch.inference_mode():
        node = Pix2PixZeroPromptToPrompt.execute(model, inversion, clip, source, target, cross, to_itself, **options)
    return node.result


def sample(model, inversion, positive, negative, cfg=2.0, sampler="euler", sigmas=None, callback=None):
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        noise = inverted_noise(inversion, model)
        sigmas = inversion.sigmas.flip(0) if sigmas is None else sigmas
        sampler = comfy.samplers.sampler_object(sampler)
        return guider.sample(torch.zeros_like(noise), noise, sampler, sigmas, callback=callback, seed=0)


def edit(model, inversion, clip, target, cfg=2.0, negative=None, **options):
    patched, positive = patch(model, inversion, clip, target, **options)
    return sample(patched, inversion, positive, negative or encode(clip, ""), cfg)


class Trace:
    """What every attention layer saw and gave in each UNet call, told by hooks on the layers' own projections."""

    def __init__(self, model):
        self.calls = []
        self.model = model.clone()
        theirs = model.model_options.get("model_function_wrapper")
        assert theirs is None

        def begin(apply_model, call):
            self.calls.append({"branches": call["cond_or_uncond"], "layers": {}, "x": call["input"].clone()})
            return apply_model(call["input"], call["timestep"], **call["c"])

        self.model.set_model_unet_function_wrapper(begin)

    def __enter__(self):
        self.handles = []
        for name, layer in attention_layers(self.model.model.diffusion_model):
            for part in ("to_q", "to_k", "to_v"):
                hook = self._keep(name, part)
                self.handles.append(getattr(layer, part).register_forward_hook(lambda m, a, out, hook=hook: hook(out)))
            hook = self._keep(name, "out")
            self.handles.append(layer.to_out[0].register_forward_pre_hook(lambda m, args, hook=hook: hook(args[0])))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _keep(self, name, part):
        def keep(tensor):
            self.calls[-1]["layers"].setdefault(name, {})[part] = tensor.clone()

        return keep

    def steps(self):
        """(source call or None, edit call) of each step."""
        pairs, source = [], None
        for call in self.calls:
            if len(call["branches"]) == 1:
                source = call
            else:
                pairs.append((source, call))
                source = None
        return pairs


def attention_layers(unet):
    """((block, number, index, "attn1" or "attn2"), layer)."""
    groups = (("input", unet.input_blocks), ("middle", [unet.middle_block]), ("output", unet.output_blocks))
    for name, blocks in groups:
        for number, block in enumerate(blocks):
            for transformer in (layer for layer in block if isinstance(layer, SpatialTransformer)):
                for index, inner in enumerate(transformer.transformer_blocks):
                    yield (name, number, index, "attn1"), inner.attn1
                    yield (name, number, index, "attn2"), inner.attn2


def by_head(t):
    return t.double().unflatten(-1, (HEADS, -1)).transpose(1, 2)


def maps_of(q, k):
    q, k = by_head(q), by_head(k)
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def apply_maps(maps, v):
    return (maps @ by_head(v)).transpose(1, 2).flatten(2)


def branch(call, name, part, index):
    tensor = call["layers"][name][part]
    return tensor.chunk(len(call["branches"]))[call["branches"].index(index)]
