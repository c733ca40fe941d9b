"""The demo DiT, on the shipped autoencoder's latents and the shipped text encoder's texts, both left as they are.

A rectified flow with logit-normal noise levels (Esser et al. 2024, arXiv 2403.03206, section 3.1). What a step draws depends
on the seed and on the step's number alone, so a run that was cut short goes on to the same weights.
"""

import copy
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ...distillation.optimizer import Muon
from ...editing.writing import write_whole
from ..loader import SCALE_FACTOR, TEXT_PREFIX, UNET_PREFIX
from ..networks import CONTEXT_LENGTH, DemoClipModel
from ..scene import Scene
from ..scene_renders import render
from ..transformer import build_transformer, packed
from .captions import CaptionSampler, Vocabulary
from .decoder import load_autoencoder
from .renders import to_pixels, training_scene

log = logging.getLogger("pix2pix_zero.dit")
CHUNK = 500  # pictures between two writes of the latents
FEW_TOKENS = 24  # of most steps: few captions are longer, and what follows a caption is padding
ADAM_KEEPS = ("embedder", "adaLN", "final_layer")  # matrices that are not in the middle of a block
MATRIX_RATE = 10.0  # Muon's learning rate beside Adam's
SAVE_EVERY = 60.0  # seconds
SAY_EVERY = 20.0


@dataclass(frozen=True)
class Settings:
    """How the DiT is trained.

    `rate`: Adam's. `cooling`: the last part of the steps, in which the rates fall to nothing; a run may go on with other
    `steps`. `average`: of the weights' running mean, which is what is kept. `whole`: share of the steps that see the text's
    padding to the end. `spread`: standard deviation of the noise levels' logit. `half`: bf16 in the matrix products.
    """

    steps: int = 6000
    batch: int = 32
    rate: float = 2e-3
    warmup: int = 60
    cooling: float = 0.3
    average: float = 0.998
    whole: float = 0.125
    spread: float = 1.0
    half: bool = False
    seed: int = 0

    def fixed(self) -> dict[str, object]:
        """What a run keeps when it goes on."""
        return {name: value for name, value in asdict(self).items() if name not in ("steps", "cooling")}


def encode_scenes(weights: Path, output: Path, count: int) -> None:
    """Render `count` training scenes and write their latents, fp16 [count, 4, 16, 16] (.npy); goes on where it stopped."""
    network = load_autoencoder(weights).eval()
    partial, done_file = output.with_name(f"partial-{output.name}"), output.with_name("encoded.txt")
    done = int(done_file.read_text()) if partial.exists() and done_file.exists() else 0
    mode = "r+" if done else "w+"
    latents = np.lib.format.open_memmap(partial, mode=mode, dtype=np.float16, shape=(count, 4, 16, 16))
    for start in range(done, count, CHUNK):
        stop = min(start + CHUNK, count)
        pictures = np.stack([render(training_scene(index)) for index in range(start, stop)])
        with torch.no_grad():
            encoded = [network.encode(to_pixels(pictures[i : i + 64])) for i in range(0, len(pictures), 64)]
        latents[start:stop] = torch.cat(encoded).half()
        latents.flush()
        done_file.write_text(str(stop))
        log.info("encoded %d of %d", stop, count)
    partial.replace(output)
    done_file.unlink(missing_ok=True)


def load_texts(weights: Path) -> nn.Module:
    """The shipped text encoder, frozen."""
    text = DemoClipModel(dtype=torch.float32).clip_l.transformer
    found = {k.removeprefix(TEXT_PREFIX): v for k, v in load_file(weights).items() if k.startswith(TEXT_PREFIX)}
    text.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in found.items()})
    return text.eval().requires_grad_(False)


@torch.no_grad()
def encode_texts(text: nn.Module, rows: Tensor, end: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Context [B, 77, 64] and pooled vector [B, 64] of the captions that `CaptionSampler` drew; `end`: the last token's row."""
    vectors = nn.functional.embedding(rows, text.get_input_embeddings().weight)
    lengths = (rows == end).int().argmax(1) + 1
    encoded, _, pooled = text.text_model(None, embeds=vectors, num_tokens=lengths.tolist())
    return torch.einsum("br,rkc->bkc", weights, encoded), weights @ pooled


def initialize(network: nn.Module) -> None:
    """Blocks that begin as the identity, and a prediction that begins at 0 (Peebles and Xie 2023, section 3.2)."""
    for name, parameter in network.named_parameters():
        if "ln_" in name:
            nn.init.ones_(parameter)
        elif parameter.ndim < 2 or "adaLN" in name or "final_layer" in name:
            nn.init.zeros_(parameter)
        elif "_embedder.mlp" in name:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.xavier_uniform_(parameter.view(len(parameter), -1))


def noise_levels(count: int, spread: float, generator: torch.Generator) -> Tensor:
    """[count] in 0..1, logit-normal, one of each of `count` equally likely parts."""
    parts = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    return torch.sigmoid(spread * torch.special.ndtri(parts.clamp(1e-6, 1 - 1e-6))).float()


@dataclass
class Data:
    """What is drawn from: latents [N, 4, 16, 16] of unit deviation, their scenes, and the frozen text encoder."""

    latents: Tensor
    scenes: list[Scene]
    text: nn.Module
    vocabulary: Vocabulary

    @classmethod
    def load(cls, latents: Path, weights: Path) -> "Data":
        scale = load_file(weights)[SCALE_FACTOR].float()
        values = torch.from_numpy(np.load(latents)).float() * scale
        scenes = [training_scene(index) for index in range(len(values))]
        return cls(values, scenes, load_texts(weights), Vocabulary())


def _attend(_: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: object, **kwargs: object) -> Tensor:
    """Attention in two matrix products: for few tokens in bf16 on a CPU three times as fast as torch's own."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2).to(v.dtype) for x in (q, k, v))
    weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(-2)


ATTENTION = {"transformer_options": {"optimized_attention_override": _attend}}


@dataclass
class Batch:
    noisy: Tensor
    velocity: Tensor
    levels: Tensor
    context: Tensor
    pooled: Tensor


def draw(data: Data, settings: Settings, step: int) -> Batch:
    """What step number `step` learns from."""
    seed = (settings.seed << 32) + step
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(data.latents), (settings.batch,), generator=generator)
    levels = noise_levels(settings.batch, settings.spread, generator)
    clean = data.latents[chosen]
    noise = torch.randn(clean.shape, generator=generator)
    rows, weights = CaptionSampler(data.vocabulary, seed)([data.scenes[index] for index in chosen.tolist()])
    context, pooled = encode_texts(data.text, rows, data.vocabulary.end, weights)
    whole = torch.rand((), generator=generator) < settings.whole
    tokens = CONTEXT_LENGTH if whole else FEW_TOKENS
    share = levels.view(-1, 1, 1, 1)
    return Batch((1 - share) * clean + share * noise, noise - clean, levels, context[:, :tokens], pooled)


class Training:
    """A run of the recipe, from the start or from `checkpoint`."""

    def __init__(self, data: Data, settings: Settings, checkpoint: Path) -> None:
        self.data, self.settings, self.checkpoint = data, settings, checkpoint
        self.network = build_transformer().diffusion_model
        torch.manual_seed(settings.seed)
        initialize(self.network)
        self.network.requires_grad_(True).train()
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        matrices = [p for n, p in self.network.named_parameters() if p.ndim > 1 and not any(k in n for k in ADAM_KEEPS)]
        within = {id(p) for p in matrices}
        others = [p for p in self.network.parameters() if id(p) not in within]
        self.optimizers = [
            Muon(matrices, MATRIX_RATE * settings.rate),
            torch.optim.AdamW(others, settings.rate, betas=(0.9, 0.99), weight_decay=0.0),
        ]
        self.peaks = (MATRIX_RATE * settings.rate, settings.rate)
        self.step, self.error = 0, 2.0
        if checkpoint.is_file():
            self._read()

    def rate(self) -> float:
        """The learning rates' share of their peaks at the next step."""
        left = 1 - self.step / self.settings.steps
        return min(1.0, (self.step + 1) / self.settings.warmup, max(0.0, left) / self.settings.cooling)

    def _products(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.half)

    def one_step(self) -> None:
        """Draw a batch, step the weights, let their average follow."""
        batch = draw(self.data, self.settings, self.step)
        with self._products():
            found = self.network(batch.noisy, 1000 * batch.levels, context=batch.context, y=batch.pooled, **ATTENTION)
        error = (found.float() - batch.velocity).square().mean()
        self.network.zero_grad(set_to_none=True)
        error.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, self.peaks):
            optimizer.param_groups[0]["lr"] = peak * self.rate()
            with self._products():
                optimizer.step()
        decay = min(self.settings.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        self.step += 1
        self.error += (error.item() - self.error) * max(0.01, 1 / self.step)

    def run(self, on_save: Callable[["Training"], None] = lambda run: None) -> nn.Module:
        """Train to the end and return the averaged network; what stops it loses no step. `on_save`: after each saving."""
        begin = said = saved = time.monotonic()
        first = self.step
        try:
            while self.step < self.settings.steps:
                self.one_step()
                now = time.monotonic()
                if now - said > SAY_EVERY:
                    said, pace = now, (self.step - first) / (now - begin)
                    log.info("step %d, %.2f a second, v error %.4f", self.step, pace, self.error)
                if now - saved > SAVE_EVERY:
                    saved = now
                    self.save()
                    on_save(self)
        finally:
            self.save()
            on_save(self)
        log.info("done: step %d, v error %.4f", self.step, self.error)
        return self.average

    def save(self) -> None:
        """Write everything that the next step depends on, whole or not at all."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer{number}.{index}.{key}": value for key, value in state.items()}
        numbers = {"step": self.step, "error": self.error, "settings": self.settings.fixed()}
        tensors = {k: v.detach().contiguous() for k, v in tensors.items()}
        write_whole(self.checkpoint, save(tensors, {"state": json.dumps(numbers)}))

    def _read(self) -> None:
        with safe_open(self.checkpoint, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            numbers = json.loads(file.metadata()["state"])
        changed = {k: v for k, v in self.settings.fixed().items() if numbers["settings"].get(k) != v}
        if changed:
            raise ValueError(
                f"{self.checkpoint} was begun with other settings: {changed}. Train with those, or in another folder."
            )

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

        self.network.load_state_dict(part("network"))
        self.average.load_state_dict(part("average"))
        for number, optimizer in enumerate(self.optimizers):
            states: dict[int, dict[str, Tensor]] = {}
            for key, value in part(f"optimizer{number}").items():
                index, name = key.split(".")
                states.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        self.step, self.error = numbers["step"], numbers["error"]


def write_transformer(network: nn.Module, weights: Path, output: Path) -> None:
    """The packed weights under the names of a checkpoint, and the latents' factor of the shipped file."""
    tensors = packed({UNET_PREFIX + name: value for name, value in network.state_dict().items()})
    tensors[SCALE_FACTOR] = load_file(weights)[SCALE_FACTOR]
    write_whole(output, save(tensors))
