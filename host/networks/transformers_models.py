"""Networks of transformers from a user's folder, in the hands of ComfyUI's model management."""

from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.model_patcher
import numpy as np
import safetensors
import torch

from ..files import WEIGHTS
from .model_kinds import CONFIG, SHARDS, ModelKind, has_file, is_plain_name, read_image_processor, read_json

if TYPE_CHECKING:  # importing transformers takes seconds, and most runs need none of it
    from transformers import PretrainedConfig, PreTrainedTokenizerFast
    from transformers.image_processing_utils import BaseImageProcessor

LARGEST_SIDE = 4096
"""Of the pictures that an image processor makes: no such network takes larger ones."""


class WholeModelPatcher(comfy.model_patcher.ModelPatcher):
    """Loads and unloads its model as one: layers of transformers cannot fetch a weight that was offloaded alone."""

    def partially_unload(
        self, device_to: torch.device, memory_to_free: int = 0, force_patch_weights: bool = False
    ) -> int:
        return 0


class HeldNetwork:
    """A network that ComfyUI's memory management loads and offloads as a text encoder."""

    def __init__(self, network: torch.nn.Module, dtype: torch.dtype = torch.float32):
        # Wrapped once, because the patcher sets `device` on its model, which a transformers model refuses.
        self.patcher = WholeModelPatcher(
            torch.nn.ModuleDict({"network": network.to(dtype).eval().requires_grad_(False)}),
            load_device=comfy.model_management.text_encoder_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )
        self.dtype = dtype

    @property
    def network(self) -> torch.nn.Module:
        return self.patcher.model["network"]

    def load(self, activation_bytes: float) -> torch.device:
        """Bring the weights to the device on which the network runs, beside so much to compute with, and name it."""
        comfy.model_management.load_models_gpu([self.patcher], memory_required=activation_bytes, force_full_load=True)
        return next(self.network.parameters()).device


def read_weights(path: Path, socket: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file whose key starts with `prefix`, without it, in float32.

    Raises ValueError, naming `socket`: the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (the file itself is no iterable)
            return {key[len(prefix) :]: file.get_tensor(key).float() for key in keys}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{socket}: {path} cannot be read as safetensors: {error}. It is missing or its download was cut off: "
            "get it again."
        ) from error


def read_folder_weights(folder: Path, socket: str) -> dict[str, torch.Tensor]:
    """The tensors of a model folder, in one file or in shards, in float32. Raises ValueError as `read_weights`."""
    if has_file(folder, WEIGHTS):
        return read_weights(folder / WEIGHTS, socket)
    files = read_json(folder / SHARDS, socket).get("weight_map")
    names = set(files.values()) if isinstance(files, dict) and all(map(_is_shard, files.values())) else set()
    if not names:
        raise ValueError(f"{socket}: {folder / SHARDS} does not say which files hold the weights. Get it again.")
    return {key: tensor for name in sorted(names) for key, tensor in read_weights(folder / name, socket).items()}


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and is_plain_name(name) and name.endswith(".safetensors")


def read_network(
    kind: ModelKind, folder: Path, weights: dict[str, torch.Tensor] | None = None, **options
) -> torch.nn.Module:
    """A network with exactly these weights, those of its folder if none are given, in float32.

    `options` go to its class in transformers.

    Raises ValueError: it is of another kind, its configuration cannot be, or a weight is missing, left over or of
    another shape.
    """
    import transformers

    settings = read_json(folder / CONFIG, kind.socket)
    if settings.get("model_type") != kind.model_type:
        raise ValueError(
            f"{kind.socket}: {folder} holds a model of type '{settings.get('model_type')}', not '{kind.model_type}'. "
            f"Choose a {kind.words}."
        )
    try:
        config = getattr(transformers, kind.config).from_dict(settings)
    except Exception as error:  # each class checks by means of its own
        raise ValueError(f"{kind.socket}: {folder / CONFIG} is no {kind.words}'s: {error}. Get it again.") from error
    weights = read_folder_weights(folder, kind.socket) if weights is None else weights
    # Older checkpoints store a constant that transformers now computes; the pooler of a ViT is not read.
    weights = {k: v for k, v in weights.items() if not k.endswith("position_ids") and not k.startswith("pooler.")}
    _check_sizes(config, sum(tensor.numel() for tensor in weights.values()), f"{kind.socket}: {folder / CONFIG}")
    network, report = getattr(transformers, kind.network).from_pretrained(
        None, config=config, state_dict=weights, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    wrong = (("missing_keys", "missing"), ("unexpected_keys", "left over"), ("mismatched_keys", "of another shape"))
    problems = [
        f"{len(report[found])} {words} ({', '.join(str(key) for key in sorted(report[found])[:3])})"
        for found, words in wrong
        if report[found]
    ]
    if problems:
        raise ValueError(
            f"{kind.socket}: the weights in {folder} are not those of its {kind.words}: {', '.join(problems)}. Get the "
            f"folder of a {kind.words} again."
        )
    return network


def _check_sizes(config: "PretrainedConfig", elements: int, file: str) -> None:
    """Raise ValueError unless the sizes are possible and fit `elements` weights: building an absurd model takes minutes."""
    for part in [getattr(config, name, None) for name in ("vision_config", "text_config")] + [config]:
        layers, width, inner, heads = (
            getattr(part, f"{name}", None)
            for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        )
        if layers is None:  # the parts hold them
            continue
        sizes = {
            "num_hidden_layers": layers,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_attention_heads": heads,
        }
        for name in ("image_size", "patch_size", "vocab_size", "max_position_embeddings"):
            if hasattr(part, name):
                sizes[name] = getattr(part, name)
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{file} has {name} {value!r}, which no model has. Get it again.")
        rows = sizes.get("vocab_size", 0) + sizes.get("max_position_embeddings", 0)
        if "image_size" in sizes:
            rows += (sizes["image_size"] // sizes["patch_size"]) ** 2 + 3 * sizes["patch_size"] ** 2
        needed = layers * width * (4 * width + 2 * inner) + rows * width
        if width % heads or needed > elements:
            raise ValueError(
                f"{file} has sizes that do not belong to the weights: {layers} layers of width {width} with {heads} heads "
                f"take at least {needed} numbers, and there are {elements}. Get the folder again."
            )


def read_tokenizer(kind: ModelKind, folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a folder. Raises ValueError, naming its files, if they are damaged."""
    import transformers

    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"]
    for name in names:
        if has_file(folder, name):
            read_json(folder / name, kind.socket)
    try:
        return getattr(transformers, kind.tokenizer).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers' library raises nothing more special
        present = [name for name in (*names, "vocab.txt", "merges.txt") if has_file(folder, name)]
        raise ValueError(
            f"{kind.socket}: the tokenizer in {folder} cannot be read: {error}. Get its files again: {', '.join(present)}."
        ) from error


def read_picture_preparation(kind: ModelKind, folder: Path, size: int) -> "BaseImageProcessor":
    """What prepares pictures for a network that takes them `size` pixels wide and high.

    Raises ValueError, naming its file: it is damaged or makes pictures of another size.
    """
    import transformers

    settings, path = read_image_processor(folder, kind.socket)
    words = f"{kind.socket}: {path} does not prepare pictures for its {kind.words}"
    for name in ("size", "crop_size"):
        sides = settings[name].values() if isinstance(settings.get(name), dict) else [settings.get(name)]
        if any(isinstance(side, (int, float)) and not 1 <= side <= LARGEST_SIDE for side in sides):
            raise ValueError(f"{words}: its {name} is {settings[name]}. Get it again.")
    try:
        prepare = getattr(transformers, kind.image_processor).from_dict(settings)
        pixels = prepare(
            images=[np.zeros((24, 32, 3), np.uint8)], input_data_format="channels_last", return_tensors="pt"
        )
        made = list(pixels.pixel_values.shape)
    except Exception as error:  # what a wrong setting raises depends on the setting
        raise ValueError(f"{words}: {error}. Get it again.") from error
    if made != [1, 3, size, size]:
        raise ValueError(f"{words}: it makes {made[-1]}x{made[-2]}, the model takes {size}x{size}. Get it again.")
    return prepare
