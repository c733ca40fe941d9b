"""Figures of edits by transformers and torchvision alone, on models of `tiny_judges`."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tiny_judges import lpips_state_dict, make_clip_folder, make_dino_folder, make_lpips_file

TEXTS = ["a photo of a cat", "a photo of a dog"]


def pictures(count, height=40, width=56, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 5, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bilinear").movedim(1, -1)


def box_mask(height=40, width=56):
    mask = torch.zeros(1, height, width)
    mask[:, 8:24, 10:30] = 1
    return mask


def clip_similarity(folder, image, text):
    """100 times the cosine, by the library's own preprocessing and its two separate encoders."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

    clip = CLIPModel.from_pretrained(folder).eval()
    picture = Image.fromarray((image.numpy() * 255).round().astype(np.uint8))
    pixels = CLIPImageProcessor.from_pretrained(folder)(images=picture, return_tensors="pt")
    words = CLIPTokenizerFast.from_pretrained(folder)(text, return_tensors="pt", truncation=True, max_length=12)
    with torch.no_grad():
        seen = clip.visual_projection(clip.vision_model(**pixels).pooler_output)[0].double()
        read = clip.text_projection(clip.text_model(**words).pooler_output)[0].double()
    return 100 * (seen @ read / (seen.norm() * read.norm())).item()


def dino_keys(folder, image, value_range=1.0):
    """The last layer's keys by hand: torchvision's preprocessing, and the key weights on the layer's normalized input."""
    from torchvision.transforms import Normalize, Resize
    from transformers import ViTModel

    picture = Resize(224, max_size=480)(image.movedim(-1, 0) * value_range)
    picture = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(picture)[None]
    vit = ViTModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = vit(picture, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    last = {
        key.split(".2.", 1)[1]: value for key, value in load_file(folder / "model.safetensors").items() if ".2." in key
    }
    x = F.layer_norm(states[-2], (16,), last["layernorm_before.weight"], last["layernorm_before.bias"], 1e-12)
    return x @ last["attention.attention.key.weight"].T + last["attention.attention.key.bias"]


def lpips_distance(a, b):
    """Layer by layer on torchvision's whole SqueezeNet, pictures [H, W, 3] in 0..1."""
    from torchvision.models import squeezenet1_1

    weights = lpips_state_dict()
    network = squeezenet1_1(weights=None).features
    network.load_state_dict(
        {key.split(".", 2)[2]: value for key, value in weights.items() if key.startswith("net.")}, strict=True
    )
    total = 0.0
    x, y = (
        ((t.movedim(-1, 0)[None] * 2 - 1) - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
        for t in (a, b)
    )
    taps = iter(range(7))
    for number, layer in enumerate(network):
        x, y = layer(x), layer(y)
        if number in (1, 4, 7, 9, 10, 11, 12):
            p, q = (t.double() / t.double().norm(dim=1, keepdim=True) for t in (x, y))
            w = weights[f"lin{next(taps)}.model.1.weight"].double()
            total += ((p - q) ** 2 * w).sum(1).mean().item()
    return total


def make_judges(base):
    """Folders of tiny CLIP and DINO models and a file of LPIPS below `base`."""
    for seed in range(20):  # until its similarities are positive, so that none is reported as 0
        make_clip_folder(base / "clip", seed)
        seen = pictures(1, seed=1)[0], (pictures(1, seed=1) * box_mask()[..., None])[0]
        if min(clip_similarity(base / "clip", image, text) for image in seen for text in TEXTS) > 0:
            break
    make_dino_folder(base / "dino")
    make_lpips_file(base / "lpips.safetensors")
    return base
