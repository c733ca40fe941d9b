"""One model with other packs' patches, sampled by this pack and by the stock guider, and differentiated without autograd."""

import comfy.model_management
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP
from guided_pass import Distance, LastSite, sigma_of, tapped
from patch_catalogue import IMAGE
from pix2pix_zero.attention_patches.attention import cross_attention_sites
from pix2pix_zero.editing.regularization import NoiseRegularization
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.host.sampling.invert import InversionSettings, invert_latent
from pix2pix_zero.host.sampling.passes import UNetPasses
from pix2pix_zero.host.sampling.source import EditGuider
from pix2pix_zero.host.unet.jobs import for_own_sampler
from small_unet import conditioning, latent, small_model

OFF = NoiseRegularization(steps=0)


def soft_model(weight_dtype=torch.float32):
    """A MODEL with soft attention maps, which computes attention as this pack does on a CPU, so that runs are equal."""
    with torch.inference_mode(weight_dtype == torch.float32):
        model = small_model()
        for name, parameter in model.model.diffusion_model.named_parameters():
            if ".attn2.to_q" in name or ".attn2.to_k" in name:
                parameter.data = parameter.data * 0.5
        if weight_dtype != torch.float32:
            double = small_model(weight_dtype=weight_dtype)
            double.model.diffusion_model.load_state_dict(model.model.diffusion_model.state_dict())
            double.model.diffusion_model.requires_grad_(False)
            model = double
        comfy.model_management.load_models_gpu([model])
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs)
    return model


@torch.inference_mode()
def invert(model, source=None, picture=None, steps=2, method="ddim", **options):
    picture = picture or latent(1, *IMAGE)
    return invert_latent(model, source or conditioning(), picture, InversionSettings(steps, 0, OFF, method, **options))


@torch.inference_mode()
def edit(model, inversion, positive=None, negative=None, strength=0.0, cfg=2.0, **options):
    positive, negative = positive or conditioning(seed=1), negative or conditioning(seed=9)
    return sample_edit(model, inversion, positive, negative, EditSettings(cfg, strength, **options))[0]


def sampled(guider_class, model, conds, sampler, picture, sigmas, cfg):
    guider = guider_class(model)
    guider.inner_set_conds(conds)
    guider.set_cfg(cfg)
    with torch.inference_mode():
        return guider.sample(torch.zeros_like(picture), picture, sampler, sigmas, seed=0, disable_pbar=True)


def stock_edit(model, inversion, positive=None, negative=None, cfg=2.0):
    """DDIM from the inverted noise by the stock guider; nothing of this pack is used."""

    def walk(model_k, x, sigmas, extra_args, callback, disable):
        x = inversion.trajectory[-1].to(x)
        for sigma, sigma_next in zip(sigmas.tolist(), sigmas.tolist()[1:]):
            denoised = model_k(x, x.new_full((len(x),), sigma), **extra_args)
            x = x + (x - denoised) / sigma * (sigma_next - sigma)
        return x

    conds = {"positive": positive or conditioning(seed=1), "negative": negative or conditioning(seed=9)}
    noise = model.model.process_latent_out(inversion.trajectory[-1])
    sampler = comfy.samplers.KSAMPLER(walk)
    return sampled(comfy.samplers.CFGGuider, model, conds, sampler, noise, inversion.sigmas.flip(0), cfg)


def guided_step(model, texts, x_source, x, cfg=2.0):
    """(estimate of the stock guider, that of the guided pass, gradient, distance) at `x`."""
    source, positive, negative = texts
    sigma = sigma_of(model)
    found = []

    def walk(model_k, noise, sigmas, extra_args, callback, disable):
        model_k.inner_model.add_source(x_source)
        passes = UNetPasses(model_k, extra_args, cross_attention_sites(model.model.diffusion_model))
        found.append(model_k(x.clone(), x.new_full((len(x),), sigma), **extra_args))
        reference = passes.record_maps("source", x_source.clone(), sigma)
        found.extend(passes.denoise_and_match(x.clone(), sigma, reference))
        return noise

    conds = {"positive": positive, "negative": negative, "source": source}
    sampler = comfy.samplers.KSAMPLER(walk)
    sampled(EditGuider, for_own_sampler(model), conds, sampler, x_source, torch.tensor([sigma, 0.0]), cfg)
    return found


def directional_derivative(model, texts, x_source, x, direction, size):
    """The attention distance's derivative at `x` along `direction` by central differences, and the distance itself.

    What is computed outside the UNet's call, such as a ControlNet's residuals, stays as it is at `x`. `texts`: (source,
    positive). Equal shares of all entries of the conditioning are taken.
    """
    sigma = sigma_of(model)
    sites = cross_attention_sites(model.model.diffusion_model)
    job = None

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        for move, on_maps in job:
            options = tapped(transformer_options, sites, on_maps)
            residuals = control and {key: list(values) for key, values in control.items()}
            try:
                executor(
                    x + move.repeat(len(x) // len(move), 1, 1, 1),
                    t,
                    c_concat,
                    c_crossattn,
                    residuals,
                    options,
                    **kwargs,
                )
            except LastSite:
                pass
        return torch.zeros_like(x)

    total = {}

    def walk(model_k, noise, sigmas, extra_args, callback, disable):
        nonlocal job
        guider = model_k.inner_model
        guider.add_source(x_source)
        pairs = zip(guider.conds["source"], guider.conds["positive"])
        for here, there in pairs:
            distances = {name: Distance() for name in (-1, 0, 1)}
            step = {name: name * size * direction for name in distances}
            job = [(0 * direction, distance.record) for distance in distances.values()]
            evaluate = extra_args["model_options"]
            level = x.new_full((len(x),), sigma)
            comfy.samplers.calc_cond_batch(guider.inner_model, [[here]], x_source.clone(), level, evaluate)
            job = [(step[name], distance.match) for name, distance in distances.items()]
            comfy.samplers.calc_cond_batch(guider.inner_model, [[there]], x.clone(), level, evaluate)
            for name, distance in distances.items():
                if distance.terms:
                    total.setdefault(name, []).append(distance.total())
        return noise

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "differences", wrapper)
    source, positive = texts
    conds = {"positive": positive, "negative": conditioning(seed=9), "source": source}
    sampled(EditGuider, model, conds, comfy.samplers.KSAMPLER(walk), x_source, torch.tensor([sigma, 0.0]), 1.0)
    mean = {name: sum(values) / len(values) for name, values in total.items()}
    return (mean[1] - mean[-1]) / (2 * size), mean[0]


def same(ours, expected, tolerance=1e-4):
    return (ours - expected).abs().max() <= tolerance * expected.std()
