"""One sampling by ComfyUI's guider, which brings loading, conditioning, previews and progress."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.samplers import CFGGuider

from .. import progress

Result = TypeVar("Result")


class Run(NamedTuple):
    """What the host hands to a sampler: the guider's evaluation, the latent [B, C, H, W], the noise levels, descending."""

    model_k: Callable
    x: torch.Tensor
    sigmas: torch.Tensor
    extra_args: dict
    callback: Callable | None

    @property
    def guider(self) -> CFGGuider:
        return self.model_k.inner_model

    @property
    def model_options(self) -> dict:
        return self.extra_args["model_options"]

    def report(self, phase: str, index: int, denoised: torch.Tensor, x: torch.Tensor, note: str = "") -> None:
        """Show a finished step as text, preview and progress."""
        progress.show(f"{phase} {index + 1}/{len(self.sigmas) - 1}{note}")
        if self.callback is not None:
            sigma = self.sigmas[index]
            self.callback({"i": index, "denoised": denoised, "x": x, "sigma": sigma, "sigma_hat": sigma})


def sample(
    guider: CFGGuider, walk: Callable[[Run], tuple[torch.Tensor, Result]], samples: torch.Tensor, sigmas: torch.Tensor
) -> tuple[torch.Tensor, Result]:
    """Run `walk` on LATENT samples, nothing added to them, with the host's preview and progress bar.

    Returns the samples that it ends on, and what else it returns. Raises ValueError if they are not finite. The seed, of
    what the host draws for a conditioning, such as unCLIP's noise, is the same for inversion and edit.
    """
    callback = progress.over_runs(latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1))
    results = []

    def function(model_k, x, sigmas, extra_args, callback, disable):
        x, result = walk(Run(model_k, x, sigmas, extra_args, callback))
        results.append(result)
        return x

    sampled = guider.sample(
        torch.zeros_like(samples),
        samples,
        comfy.samplers.KSAMPLER(function),
        sigmas,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,
    ).to(comfy.model_management.intermediate_device())
    if not sampled.isfinite().all():
        raise ValueError(
            "model: the sampling ended in NaN or infinite values. Load the model in bf16 or fp32, and lower cfg, guidance "
            "and the weights of patches."
        )
    return sampled, results[-1]


def look(guider: CFGGuider, read: Callable[[Run], Result], samples: torch.Tensor, sigmas: torch.Tensor) -> Result:
    """What `read` returns of a guider that is ready to evaluate, without preview and progress; nothing is drawn."""
    results = []

    def function(model_k, x, sigmas, extra_args, callback, disable):
        results.append(read(Run(model_k, x, sigmas, extra_args, None)))
        return x

    sampler = comfy.samplers.KSAMPLER(function)
    guider.sample(torch.zeros_like(samples), samples, sampler, sigmas, disable_pbar=True, seed=0)
    return results[-1]
