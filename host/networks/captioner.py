"""BLIP image captioning through transformers, loaded and offloaded by ComfyUI's model management."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.utils
import numpy as np
import torch

from ...editing.inputs import check_image, check_text, rgb_bytes
from .model_kinds import BLIP, DEMO, complete_folder
from .transformers_models import HeldNetwork, read_network, read_picture_preparation, read_tokenizer, read_weights

if TYPE_CHECKING:  # importing transformers takes seconds, and most runs never caption
    from transformers import BertTokenizerFast, BlipForConditionalGeneration, BlipImageProcessor

DEMO_FOLDER = Path(__file__).parents[2] / "demo_model" / "captioner"
DEMO_WEIGHTS = DEMO_FOLDER.parent / "weights.safetensors"
DEMO_PREFIX = "captioner."

IMAGES_AT_ONCE = 8
BEAMS = 3
LONGEST_PREFIX = 2000
LONGEST_CAPTIONS = 1_000_000
ON_THE_BLUEPRINT = f"On the blueprint {BLIP.socket} is called captioner."


class Captioner(HeldNetwork):
    """A BLIP model with its tokenizer and image processor, in half precision where ComfyUI would take it."""

    def __init__(
        self,
        blip: "BlipForConditionalGeneration",
        tokenizer: "BertTokenizerFast",
        image_processor: "BlipImageProcessor",
    ):
        load_device = comfy.model_management.text_encoder_device()
        half = not comfy.model_management.is_device_cpu(load_device) and comfy.model_management.should_use_fp16(
            load_device
        )
        super().__init__(blip, torch.float16 if half else torch.float32)
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    def caption(self, image: torch.Tensor, prefix: str = "", max_new_tokens: int = 40) -> list[str]:
        """Describe every image of a batch by beam search, as the pix2pix-zero authors do.

        `image`: [B, H, W, C] in 0..1; one channel counts as grey, and alpha is left out because VAE Encode, which sees the
        same picture, leaves it out too. `prefix`: the words each caption starts with; they condition the rest and are
        returned once. `max_new_tokens`: the longest continuation, in word pieces.

        Raises ValueError when the image is not a picture or the prefix leaves no room for a caption. Can be cancelled.
        """
        check_image(image, "image")
        pixels = rgb_bytes(image)
        prefix = " ".join(check_text(prefix, "prefix", LONGEST_PREFIX).split())
        prompt = self.tokenizer(prefix, return_tensors="pt") if prefix else None
        # The tokenizer adds a start and an end token; transformers drops the end before it continues the prompt.
        prompt_length = prompt.input_ids.shape[1] - 1 if prefix else 1
        room = self.network.config.text_config.max_position_embeddings - prompt_length
        if room < 1:
            raise ValueError(f"prefix: {prompt_length} word pieces leave this captioner no room. Shorten the prefix.")
        max_new_tokens = min(max_new_tokens, room)

        chunks = [pixels[start : start + IMAGES_AT_ONCE] for start in range(0, len(pixels), IMAGES_AT_ONCE)]
        self.load(self._activation_bytes())
        progress = comfy.utils.ProgressBar(len(chunks) * max_new_tokens)
        captions = []
        for index, chunk in enumerate(chunks):
            tokens = self._generate(chunk, prompt, max_new_tokens, step_hook(progress, index * max_new_tokens))
            progress.update_absolute((index + 1) * max_new_tokens)
            captions += [self._text(prefix, row[prompt_length:]) for row in tokens]
        return captions

    def _generate(self, pixels: np.ndarray, prompt, max_new_tokens: int, hook: Callable) -> torch.Tensor:
        device = self.network.device  # with --novram the weights stay where they are
        inputs = self.image_processor(images=list(pixels), input_data_format="channels_last", return_tensors="pt")
        words = {}
        if prompt is not None:
            words = {
                "input_ids": prompt.input_ids.repeat(len(pixels), 1).to(device),
                "attention_mask": prompt.attention_mask.repeat(len(pixels), 1).to(device),
            }
        return self.network.generate(
            pixel_values=inputs.pixel_values.to(device, self.dtype),
            max_new_tokens=max_new_tokens,
            num_beams=BEAMS,
            do_sample=False,
            stopping_criteria=[hook],
            **words,
        ).cpu()

    def _text(self, prefix: str, tokens: torch.Tensor) -> str:
        continuation = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if continuation.startswith("##"):
            return prefix + continuation[2:]
        return f"{prefix} {continuation}".strip()

    def _activation_bytes(self) -> int:
        vision = self.network.config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2 + 1
        attention = vision.num_attention_heads * tokens**2
        hidden = tokens * (vision.intermediate_size + 4 * vision.hidden_size)
        return IMAGES_AT_ONCE * 2 * (attention + hidden) * self.dtype.itemsize


def step_hook(progress: comfy.utils.ProgressBar, done: int) -> Callable:
    """A stopping criterion that never stops, but lets the user cancel and moves the progress bar at every token."""
    steps = 0

    def hook(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        nonlocal steps
        comfy.model_management.throw_exception_if_processing_interrupted()
        steps += 1
        progress.update_absolute(min(done + steps, progress.total))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return hook


def own_captions(text: str, pictures: int) -> list[str]:
    """A caption for each picture of a batch, from a text that a person wrote: one for all, or a line for each.

    Raises ValueError if it has another number of lines.
    """
    lines = [line.strip() for line in check_text(text, "caption", LONGEST_CAPTIONS).splitlines() if line.strip()]
    if pictures == 1:
        return [" ".join(lines)]
    if len(lines) not in (1, pictures):
        raise ValueError(
            f"caption: it has {len(lines)} lines for {pictures} pictures. Write one for all, or a line for each picture."
        )
    return lines if len(lines) == pictures else lines * pictures


def load_captioner(model_name: str, allow_download: bool = False) -> Captioner:
    """Load the captioner that a user chose from `model_names(BLIP)`.

    Raises ValueError: the folder is missing, incomplete, damaged, outside models/blip or not a BLIP captioning model.
    """
    try:
        if model_name == DEMO:
            return load_demo_captioner()
        return load_captioner_folder(complete_folder(BLIP, model_name, allow_download))
    except ValueError as error:
        if str(error).startswith(f"{BLIP.socket}: "):
            raise ValueError(f"{error} {ON_THE_BLUEPRINT}") from error
        raise


def load_demo_captioner(weights: Path = DEMO_WEIGHTS) -> Captioner:
    """The demo model's tiny BLIP, whose weights share a file with the rest of the demo model."""
    return load_captioner_folder(DEMO_FOLDER, read_weights(weights, BLIP.socket, DEMO_PREFIX))


def load_captioner_folder(folder: Path, weights: dict[str, torch.Tensor] | None = None) -> Captioner:
    """A captioner from what lies in `folder`, with other weights if they are given."""
    blip = read_network(BLIP, folder, weights)
    size = blip.config.vision_config.image_size
    return Captioner(blip, read_tokenizer(BLIP, folder), read_picture_preparation(BLIP, folder, size))
