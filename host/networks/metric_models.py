"""The networks that judge edits: CLIP and DINO through transformers, LPIPS on torchvision's SqueezeNet.

All run in fp32 and are loaded and offloaded by ComfyUI's model management. Pictures are [B, H, W, 3] in 0..1.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ...editing.inputs import rgb_bytes
from ...editing.metrics import perceptual_distance
from .model_kinds import CLIP, DINO, complete_folder, lpips_file
from .transformers_models import HeldNetwork, read_network, read_picture_preparation, read_tokenizer, read_weights

if TYPE_CHECKING:  # importing transformers takes seconds, and most runs never measure
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast, PretrainedConfig, ViTModel

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ClipJudge(HeldNetwork):
    """How well pictures fit texts, by CLIP (Radford et al. 2021)."""

    def __init__(self, clip: "CLIPModel", tokenizer: "CLIPTokenizerFast", image_processor: "CLIPImageProcessor"):
        super().__init__(clip)
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    def similarity(self, pictures: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """100 times the cosine of each picture with each text: [B, texts]."""
        device = self.load(len(pictures) * vit_bytes(self.network.config.vision_config))
        longest = self.network.config.text_config.max_position_embeddings
        words = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        pixels = self.image_processor(
            images=list(rgb_bytes(pictures)), input_data_format="channels_last", return_tensors="pt"
        )
        seen = self.network(
            input_ids=words.input_ids.to(device),
            attention_mask=words.attention_mask.to(device),
            pixel_values=pixels.pixel_values.to(device, torch.float32),
        )
        # Both are of unit length.
        return (100 * seen.image_embeds @ seen.text_embeds.T).cpu()


class DinoJudge(HeldNetwork):
    """Structure as Splice sees it (Tumanyan et al., CVPR 2022): the keys of a DINO vision transformer's last layer."""

    SHORT_SIDE, LONGEST_SIDE = 224, 480

    def __init__(self, vit: "ViTModel"):
        super().__init__(vit)
        # Its name differs between versions of transformers; the last one registered is the last layer's.
        self.key_projection = [
            module for name, module in vit.named_modules() if name.rsplit(".", 1)[-1] in ("k_proj", "key")
        ][-1]

    def keys(self, pictures: torch.Tensor, value_range: float = 1.0) -> torch.Tensor:
        """The keys of all heads side by side, the class token's first: [B, 1 + patches, width].

        `value_range`: 255 leaves out the division by 255 before the normalization, as the code of PIE-Bench does.
        """
        size = self._size(*pictures.shape[1:3])
        device = self.load(len(pictures) * vit_bytes(self.network.config, size))
        picture = pictures.movedim(-1, 1).float().to(device)
        picture = F.interpolate(picture, size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (picture.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        kept = []
        hook = self.key_projection.register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            self.network(pixel_values=(picture * value_range - mean) / std, interpolate_pos_encoding=True)
        finally:
            hook.remove()
        return kept[0].cpu()

    def _size(self, height: int, width: int) -> tuple[int, int]:
        short, long = sorted((height, width))
        size = (self.SHORT_SIDE, int(self.SHORT_SIDE * long / short))
        if size[1] > self.LONGEST_SIDE:
            size = (int(self.LONGEST_SIDE * size[0] / size[1]), self.LONGEST_SIDE)
        return size if height <= width else size[::-1]


class LpipsNetwork(torch.nn.Module):
    """The layers of LPIPS "squeeze" v0.1 with the parameter names of the `lpips` package's own state dict."""

    SLICES = ((0, 2), (2, 5), (5, 8), (8, 10), (10, 11), (11, 12), (12, 13))
    CHANNELS = (64, 128, 256, 384, 384, 512, 512)

    def __init__(self):
        from torchvision.models import squeezenet1_1

        super().__init__()
        layers = squeezenet1_1(weights=None).features
        self.scaling_layer = torch.nn.Module()
        self.scaling_layer.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.scaling_layer.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.net = torch.nn.Module()
        for number, ((start, end), channels) in enumerate(zip(self.SLICES, self.CHANNELS)):
            part = torch.nn.Sequential()
            for layer in range(start, end):
                part.add_module(str(layer), layers[layer])
            setattr(self.net, f"slice{number + 1}", part)
            weights = torch.nn.Module()
            weights.model = torch.nn.ModuleDict({"1": torch.nn.Conv2d(channels, 1, 1, bias=False)})
            setattr(self, f"lin{number}", weights)

    def features(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """The seven layers' outputs for [B, 3, H, W] in 0..1."""
        x = (2 * pictures - 1 - self.scaling_layer.shift) / self.scaling_layer.scale
        kept = []
        for number in range(len(self.SLICES)):
            x = getattr(self.net, f"slice{number + 1}")(x)
            kept.append(x)
        return kept

    def channel_weights(self) -> list[torch.Tensor]:
        return [getattr(self, f"lin{number}").model["1"].weight.flatten() for number in range(len(self.SLICES))]


class LpipsJudge(HeldNetwork):
    """Perceptual distance (Zhang et al., CVPR 2018) on SqueezeNet, the network PIE-Bench takes."""

    SMALLEST = 32
    BYTES_PER_PIXEL = 400
    """About what the features of the two pictures take."""

    def distance(self, source: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
        """LPIPS of pictures [B, H, W, 3]: [B], 0 for the same. Raises ValueError for pictures under 32 pixels."""
        if min(source.shape[1:3]) < self.SMALLEST:
            raise ValueError(f"source: LPIPS needs pictures of at least {self.SMALLEST} by {self.SMALLEST} pixels.")
        device = self.load(self.BYTES_PER_PIXEL * source[..., 0].numel())
        features = [self.network.features(pictures.movedim(-1, 1).float().to(device)) for pictures in (source, edited)]
        return perceptual_distance(*features, self.network.channel_weights()).cpu()


def vit_bytes(config: "PretrainedConfig", size: tuple[int, int] | None = None) -> int:
    """About what one picture of a vision transformer takes to compute, in fp32; `size` if it is not the usual one."""
    height, width = size or (config.image_size, config.image_size)
    tokens = (height // config.patch_size) * (width // config.patch_size) + 1
    return 4 * tokens * (2 * config.num_attention_heads * tokens + config.intermediate_size + 4 * config.hidden_size)


def load_clip(name: str, allow_download: bool = False) -> ClipJudge:
    """The CLIP model that a user chose from `model_names(CLIP)`. Raises ValueError if it cannot be read."""
    folder = complete_folder(CLIP, name, allow_download)
    clip = read_network(CLIP, folder)
    size = clip.config.vision_config.image_size
    return ClipJudge(clip, read_tokenizer(CLIP, folder), read_picture_preparation(CLIP, folder, size))


def load_dino(name: str, allow_download: bool = False) -> DinoJudge:
    """The ViT that a user chose from `model_names(DINO)`. Raises ValueError if it cannot be read."""
    return DinoJudge(read_network(DINO, complete_folder(DINO, name, allow_download), add_pooling_layer=False))


def load_lpips(name: str) -> LpipsJudge:
    """The LPIPS file that a user chose from `lpips_names()`. Raises ValueError if it cannot be read.

    It is the state dict of `lpips.LPIPS(net="squeeze")`, saved with `safetensors.torch.save_file`.
    """
    path = lpips_file(name)
    network = LpipsNetwork()
    # The package lists its linear layers a second time, under "lins".
    weights = {key: value for key, value in read_weights(path, "lpips_model").items() if not key.startswith("lins.")}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"lpips_model: {path} does not hold the weights of LPIPS on SqueezeNet. Make it once, where the lpips package "
            "is installed, from the state_dict() of lpips.LPIPS(net='squeeze') with safetensors.torch.save_file."
        ) from error
    return LpipsJudge(network)
