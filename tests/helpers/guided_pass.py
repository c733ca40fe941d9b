"""A guidance gradient twice: with this pack's means through the real guider, and by ordinary autograd in float64."""

import comfy.model_management
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from pix2pix_zero.attention_patches.attention import cross_attention_sites
from pix2pix_zero.host.unet.gradients import (
    clone_inference,
    clone_skips,
    differentiable_attention,
    input_gradients,
    uncompiled,
)
from pix2pix_zero.host.unet.memory import MODES, checkpointed
from plain_unet import PlainUNet, attention, sigma_of
from small_unet import conditioning, small_model


class LastSite(Exception):
    pass


def loaded_model(**options):
    """A loaded MODEL whose weights are inference tensors, as in the executor. Soft maps: sharp ones amplify rounding."""
    with torch.inference_mode():
        model = small_model(**options)
        for name, parameter in model.model.diffusion_model.named_parameters():
            if ".attn2.to_q" in name or ".attn2.to_k" in name:
                parameter.data = (parameter.data.float() * 0.5).to(parameter.dtype)
        comfy.model_management.load_models_gpu([model])
    return model


def latents(model, batch=1, height=8, width=12):
    """(source, edited) latents of the model's space."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, height, width, generator=generator)
    scale = (1 + sigma_of(model) ** 2) ** 0.5
    return scale * x, scale * (x + 0.3 * torch.randn(x.shape, generator=generator))


def tapped(options, sites, on_maps, stop=True):
    """Transformer options with a tap at every site, on top of what is patched there."""
    theirs = options.get("patches_replace", {}).get("attn2", {})

    def tap(site):
        def attend(q, k, v, extra):
            maps, out = attention(q, k, v, extra["n_heads"])
            on_maps(site, maps)
            if stop and site == sites[-1]:
                raise LastSite
            previous = theirs.get(site, theirs.get(site[:2]))
            return out if previous is None else previous(q, k, v, extra)

        return attend

    replace = {**options.get("patches_replace", {}), "attn2": {**theirs, **{site: tap(site) for site in sites}}}
    return {**options, "patches_replace": replace}


class Distance:
    """Sum over the sites of mean over heads of squared differences to the first run's maps."""

    def __init__(self):
        self.reference = {}
        self.terms = {}

    def record(self, site, maps):
        self.reference[site] = maps.detach().clone()

    def match(self, site, maps):
        # A recomputation comes here again: the term of the first time counts.
        self.terms.setdefault(site, ((maps - self.reference[site].to(maps.dtype)) ** 2).sum((2, 3)).mean(1).sum())

    def total(self):
        return sum(self.terms.values())


def pass_gradient(model, x_source, x, text, mode="none", around=None, grad=torch.autograd.grad):
    """The gradient [B, C, H, W], taken in inference mode by `input_gradients` inside the guider's own UNet call.

    `around`: called with (BaseModel, take) where `take()` runs the pass and returns the gradient. `grad`: takes it.
    """
    found = []

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        unet = executor.class_obj.diffusion_model
        sites = cross_attention_sites(unet)
        distance = Distance()

        def call(x, options, convert=lambda value: value):
            try:
                extra = {name: convert(value) for name, value in kwargs.items()}
                executor(x, convert(t), convert(c_concat), convert(c_crossattn), convert(control), options, **extra)
            except LastSite:
                pass

        def take():
            with input_gradients(executor.class_obj), checkpointed(unet, mode, sites[-1]):
                variable = x.clone().requires_grad_(True)
                options = clone_skips(differentiable_attention(transformer_options))
                call(variable, tapped(options, sites, distance.match), clone_inference)
                (gradient,) = grad(distance.total(), variable)
            return gradient

        with uncompiled(executor.class_obj):
            call(x_source.to(x), tapped(transformer_options, sites, distance.record))
            found.append(take() if around is None else around(executor.class_obj, take))
        return torch.zeros_like(x)

    def walk(model_k, noise, sigmas, extra_args, callback, disable):
        guider = model_k.inner_model
        comfy.samplers.calc_cond_batch(
            guider.inner_model,
            [guider.conds["positive"]],
            x.clone(),
            x.new_full((len(x),), sigma_of(model)),
            extra_args["model_options"],
        )
        return noise

    with torch.inference_mode():
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "guided_pass", wrapper)
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": text, "negative": conditioning(seed=9)})
        empty = torch.zeros_like(x)
        sigmas = torch.tensor([sigma_of(model), 0.0])
        guider.sample(empty, empty, comfy.samplers.KSAMPLER(walk), sigmas, seed=0)
    return found[0]


def float64_gradient(model, x_source, x, text, weights=None, foreign=None):
    """The same gradient by `PlainUNet`. `weights`: {name: weight} to use instead of the model's own."""
    stored = {**model.model.diffusion_model.state_dict(), **(weights or {})}
    own = text[0][0]
    return PlainUNet(model, foreign=foreign, weights=stored).gradient(own, x_source, x, own)[0]


def relative_error(ours, expected) -> float:
    assert expected.abs().max() > 0
    return float((ours.double() - expected).norm() / expected.norm())


def assert_right_gradient(model, weights=None, modes=MODES, tolerance=5e-5, text=None):
    x_source, x = latents(model)
    text = text or conditioning(seed=1)
    expected = float64_gradient(model, x_source, x, text, weights)
    for mode in modes:
        assert relative_error(pass_gradient(model, x_source, x, text, mode), expected) <= tolerance, mode
