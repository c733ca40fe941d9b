"""What diffusion transformers attend with, seen from outside: by an override of another pack."""

from dataclasses import dataclass, field

import torch
from comfy.sampler_helpers import convert_cond
from comfy.samplers import calc_cond_batch, process_conds
from flow_families import FAMILIES, TOKENS, texts
from pix2pix_zero.host.sampling.checks import framed


def noted(monkeypatch, module, name):
    """What a function returns from now on."""
    function, results = getattr(module, name), []

    def noting(*args, **options):
        results.append(function(*args, **options))
        return results[-1]

    monkeypatch.setattr(module, name, noting)
    return results


@dataclass
class Seen:
    """An override of attention that keeps what it is called with: (q, k, v, output), all [B, rows, heads*d], and the heads."""

    calls: list[tuple] = field(default_factory=list)

    def __call__(self, func, q, k, v, *args, **options):
        out = func(q, k, v, *args, **options)
        by_head = options.get("skip_reshape")
        flat = [tensor.transpose(1, 2).flatten(2) if by_head else tensor.flatten(2) for tensor in (q, k, v)]
        heads = args[0] if args else options["heads"]
        self.calls.append((*(tensor.clone() for tensor in flat), out.clone(), heads))
        return out

    def patch(self, model):
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = self
        return model


# The first of the picture's rows in the first block's attention; small latents are 4 x 6 patches, or 8 x 12.
FIRST_ROW = {name: TOKENS for name in FAMILIES} | {
    "Flux 2": 512,  # its texts are padded in front
    "AuraFlow": 8 + TOKENS,
    "Z-Image": 32,
    "HiDream": 0,
    "Hunyuan-Image": TOKENS + 4,  # the text of byt5 has four
    "Kandinsky 5": 0,
    "Wan 2.1": 0,
    "Anima": 0,
}
# The first of the text's among the keys that the picture reads.
FIRST_WORD = {name: 0 for name in FAMILIES} | {"Flux 2": 512 - TOKENS, "AuraFlow": 8, "HiDream": 24}
PATCH = {name: 2 for name in FAMILIES} | {"Flux 2": 1, "Hunyuan-Image": 1}


@torch.inference_mode()
def evaluate(model, name, latent, options, text=None, sigma=0.5):
    """One evaluation of a MODEL at latents [B, C, H, W], as samplers make it, under some model options."""
    return evaluate_in_graph(model, name, latent, options, text, sigma)


def evaluate_in_graph(model, name, latent, options, text=None, sigma=0.5):
    """The same outside inference mode, to be differentiated."""
    x = framed(latent, model)
    text = texts(name, 1) if text is None else text
    conds = {"positive": convert_cond(text)}
    model.model.current_patcher = model
    entries = process_conds(model.model, torch.zeros_like(x), conds, x.device, x, seed=0)["positive"]
    return calc_cond_batch(model.model, [entries], x, torch.full((len(x),), sigma), options)[0]
