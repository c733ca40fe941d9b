"""A family's UNet at its full size with random weights: inverted, edited with guidance, and timed beside plain sampling."""

import logging
import time
from dataclasses import dataclass
from unittest.mock import patch

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import torch

from ...attention_patches.attention import cross_attention_sites
from ...host.sampling.edit import EditSettings, sample_edit
from ...host.sampling.invert import InversionSettings, invert_latent
from ...host.sampling.passes import UNetPasses
from ..cost_parts.memory import Peak
from .accounting import TOKENS, account
from .architectures import FAMILIES, detected, file_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POOL = 1_000_003  # prime, so that no two rows of a weight are equal
CFG = 5.0


@dataclass(frozen=True)
class FamilyJob:
    """One family. `kind`: "run" on this machine at `size` pixels, or "account" for 16-bit weights at `size`.

    `dtype`: of the weights; computed is in fp32 on a CPU.
    """

    kind: str
    name: str
    size: int
    steps: int
    dtype: str
    preset: str


def run_job(job: FamilyJob) -> dict:
    """Carry it out in this process."""
    if job.kind == "account":
        return account(FAMILIES[job.name], job.size)
    with torch.inference_mode():
        return run(job)


def load(name: str, dtype: torch.dtype):
    """A loaded MODEL with the class and settings that ComfyUI finds in the family's file."""
    file = file_of(FAMILIES[name])
    config = detected(file)
    device = comfy.model_management.get_torch_device()
    config.set_inference_dtype(dtype, torch.float32 if device.type == "cpu" and dtype != torch.float32 else None)
    base = config.get_model({key: value for key, value in file.items() if not value.is_meta}, device=device)
    draw_weights(base.diffusion_model)
    offload = comfy.model_management.unet_offload_device()
    model = comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=offload)
    comfy.model_management.load_models_gpu([model])
    return model


def draw_weights(unet: torch.nn.Module) -> None:
    """Random weights, written in place: stretches of one pool of normal numbers."""
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    for name, parameter in unet.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        scale = parameter[0].numel() ** -0.5 * (0.1 if name.startswith("out.") else 1.0)
        values = (scale * pool).to(parameter)
        for stretch in parameter.data.view(-1).split(POOL):
            stretch.copy_(values[: len(stretch)])


def texts(name: str, size: int, seed: int) -> list:
    """A CONDITIONING of random vectors with everything the family takes; the picture itself in further channels."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    options = {}
    if family.pooled:
        options |= {"pooled_output": torch.randn(1, family.pooled, generator=generator), "width": size, "height": size}
    if family.channels:
        options["concat_latent_image"] = _picture(size)
    if family.channels == "inpaint":
        options["concat_mask"] = torch.ones(1, size, size)
    return [[torch.randn(1, TOKENS, family.settings["context_dim"], generator=generator), options]]


def _picture(size: int) -> torch.Tensor:
    return 4 * torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(2))


def run(job: FamilyJob) -> dict:
    logging.getLogger().setLevel(logging.ERROR)
    start = time.perf_counter()
    model = load(job.name, DTYPES[job.dtype])
    loading = time.perf_counter() - start
    device = comfy.model_management.get_torch_device()
    source, edited = (texts(job.name, job.size, seed) for seed in (0, 1))
    picture = {"samples": _picture(job.size)}
    gradients = []

    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()  # on all cores; other programs disturb it less

    def timed(function, *args, **options):
        begin = clock()
        result = function(*args, **options)
        return result, (clock() - begin) / job.steps

    def plain():
        noise = comfy.sample.prepare_noise(picture["samples"], 0)
        return comfy.sample.sample(
            model,
            noise,
            job.steps,
            CFG,
            "ddim",
            "ddim_uniform",
            edited,
            source,
            picture["samples"],
            disable_pbar=True,
            seed=0,
        )

    def noting(passes, *args):
        found = match(passes, *args)
        gradients.append(found[1])
        return found

    match = UNetPasses.denoise_and_match
    plain()  # the first run makes what later ones find made
    peak = Peak(device)
    _, plain_step = timed(plain)
    peak.reset()
    inversion, inversion_step = timed(invert_latent, model, source, picture, InversionSettings(job.steps, map_memory=0))
    inversion_peak = peak.above_base()
    peak.reset()
    with patch.object(UNetPasses, "denoise_and_match", noting):
        settings = EditSettings(CFG, 0.001, preset=job.preset)
        (samples, _), guided_step = timed(sample_edit, model, inversion, edited, source, settings)
    guided_peak = peak.above_base()
    again = sample_edit(model, inversion, source, source, EditSettings(CFG, 0.0))[0]
    return {
        "class": type(model.model.model_config).__name__,
        "parameters": sum(parameter.numel() for parameter in model.model.diffusion_model.parameters()),
        "sites": len(cross_attention_sites(model.model.diffusion_model)),
        "loading": loading,
        "seconds": {"plain": plain_step, "inversion": inversion_step, "guided": guided_step},
        "peak": {"inversion": inversion_peak, "guided": guided_peak},
        "reconstruction_error": float((again - picture["samples"]).abs().max() / picture["samples"].std()),
        "finite": bool(samples.isfinite().all()) and all(bool(g.isfinite().all() and g.any()) for g in gradients),
        "gradients": len(gradients),
    }
