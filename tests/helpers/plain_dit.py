"""The guidance gradient of a diffusion transformer twice: as the guided sampler gets it, and by ordinary autograd in float64."""

import contextlib

import comfy.model_management
import comfy.quant_ops
import comfy.samplers
import torch
from flow_families import FAMILIES, TOKENS, picture, small_family, texts
from joint_runs import FIRST_ROW, FIRST_WORD, evaluate_in_graph
from pix2pix_zero.attention_patches.joint import reading_calls
from pix2pix_zero.host.sampling.checks import framed
from pix2pix_zero.host.sampling.passes import UNetPasses
from pix2pix_zero.host.unet.jobs import for_own_sampler

SIGMA = 0.5
# Which calls of attention, in the order of the forward pass, read the text in the blocks: Lumina's begin with its refiners'.
READING = {name: [0, 1] for name in FAMILIES} | {
    "SD 3.5 Medium": [0, 2],  # the first block has a second attention, of the picture alone
    "Flux dev": [0, 1, 2, 3],
    "Flux schnell": [0, 1, 2, 3],
    "Flux 2": [0, 1, 2, 3],
    "Chroma": [0, 1, 2, 3],
    "AuraFlow": [0, 1, 2],
    "Lumina 2": [4, 5],
    "Z-Image": [4, 5],
    "Hunyuan-Image": [2, 3],  # after its text's own
    "Kandinsky 5": [2, 4],  # after its text's own
    "Wan 2.1": [1, 3],
    "Anima": [1, 3, 5, 7, 9, 11],
}


WORDS = {name: TOKENS for name in FAMILIES} | {"Anima": 6}  # it reads T5's tokens
QUERY_KEY_NORMS = tuple(f"norm_{name}.weight" for name in ("q", "k", "added_q", "added_k"))


def sharp_family(name):
    """A loaded MODEL of a family whose maps are not flat: small ones lose their digits in the difference of two maps."""
    model = small_family(name)
    for key, weight in model.model.diffusion_model.named_parameters():
        if key.endswith(QUERY_KEY_NORMS):
            weight.data = weight.data + 1.0
    return model


def latents(model, batch=1):
    """(source, edited) latents [B, C, H, W] of the model's space."""
    x = picture(model, batch)["samples"].reshape(batch, -1, *picture(model)["samples"].shape[-2:])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return x, x + 0.3 * noise


def guider_gradient(model, name, x_source, x, checkpointing=None, edited=None):
    """(gradient, distance) of all blocks, as the guided sampler gets them."""
    found = []

    def walk(model_k, noise, sigmas, extra_args, callback, disable):
        sites = reading_calls(model.model.diffusion_model)
        passes = UNetPasses(model_k, extra_args, sites, checkpointing)
        reference = passes.record_maps("source", x_source.clone(), SIGMA)
        found.extend(passes.map_gradient("positive", x.clone(), SIGMA, reference))
        return noise

    run_in_guider(model, name, walk, texts(name, 2) if edited is None else edited)
    return found


def run_in_guider(model, name, walk, edited):
    """`walk` as the sampler of a guider whose source is text 1 of the family."""
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(for_own_sampler(model))
        guider.inner_set_conds({"positive": edited, "negative": texts(name, 9), "source": texts(name, 1)})
        empty = torch.zeros_like(framed(latents(model)[0], model))
        guider.sample(empty, empty, comfy.samplers.KSAMPLER(walk), torch.tensor([SIGMA, 0.0]), seed=0)


class PlainDiT:
    """A float64 copy of ordinary tensors, differentiated by ordinary autograd without any means of the pack."""

    def __init__(self, name):
        self.name = name
        self.model = sharp_family(name)
        self.model.model.double().requires_grad_(False)
        dit = self.model.model.diffusion_model
        dit.dtype = torch.float64
        for module in dit.modules():
            if isinstance(module, torch.nn.RMSNorm) and module.eps is None:
                module.eps = torch.finfo(torch.float32).eps  # it stands for that of its input's precision
        if hasattr(dit, "patch_embedding"):  # Wan's is given fp32
            dit.patch_embedding.register_forward_pre_hook(lambda module, args: (args[0].double(),))

    def maps(self, x, text):
        """[B, heads, pixels, words] of each block, over the text's words alone."""
        maps = []

        def attend(func, q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **_):
            if not skip_reshape:
                q, k, v = (t.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
            maps.append((q, k))
            logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            if mask is not None:
                bias = (
                    mask if mask.dtype != torch.bool else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -1e9)
                )
                logits = logits + (bias if bias.ndim == 4 else bias.reshape(-1, 1, *bias.shape[-2:]))
            out = logits.softmax(-1) @ v
            return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

        options = {"transformer_options": {"optimized_attention_override": attend}}
        evaluate_in_graph(self.model, self.name, x, options, text)
        start, first = FIRST_ROW[self.name], FIRST_WORD[self.name]
        columns = [first + word for word in range(WORDS[self.name])]
        size = maps[READING[self.name][0]][0].shape[2] - start
        pixels = min(size, self.pixels(x))
        return [
            (q[:, :, start : start + pixels] @ k[:, :, columns].transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            for q, k in (maps[call] for call in READING[self.name])
        ]

    def pixels(self, x):
        patch = getattr(self.model.model.diffusion_model, "patch_size", None) or 2
        side = patch if isinstance(patch, int) else patch[-1]
        return (x.shape[-2] // side) * (x.shape[-1] // side)

    def gradient(self, x_source, x):
        """(gradient, distance)"""
        x = x.double().requires_grad_(True)
        with _differentiable(self.model.model.diffusion_model):
            with torch.no_grad():
                reference = self.maps(x_source.double(), texts(self.name, 1))
            maps = self.maps(x, texts(self.name, 2))
            distance = sum(((a - b) ** 2).sum((2, 3)).mean(1) for a, b in zip(maps, reference))
            return torch.autograd.grad(distance.sum(), x)[0], distance.detach()


@contextlib.contextmanager
def _differentiable(dit):
    """The host's own switch for training, and copies where its blocks would write over what autograd has saved."""
    entry = [getattr(dit, name) for name in ("img_in", "txt_in") if hasattr(dit, name)]
    handles = [module.register_forward_hook(lambda module, args, out: out.clone()) for module in entry]
    comfy.model_management.in_training = True
    kernel, comfy.quant_ops.ck.rms_rope_split_half = getattr(comfy.quant_ops.ck, "rms_rope_split_half", None), _rotated
    try:
        with torch.autograd.graph.allow_mutation_on_saved_tensors() if entry else contextlib.nullcontext():
            yield
    finally:
        comfy.model_management.in_training = False
        comfy.quant_ops.ck.rms_rope_split_half = kernel
        for handle in handles:
            handle.remove()


def _rotated(q, k, angles, q_scale, k_scale, eps):
    """Normalized, and turned by pairs of the first half and the second (Anima)."""

    def turn(x, scale):
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * scale
        first, second = x.chunk(2, -1)
        return torch.cat([angles[..., i, 0] * first + angles[..., i, 1] * second for i in (0, 1)], -1)

    return turn(q, q_scale), turn(k, k_scale)
