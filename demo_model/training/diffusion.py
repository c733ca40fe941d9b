"""Stage 3: UNet and text encoder together, on the autoencoder's latents.

v-prediction (Salimans and Ho 2022, appendix D) on Stable Diffusion's noise schedule; the squared v error is weighted by
min(1, 5/SNR), after min-SNR (Hang et al. 2023).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.clip_model
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..autoencoder import LightAutoencoder
from ..networks import DemoClipModel, build_diffusion_model
from .captions import CaptionSampler, Vocabulary
from .optimizer import Trainer
from .parallel import Pace
from .renders import to_pixels, training_scene

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model.transformer."
VAE_PREFIX = "first_stage_model."
SAVE_EVERY = 120.0  # seconds


@contextmanager
def _differentiable_text_layers() -> Iterator[None]:
    """The host's text layers add in place, which breaks the backward pass."""

    def forward(self, x, mask=None, optimized_attention=None):
        x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
        return x + self.mlp(self.layer_norm2(x))

    kept = comfy.clip_model.CLIPLayer.forward
    comfy.clip_model.CLIPLayer.forward = forward
    try:
        yield
    finally:
        comfy.clip_model.CLIPLayer.forward = kept


def _initialize_unet(unet: nn.Module) -> None:
    for module in unet.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.weight.data.fill_(1)
            module.bias.data.zero_()
    for name, parameter in unet.named_parameters():
        if name.startswith("out.2") or "out_layers.3" in name or "proj_out" in name:
            parameter.data.zero_()


def _initialize_text(text: nn.Module, vocabulary: Vocabulary) -> None:
    for name, parameter in text.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
        elif "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1)
        else:
            parameter.data.zero_()
    embedding = text.get_input_embeddings()
    embedding.weight.data.normal_(0, 0.3)
    vocabulary.fill_table(embedding.table)


@torch.no_grad()
def encode_renders(renders: str, autoencoder: str, output: str) -> None:
    """Write the latents of all renders, and the factor that gives them unit deviation, to `output` (.safetensors)."""
    model = LightAutoencoder().eval()
    model.load_state_dict(load_file(autoencoder))
    pictures = np.load(renders, mmap_mode="r")
    latents = torch.cat([model.encode(to_pixels(pictures[i : i + 64])) for i in range(0, len(pictures), 64)])
    save_file({"latents": latents.half().contiguous(), "scale_factor": 1 / latents.std()}, output)


def stratified_timesteps(count: int, levels: int) -> Tensor:
    """One random noise level from each of `count` equal parts of 0..levels-1, as integers [count]."""
    levels_drawn = (torch.arange(count) + torch.rand(count)) * levels / count
    return levels_drawn.long().clamp(max=levels - 1)  # float rounding can reach the very end


@dataclass(frozen=True)
class Leg:
    """`warm_start`: continues from a file that an earlier call wrote; give it a lower `matrix_lr` then."""

    matrix_lr: float = 0.02
    warm_start: str | None = None


@_differentiable_text_layers()
def train_diffusion(
    rank: int,
    latents: str,
    autoencoder: str,
    output: str,
    pace: Pace,
    leg: Leg = Leg(),
) -> list[tuple[int, float]]:
    """Train on latents; returns (step, running v error) and writes `output`."""
    stored = load_file(latents)
    data, scale = stored["latents"].float() * stored["scale_factor"], stored["scale_factor"]
    scenes = [training_scene(i) for i in range(len(data))]
    vocabulary = Vocabulary()
    torch.manual_seed(2)
    host_model = build_diffusion_model()
    unet, text = host_model.diffusion_model, DemoClipModel(dtype=torch.float32).clip_l.transformer
    _initialize_unet(unet)
    _initialize_text(text, vocabulary)
    if leg.warm_start is not None:
        for module, prefix in ((unet, UNET_PREFIX), (text, TEXT_PREFIX)):
            state = {k[len(prefix) :]: v for k, v in load_file(leg.warm_start).items() if k.startswith(prefix)}
            module.load_state_dict(state)
    unet.requires_grad_(True).train()
    text.requires_grad_(True).train()
    text.text_projection.requires_grad_(False)
    sigmas = host_model.model_sampling.sigmas
    trainer = Trainer(
        {"unet": unet, "text": text},
        leg.matrix_lr,
        leg.matrix_lr / 10,
        0.998,
        keep_adam=("embed", "out.2", "input_blocks.0."),
        warmup=pace.warmup,
    )
    sampler = CaptionSampler(vocabulary, seed=200 + rank)
    torch.manual_seed(300 + rank)
    curve: list[tuple[int, float]] = []
    pace.start()
    running, reported, saved = 1.0, -1e9, time.monotonic()
    while (progress := pace.progress()) < 1:
        picked = torch.randint(len(data), (pace.batch,))
        t = stratified_timesteps(pace.batch, len(sigmas))
        alpha_bar = (1 / (1 + sigmas[t] ** 2)).view(-1, 1, 1, 1)
        x0, eps = data[picked], torch.randn(pace.batch, *data.shape[1:])
        rows, weights = sampler([scenes[i] for i in picked.tolist()])
        context = _encode(text, rows, weights)
        v = unet(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps, t.float(), context=context)
        error = (v - (alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0)).square().mean((1, 2, 3))
        snr = (alpha_bar / (1 - alpha_bar)).flatten()
        trainer.step((error * (5 / snr).clamp(max=1)).mean(), progress)
        decay = min(0.98, trainer.count / (10 + trainer.count))
        running = decay * running + (1 - decay) * error.mean().item()
        if rank == 0 and time.monotonic() - reported > 30:
            reported = time.monotonic()
            curve.append((trainer.count, running))
            pace.report(f"diffusion step {trainer.count} minute {progress * pace.minutes:.1f} v error {running:.4f}")
        if rank == 0 and time.monotonic() - saved > SAVE_EVERY:
            saved = time.monotonic()
            _save(trainer, autoencoder, scale, output)
    if rank == 0:
        curve.append((trainer.count, running))
        _save(trainer, autoencoder, scale, output)
        pace.report(f"diffusion done: {trainer.count} steps, v error {running:.4f}")
    return curve


def _encode(text: nn.Module, rows: Tensor, weights: Tensor) -> Tensor:
    embedding = text.get_input_embeddings()
    vectors = nn.functional.embedding(rows, embedding.weight)
    encoded = text.text_model(None, embeds=vectors, num_tokens=[1] * len(rows))[0]
    return torch.einsum("br,rkc->bkc", weights, encoded)


def _save(trainer: Trainer, autoencoder: str, scale: Tensor, output: str) -> None:
    state = {UNET_PREFIX + k: v for k, v in trainer.ema["unet"].state_dict().items()}
    state |= {TEXT_PREFIX + k: v for k, v in trainer.ema["text"].state_dict().items()}
    state |= {VAE_PREFIX + k: v for k, v in load_file(autoencoder).items()}
    state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    state["scale_factor"] = scale.float().reshape(())
    partial = f"{output}.part"
    save_file({k: v.contiguous().clone() for k, v in state.items()}, partial)
    Path(partial).replace(output)
