"""The guidance gradient twice: as the guided sampler gets it, and by ordinary autograd on a float64 copy of the weights."""

import comfy.samplers
import torch
from pix2pix_zero.attention_patches.attention import cross_attention_sites
from pix2pix_zero.host.sampling.passes import UNetPasses
from pix2pix_zero.host.unet.jobs import for_own_sampler
from small_unet import CONFIG, conditioning, small_model

TIMESTEP = 500


def sigma_of(model) -> float:
    return float(model.model.model_sampling.sigmas[TIMESTEP])


def attention(q, k, v, heads):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    maps = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return maps, (maps @ v).transpose(1, 2).flatten(2)


def guider_gradient(model, positive, x_source, x, source=None, sites=None, checkpointing=None):
    """(gradient, distance) as the guided sampler gets them. `sites`: all cross-attentions if None."""
    sigma = sigma_of(model)
    found = []

    def walk(model_k, noise, sigmas, extra_args, callback, disable):
        passes = UNetPasses(
            model_k, extra_args, sites or cross_attention_sites(model.model.diffusion_model), checkpointing
        )
        reference = passes.record_maps("source", x_source.clone(), sigma)
        found.extend(passes.map_gradient("positive", x.clone(), sigma, reference))
        return noise

    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(for_own_sampler(model))
        guider.inner_set_conds(
            {"positive": positive, "negative": conditioning(seed=9), "source": source or conditioning()}
        )
        empty = torch.zeros_like(x)
        guider.sample(empty, empty, comfy.samplers.KSAMPLER(walk), torch.tensor([sigma, 0.0]), seed=0)
    return found


class PlainUNet:
    """A float64 copy of ordinary tensors, differentiated by ordinary autograd; nothing of this pack is used."""

    def __init__(self, model, patches=None, foreign=None, control=None, weights=None):
        self.unet = small_model(weight_dtype=torch.float64).model.diffusion_model
        weights = weights or model.model.diffusion_model.state_dict()
        self.unet.load_state_dict({name: weight.clone().double() for name, weight in weights.items()})
        self.scale = (1 + sigma_of(model) ** 2) ** 0.5
        self.patches = patches or {}
        self.foreign = foreign or {}
        self.control = control
        depths = [*CONFIG["transformer_depth"], *CONFIG["transformer_depth_output"]]
        self.sites = sum(depths) + CONFIG["transformer_depth_middle"]

    def maps(self, x, text):
        maps = []

        def attend(q, k, v, options):
            probabilities, out = attention(q, k, v, options["n_heads"])
            maps.append(probabilities)
            site = (*options["block"], options["block_index"])
            return self.foreign[site](q, k, v, options) if site in self.foreign else out

        blocks = [("middle", 0), *((name, number) for name in ("input", "output") for number in range(8))]
        options = {
            "patches": {**self.patches, "input_block_patch_after_skip": [lambda h, _: h.clone()]},
            "patches_replace": {"attn2": dict.fromkeys(blocks, attend)},
            "optimized_attention_override": lambda func, q, k, v, heads, **_: attention(q, k, v, heads)[1],
        }
        control = self.control and {key: [t.double() for t in values] for key, values in self.control.items()}
        timestep = torch.full((len(x),), float(TIMESTEP), dtype=torch.float64)
        self.unet(x / self.scale, timestep, context=text.double(), control=control, transformer_options=options)
        assert len(maps) == self.sites
        return maps

    def gradient(self, text, x_source, x, source_text=None, tokens=None):
        """(gradient, distance). `tokens`: of the maps only so many columns are compared, scaled to sum to 1."""

        def shares(maps):
            return [part / part.sum(-1, keepdim=True) for part in (m[..., :tokens] for m in maps)]

        x = x.double().requires_grad_(True)
        source_text = conditioning()[0][0] if source_text is None else source_text
        with torch.no_grad():
            reference = self.maps(x_source.double(), source_text.expand(len(x), -1, -1))
        maps = self.maps(x, text.expand(len(x), -1, -1))
        distance = sum(((a - b) ** 2).sum((2, 3)).mean(1) for a, b in zip(shares(maps), shares(reference)))
        return torch.autograd.grad(distance.sum(), x)[0], distance.detach()


def assert_same_gradient(ours, theirs):
    (gradient, distance), (expected, expected_distance) = ours, theirs
    assert expected.abs().max() > 0
    assert float((gradient - expected).norm() / expected.norm()) <= 5e-5
    torch.testing.assert_close(distance.double(), expected_distance, rtol=1e-5, atol=0)
