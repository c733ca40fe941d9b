"""What other nodes and packs put into a MODEL or a CONDITIONING, one entry each, for the small UNet of `small_unet`.

Every entry keeps its own tensors in fp32 and works in the dtype it is called in, so that it runs on a float64 model too.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import comfy.cldm.cldm
import comfy.controlnet
import comfy.gligen
import comfy.hooks
import comfy.lora
import comfy.model_patcher
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP
from small_unet import CONFIG, CONTEXT_DIM, conditioning, small_model

import nodes as core

IMAGE = (8, 12)  # latent pixels that the pictures of the entries below are for


@dataclass(frozen=True)
class Patch:
    """`model`: MODEL to patched clone. `texts`: (CONDITIONING, "positive" or "negative") to what is sampled with.

    `rough`: part of it works in fp32 wherever it runs.
    """

    model: Callable = lambda model: model
    texts: Callable = lambda texts, branch: texts
    rough: bool = False


def with_extras(texts: list, **extras) -> list:
    return [[text, {**options, **extras}] for text, options in texts]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def core_extra(module: str, name: str, *arguments) -> Callable:
    """A node of ComfyUI's own extras as a patch; `arguments` come after the model."""

    def patch(model):
        node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
        if hasattr(node, "execute"):
            output = node.execute(model, *arguments)
            return getattr(output, "result", output)[0]
        return getattr(node(), node.FUNCTION)(model, *arguments)[0]

    return patch


def patched(*setters: tuple) -> Callable:
    """("name of a ModelPatcher's method", its arguments) in turn, on a clone."""

    def patch(model):
        model = model.clone()
        for name, *arguments in setters:
            getattr(model, name)(*arguments)
        return model

    return patch


def lora_tensors(model) -> dict:
    tensors = {}
    for seed, (name, weight) in enumerate(model.model.diffusion_model.state_dict().items()):
        if ".attn2.to_" in name and weight.ndim == 2 or name.endswith("attn1.to_q.weight"):
            key = "diffusion_model." + name.removesuffix(".weight")
            tensors[f"{key}.lora_up.weight"] = random(weight.shape[0], 4, seed=seed, scale=0.1)
            tensors[f"{key}.lora_down.weight"] = random(4, weight.shape[1], seed=seed + 1, scale=0.1)
    return tensors


def merged_lora(model):
    patched = model.clone()
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patched.add_patches(comfy.lora.load_lora(lora_tensors(model), keys), 0.7)
    return patched


@functools.cache
def _lora_for(config: str) -> dict:
    """Of a small UNet with the settings of now."""
    return lora_tensors(small_model())


def lora_hooks(*keyframes: tuple[float, float]) -> comfy.hooks.HookGroup:
    """A LoRA as a hook. `keyframes`: (strength, start percent)."""
    hooks = comfy.hooks.create_hook_lora(lora=_lora_for(repr(CONFIG)), strength_model=1.0, strength_clip=0.0)
    group = comfy.hooks.HookKeyframeGroup()
    for strength, start in keyframes:
        group.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(group)
    return hooks


def hooked(*keyframes: tuple[float, float]) -> Callable:
    def patch(texts: list, branch: str) -> list:
        return comfy.hooks.set_hooks_for_conditioning(texts, lora_hooks(*keyframes))

    return patch


class PictureAttention:
    """As image-prompt packs replace cross-attention: other keys and values for each half, told by `cond_or_uncond`."""

    def __call__(self, q, k, v, options):
        heads, branches = options["n_heads"], options["cond_or_uncond"]
        rows = len(q) // len(branches)
        tokens = {branch: random(1, 4, q.shape[-1], seed=5 + branch) for branch in branches}
        picture = torch.cat([tokens[branch].expand(rows, -1, -1) for branch in branches]).to(q)
        out = attention_pytorch(q, k, v, heads)
        return out + 0.5 * attention_pytorch(q, picture, picture.flip(1), heads)


def appended_tokens(n, context, value, options):
    """An attn2 patch that gives the text more tokens."""
    more = random(1, 4, CONTEXT_DIM, seed=6).expand(len(context), -1, -1).to(context)
    return n, torch.cat([context, more], 1), torch.cat([value, more], 1)


class Tiles:
    """HyperTile's pair of self-attention patches, with all that is left to chance decided."""

    def cut(self, q, k, v, options):
        self.rows = len(q)
        return (t.unflatten(1, (2, -1)).flatten(0, 1) for t in (q, k, v))

    def join(self, out, options):
        return out.unflatten(0, (self.rows, 2)).flatten(1, 2)

    def __call__(self, model):
        return patched(("set_model_attn1_patch", self.cut), ("set_model_attn1_output_patch", self.join))(model)


def raised_contrast(args):
    """A sampler_cfg_function."""
    cond, uncond, scale = args["cond"], args["uncond"], args["cond_scale"]
    return (uncond + scale * (cond - uncond)) * 1.05


def swapped_and_scaled(args):
    """A pre-CFG function."""
    cond, uncond = args["conds_out"]
    return [cond * 0.9 + 0.1 * args["input"], uncond]


def sharpened(args):
    """A post-CFG function."""
    return args["denoised"] + 0.1 * (args["cond_denoised"] - args["uncond_denoised"])


def function_wrapper(apply_model, args):
    """A model_function_wrapper."""
    return 0.9 * apply_model(args["input"], args["timestep"], **args["c"]) + 0.1 * args["input"]


def around_unet(executor, x, timesteps, context=None, y=None, control=None, transformer_options={}, **kwargs):
    """A wrapper around the diffusion model: it marks the options, which an attention patch of its pack reads."""
    options = {**transformer_options, "mark": 1.1}
    return executor(x, timesteps, context, y, control, options, **kwargs) * 0.95


def reads_mark(q, k, v, options):
    return q * options["mark"], k, v


def around_apply(executor, x, *args, **kwargs):
    return executor(x, *args, **kwargs) * 0.95


def added_wrappers(model):
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", around_unet)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", around_apply)
    model.set_model_attn1_patch(reads_mark)
    return model


def half_size(model):
    """Kohya's Deep Shrink, in all steps."""
    return core_extra(
        "nodes_model_downscale", "PatchModelAddDownscale", 2, 2.0, 0.0, 1.0, True, "bilinear", "bilinear"
    )(model)


def _filled(module: torch.nn.Module, scale: float = 0.5) -> torch.nn.Module:
    """Random weights for a module of any kind."""
    for seed, parameter in enumerate(module.parameters()):
        size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data = random(*parameter.shape, seed=seed, scale=scale * size)
    return module


def control_net(texts: list, branch: str) -> list:
    """ComfyUI's ControlNet on both texts, by its node."""
    config = {name: value for name, value in CONFIG.items() if name not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(
        hint_channels=3, num_heads=4, device="cpu", operations=comfy.ops.manual_cast, **config
    )
    control = comfy.controlnet.ControlNet(_filled(network, 1.0), load_device=torch.device("cpu"))
    return _controlled(control, texts)


class _Adapter(torch.nn.Module):
    unshuffle_amount = 8

    def __init__(self):
        super().__init__()
        channels = CONFIG["model_channels"]
        self.first = torch.nn.Conv2d(192, channels, 3, padding=1)
        self.second = torch.nn.Conv2d(channels, 2 * channels, 3, 2, 1)

    def forward(self, x):
        fine = self.first(F.pixel_unshuffle(x, 8))
        coarse = self.second(fine)
        return {"input": [coarse, None, fine, None]}  # taken from the end


def t2i_adapter(texts: list, branch: str) -> list:
    return _controlled(comfy.controlnet.T2IAdapter(_filled(_Adapter(), 2.0), 3, 8, "bilinear"), texts)


def _controlled(control, texts: list) -> list:
    hint = torch.rand(1, IMAGE[0] * 8, IMAGE[1] * 8, 3, generator=torch.Generator().manual_seed(7))
    (texts,) = core.ControlNetApply().apply_controlnet(texts, control, hint, 1.0)
    return with_extras(texts, control_apply_to_uncond=False)


def gligen(texts: list, branch: str) -> list:
    """A text for a box, by its module at each spatial transformer of the UNet."""
    if branch == "negative":
        return texts
    channels, depths = CONFIG["model_channels"], [*CONFIG["transformer_depth"], CONFIG["transformer_depth_middle"]]
    depths += reversed(CONFIG["transformer_depth_output"])
    places = [channels, *[2 * channels] * 4, channels, channels]  # where it may have spatial transformers
    widths = [width for width, depth in zip(places, depths, strict=True) if depth]
    modules = [comfy.gligen.GatedSelfAttentionDense(width, CONTEXT_DIM, 4, width // 4) for width in widths]
    for module in modules:
        module.register_forward_pre_hook(lambda module, args: module.to(args[0].dtype) and None)
    model = _filled(comfy.gligen.Gligen(modules, comfy.gligen.PositionNet(CONTEXT_DIM, CONTEXT_DIM), CONTEXT_DIM), 1.0)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    box = (random(1, CONTEXT_DIM, seed=8), 4, 6, 1, 2)  # text, height, width, y, x
    return with_extras(texts, gligen=("position", patcher, [box]))


def left_half() -> torch.Tensor:
    mask = torch.zeros(1, *IMAGE)
    mask[..., : IMAGE[1] // 2] = 1.0
    return mask


def shifted(texts: list, seed: int) -> list:
    return [[text + random(*text.shape, seed=seed), options] for text, options in texts]


def combined(texts: list, branch: str) -> list:
    return core.ConditioningCombine().combine(texts, shifted(texts, 20))[0]


def concatenated(texts: list, branch: str) -> list:
    return core.ConditioningConcat().concat(texts, shifted(texts, 21))[0]


def averaged(texts: list, branch: str) -> list:
    return core.ConditioningAverage().addWeighted(texts, shifted(texts, 22), 0.6)[0]


def regional(texts: list, branch: str) -> list:
    (part,) = core.ConditioningSetArea().append(shifted(texts, 23), 48, 48, 32, 16, 0.8)
    return [*texts, *part]


def masked(texts: list, branch: str) -> list:
    left, right = left_half(), 1 - left_half()
    (one,) = core.ConditioningSetMask().append(texts, left, "default", 1.0)
    (other,) = core.ConditioningSetMask().append(shifted(texts, 24), right, "default", 1.0)
    return [*one, *other]


def masked_to_bounds(texts: list, branch: str) -> list:
    (part,) = core.ConditioningSetMask().append(shifted(texts, 25), left_half(), "mask bounds", 1.0)
    return [*texts, *part]


def timed(texts: list, branch: str) -> list:
    (early,) = core.ConditioningSetTimestepRange().set_range(texts, 0.0, 0.5)
    (late,) = core.ConditioningSetTimestepRange().set_range(shifted(texts, 26), 0.5, 1.0)
    return [*early, *late]


def unequal(texts: list, branch: str) -> list:
    """Two texts of which one is twice as long: the host repeats the other in its batches."""
    return [*texts, *concatenated(shifted(texts, 27), branch)]


def long_negative(texts: list, branch: str) -> list:
    return concatenated(texts, branch) if branch == "negative" else texts


MODEL_PATCHES = {
    "merged LoRA": Patch(merged_lora),
    "image-prompt attention": Patch(
        patched(*[("set_model_attn2_replace", PictureAttention(), name, number) for name, number in
                  (("middle", 0), ("output", 0), ("output", 1))])
    ),
    "appended tokens": Patch(patched(("set_model_attn2_patch", appended_tokens))),
    "attn2 output patch": Patch(patched(("set_model_attn2_output_patch", lambda out, options: out * 1.2))),
    "FreeU": Patch(core_extra("nodes_freelunch", "FreeU", 1.1, 1.2, 0.9, 0.2), rough=True),
    "FreeU V2": Patch(core_extra("nodes_freelunch", "FreeU_V2", 1.3, 1.4, 0.9, 0.2), rough=True),
    "HyperTile": Patch(core_extra("nodes_hypertile", "HyperTile", 32, 1, 1, False)),
    "tiled self-attention": Patch(Tiles()),
    "Deep Shrink": Patch(half_size),
    "perturbed attention": Patch(core_extra("nodes_pag", "PerturbedAttentionGuidance", 3.0)),
    "self-attention guidance": Patch(core_extra("nodes_sag", "SelfAttentionGuidance", 0.5, 2.0)),
    "RescaleCFG": Patch(core_extra("nodes_model_advanced", "RescaleCFG", 0.7)),
    "CFG function": Patch(patched(("set_model_sampler_cfg_function", raised_contrast))),
    "pre-CFG function": Patch(patched(("set_model_sampler_pre_cfg_function", swapped_and_scaled))),
    "post-CFG function": Patch(patched(("set_model_sampler_post_cfg_function", sharpened))),
    "model function wrapper": Patch(patched(("set_model_unet_function_wrapper", function_wrapper))),
    "wrappers": Patch(added_wrappers),
}  # fmt: skip

TEXT_PATCHES = {
    "ControlNet": Patch(texts=control_net),
    "T2I-adapter": Patch(texts=t2i_adapter),
    "GLIGEN": Patch(texts=gligen),
    "Combine": Patch(texts=combined),
    "Concat": Patch(texts=concatenated),
    "Average": Patch(texts=averaged),
    "area": Patch(texts=regional),
    "masks": Patch(texts=masked),
    "mask bounds": Patch(texts=masked_to_bounds),
    "timestep ranges": Patch(texts=timed),
    "texts of unequal length": Patch(texts=unequal),
    "a longer negative": Patch(texts=long_negative),
    "LoRA hook": Patch(texts=hooked((0.7, 0.0))),
    "scheduled LoRA hook": Patch(texts=hooked((1.0, 0.0), (0.3, 0.4), (0.0, 0.8))),
}

CATALOGUE = MODEL_PATCHES | TEXT_PATCHES


def texts_of(patch: Patch) -> tuple[list, list, list]:
    """(source, positive, negative) with the patch."""
    return tuple(
        patch.texts(conditioning(seed=seed), branch)
        for seed, branch in ((0, "positive"), (1, "positive"), (9, "negative"))
    )
