"""BLIP image captioning through transformers, loaded and offloaded by ComfyUI's model management."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import numpy as np
import torch

from . import captioner_files as files
from .model_files import download_model, read_weights

if TYPE_CHECKING:  # importing transformers takes seconds, and most runs never caption
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

DEMO_FOLDER = Path(__file__).parents[2] / "demo_model" / "captioner"
DEMO_WEIGHTS = DEMO_FOLDER.parent / "weights.safetensors"
DEMO_PREFIX = "captioner."

IMAGES_AT_ONCE = 8
BEAMS = 3


class WholeModelPatcher(comfy.model_patcher.ModelPatcher):
    """Loads and unloads its model as one: layers of transformers cannot fetch a weight that was offloaded alone."""

    def partially_unload(
        self, device_to: torch.device, memory_to_free: int = 0, force_patch_weights: bool = False
    ) -> int:
        return 0


class Captioner:
    """A BLIP model with its tokenizer and image processor.

    `patcher` is what ComfyUI's memory management sees; the device and the dtype are its choice.
    """

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
        self.dtype = torch.float16 if half else torch.float32
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        # One level of wrapping, because the patcher sets `device` on its model, which a transformers model refuses.
        self.patcher = WholeModelPatcher(
            torch.nn.ModuleDict({"blip": blip.to(self.dtype).eval()}),
            load_device=load_device,
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )

    @property
    def blip(self) -> "BlipForConditionalGeneration":
        return self.patcher.model["blip"]

    def caption(self, image: torch.Tensor, prefix: str = "", max_new_tokens: int = 40) -> list[str]:
        """Describe every image of a batch by beam search, as the pix2pix-zero authors do.

        Args:
            image: [B, H, W, C] in 0..1; one channel counts as grey, and alpha is left out because VAE Encode, which
                sees the same picture, leaves it out too.
            prefix: the words each caption starts with; they condition the rest and are returned once.
            max_new_tokens: the longest continuation, in word pieces.

        Raises:
            ValueError: the image is not a picture, or the prefix leaves no room for a caption.
            comfy.model_management.InterruptProcessingException: the user pressed cancel.
        """
        pixels = rgb_bytes(image)
        prefix = " ".join(prefix.split())
        prompt = self.tokenizer(prefix, return_tensors="pt") if prefix else None
        # The tokenizer adds a start and an end token; transformers drops the end before it continues the prompt.
        prompt_length = prompt.input_ids.shape[1] - 1 if prefix else 1
        room = self.blip.config.text_config.max_position_embeddings - prompt_length
        if room < 1:
            raise ValueError(f"prefix: {prompt_length} word pieces leave this captioner no room. Shorten the prefix.")
        max_new_tokens = min(max_new_tokens, room)

        chunks = [pixels[start : start + IMAGES_AT_ONCE] for start in range(0, len(pixels), IMAGES_AT_ONCE)]
        comfy.model_management.load_models_gpu(
            [self.patcher], memory_required=self._activation_bytes(), force_full_load=True
        )
        progress = comfy.utils.ProgressBar(len(chunks) * max_new_tokens)
        captions = []
        for index, chunk in enumerate(chunks):
            tokens = self._generate(chunk, prompt, max_new_tokens, step_hook(progress, index * max_new_tokens))
            progress.update_absolute((index + 1) * max_new_tokens)
            captions += [self._text(prefix, row[prompt_length:]) for row in tokens]
        return captions

    def _generate(self, pixels: np.ndarray, prompt, max_new_tokens: int, hook: Callable) -> torch.Tensor:
        device = self.blip.device  # with --novram the weights stay where they are
        inputs = self.image_processor(images=list(pixels), input_data_format="channels_last", return_tensors="pt")
        words = {}
        if prompt is not None:
            words = {
                "input_ids": prompt.input_ids.repeat(len(pixels), 1).to(device),
                "attention_mask": prompt.attention_mask.repeat(len(pixels), 1).to(device),
            }
        return self.blip.generate(
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
        vision = self.blip.config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2 + 1
        attention = vision.num_attention_heads * tokens**2
        hidden = tokens * (vision.intermediate_size + 4 * vision.hidden_size)
        return IMAGES_AT_ONCE * 2 * (attention + hidden) * self.dtype.itemsize


def rgb_bytes(image: torch.Tensor) -> np.ndarray:
    """An IMAGE [B, H, W, C] in 0..1, of 1 to 4 channels, as uint8 [B, H, W, 3]."""
    if image.ndim != 4 or not 1 <= image.shape[-1] <= 4:
        raise ValueError(f"image: expected [batch, height, width, 1 to 4 channels], got {list(image.shape)}.")
    if not torch.isfinite(image).all():
        raise ValueError("image: it holds NaN or infinite values. Check the node that made it.")
    colour = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(*image.shape[:3], 3)
    return (colour.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


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


def load_captioner(model_name: str, allow_download: bool = False) -> Captioner:
    """Load the captioner that a user chose from `captioner_files.captioner_names()`.

    Raises:
        ValueError: the folder is missing, incomplete, outside models/blip or not a BLIP captioning model.
    """
    if model_name == files.DEMO:
        return load_demo_captioner()
    folder = files.captioner_folder(model_name)
    if allow_download and model_name in files.WELL_KNOWN and files.missing_files(folder):
        download_model(model_name, folder, files.ARTEFACTS)
    files.require_complete(folder, model_name)
    return load_captioner_folder(folder, folder / files.WEIGHTS)


def load_demo_captioner(weights: Path = DEMO_WEIGHTS) -> Captioner:
    """The demo model's tiny BLIP, whose weights share a file with the rest of the demo model."""
    return load_captioner_folder(DEMO_FOLDER, weights, DEMO_PREFIX)


def load_captioner_folder(folder: Path, weights: Path, prefix: str = "") -> Captioner:
    """Build a captioner from configuration and tokenizer in `folder` and the keys under `prefix` in `weights`."""
    from transformers import BertTokenizerFast, BlipConfig, BlipImageProcessor

    try:
        config_type = json.loads((folder / files.CONFIG).read_text(encoding="utf-8")).get("model_type")
    except ValueError as error:
        raise ValueError(f"model_name: {folder / files.CONFIG} is not readable JSON: {error}.") from error
    if config_type != "blip":
        raise ValueError(f"model_name: {folder} holds a model of type '{config_type}', not 'blip'.")
    config = BlipConfig.from_pretrained(folder, local_files_only=True)
    return Captioner(
        build_blip(config, read_weights(weights, "model_name", prefix), str(folder)),
        BertTokenizerFast.from_pretrained(folder, local_files_only=True),
        BlipImageProcessor.from_pretrained(folder, local_files_only=True),
    )


def build_blip(
    config: "BlipConfig", state_dict: dict[str, torch.Tensor], origin: str
) -> "BlipForConditionalGeneration":
    """A BlipForConditionalGeneration with exactly these weights.

    Raises:
        ValueError: a weight is missing, left over or of another shape.
    """
    from transformers import BlipForConditionalGeneration

    # Older checkpoints store this constant, which transformers now computes.
    state_dict = {key: value for key, value in state_dict.items() if not key.endswith("position_ids")}
    blip, report = BlipForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state_dict, ignore_mismatched_sizes=True, output_loading_info=True
    )
    problems = [
        f"{len(report[kind])} {words} ({', '.join(str(key) for key in sorted(report[kind])[:3])})"
        for kind, words in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "left over"),
            ("mismatched_keys", "of another shape"),
        )
        if report[kind]
    ]
    if problems:
        raise ValueError(
            f"model_name: the weights for {origin} are not those of its BLIP captioning model: {', '.join(problems)}. "
            "Use a BLIP image captioning model."
        )
    return blip
