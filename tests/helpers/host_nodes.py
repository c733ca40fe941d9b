"""The host's own nodes that take a MODEL and give one, each run on small inputs: found in its registry, so new ones too."""

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from patch_catalogue import lora_tensors, random
from small_unet import CONFIG, conditioning, latent, small_model
from tiny_clip import tiny_clip

import nodes as core

# Sockets that no small input for a UNet fits: networks of other architectures, sound, video.
ELSEWHERE = {"MODEL_PATCH", "AUDIO", "AUDIO_ENCODER_OUTPUT", "CLIP_VISION_OUTPUT", "COMFY_DYNAMICCOMBO_V3"}
COMPILES = {"TorchCompileModel"}  # for a quarter of a minute; compiled models have tests of their own
# Of a widget whose default is no value that matters for a small picture, or of which it leaves the node without effect.
CHOSEN = {
    ("PatchModelAddDownscale", "block_number"): 2,
    ("ContextWindowsManual", "dim"): 3,
    ("EasyCache", "reuse_threshold"): 0.2,
    ("HyperTile", "tile_size"): 32,
    ("HyperTile", "swap_size"): 1,
}


@cache
def _registry() -> dict:
    with ThreadPoolExecutor(1) as thread:  # the browser tests leave a loop that runs in this one
        thread.submit(asyncio.run, core.init_builtin_extra_nodes()).result()
    return core.NODE_CLASS_MAPPINGS


def _sockets(node) -> dict[str, tuple]:
    """(type, options) by the name of an input."""
    declared = node.INPUT_TYPES()
    inputs = {**declared.get("required", {}), **declared.get("optional", {})}
    return {name: (kind[0], kind[1] if len(kind) > 1 else {}) for name, kind in inputs.items()}


def model_nodes() -> list[str]:
    """Names of the host's MODEL to MODEL nodes that a UNet can be put into, one for each way of changing it.

    Nodes that differ in their widgets alone, as those that merge models block by block, count as one.
    """
    found = {}
    for name, node in sorted(_registry().items(), key=lambda item: len(item[0])):
        if name in COMPILES or "MODEL" not in node.RETURN_TYPES:
            continue
        kinds = {kind for kind, _ in _sockets(node).values() if isinstance(kind, str)}
        if "MODEL" in kinds and not kinds & ELSEWHERE:
            function = getattr(node, "execute", None) or getattr(node, node.FUNCTION)
            found.setdefault(getattr(function, "__func__", function), name)
    return sorted(found.values())


class Inputs:
    """Small inputs by socket type. `folder`: for the files that loaders read."""

    def __init__(self, model: comfy.model_patcher.ModelPatcher, folder):
        self.model = model
        self.second = small_model(seed=3)
        for weight in self.second.model.parameters():
            weight.data *= 0.5  # in a sum of both, rounding does not grow along a trajectory
        self.files = {"lora_name": "loras", "hypernetwork_name": "hypernetworks"}
        for kind in self.files.values():
            (folder / kind).mkdir()
            folder_paths.add_model_folder_path(kind, str(folder / kind), is_default=True)
        comfy.utils.save_torch_file(lora_tensors(model), str(folder / "loras" / "small.safetensors"))
        widths = (CONFIG["model_channels"], 2 * CONFIG["model_channels"])
        small = {
            width: [
                {"linear.0.weight": random(width, width, seed=seed, scale=0.01), "linear.0.bias": torch.zeros(width)}
            ]
            * 2
            for seed, width in enumerate(widths, start=1)
        }
        torch.save(
            {"activation_func": "linear", "is_layer_norm": False, "use_dropout": False, **small},
            str(folder / "hypernetworks" / "small.pt"),
        )

    def of(self, socket: str, kind, options: dict, node: str):
        """A value for one input."""
        if (node, socket) in CHOSEN:
            return CHOSEN[node, socket]
        if socket in self.files:
            return folder_paths.get_filename_list(self.files[socket])[0]
        if kind == "MODEL":
            return self.second
        if isinstance(kind, list) or kind == "COMBO":
            choices = kind if isinstance(kind, list) else options["options"]
            return options.get("default", choices[0])
        if "default" in options:
            return options["default"]
        made = {
            "CLIP": tiny_clip,
            "CONDITIONING": conditioning,
            "LATENT": latent,
            "IMAGE": lambda: torch.rand(1, 64, 64, 3),
            "MASK": lambda: torch.ones(1, 64, 64),
            "SIGMAS": lambda: torch.linspace(10, 0, 4),
            "VAE": lambda: None,
            "LATENT_OPERATION": lambda: lambda latent, **_: latent * 0.9,
            "LORA_MODEL": lambda: lora_tensors(self.model),
        }
        return made[kind]()


def patched(name: str, inputs: Inputs, model: comfy.model_patcher.ModelPatcher):
    """The MODEL that a node of the host makes of `model`."""
    node = _registry()[name]
    values = {
        socket: model if kind == "MODEL" and socket in ("model", "model1") else inputs.of(socket, kind, options, name)
        for socket, (kind, options) in _sockets(node).items()
    }
    function = getattr(node if inspect.ismethod(getattr(node, node.FUNCTION)) else node(), node.FUNCTION)
    output = function(**values)
    output = getattr(output, "result", output)
    return output[list(node.RETURN_TYPES).index("MODEL")]
