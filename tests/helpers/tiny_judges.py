"""Tiny CLIP, DINO and LPIPS models with random weights, as a user's folders hold them."""

from pathlib import Path

import torch
from safetensors.torch import save_file

WORDS = ["a</w>", "photo</w>", "of</w>", "cat</w>", "dog</w>", "red</w>", "the</w>"]


def make_clip_folder(folder: Path, seed: int = 0) -> None:
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    letters = pre_tokenizers.ByteLevel.alphabet()
    merges = [tuple(pair) for word in WORDS for pair in _merges(word)]
    symbols = [*sorted(letters), *sorted(letter + "</w>" for letter in letters)]
    symbols += [left + right for left, right in merges if left + right not in symbols]
    vocabulary = list(dict.fromkeys([*symbols, "<|startoftext|>", "<|endoftext|>"]))
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(vocabulary), "max_position_embeddings": 12, "initializer_range": 1.0,
                     "bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1},
        vision_config={**small, "image_size": 32, "patch_size": 8, "initializer_range": 1.0},
        projection_dim=16,
        initializer_factor=3.0,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    _write_tokenizer(folder, vocabulary, merges)


def _merges(word: str) -> list[tuple[str, str]]:
    """The merges that build a word of the vocabulary from left to right."""
    letters = list(word.removesuffix("</w>"))
    letters[-1] += "</w>"
    pairs, built = [], letters[0]
    for letter in letters[1:]:
        pairs.append((built, letter))
        built += letter
    return pairs


def _write_tokenizer(folder: Path, vocabulary: list[str], merges: list[tuple[str, str]]) -> None:
    import json

    ids = {symbol: number for number, symbol in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in dict.fromkeys(merges))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_dino_folder(folder: Path, seed: int = 0, pooler: bool = True) -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=224, patch_size=32,
        initializer_range=0.3,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=pooler).save_pretrained(folder)


def lpips_state_dict(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights with the names and shapes of the state dict of `lpips.LPIPS(net="squeeze")`."""
    generator = torch.Generator().manual_seed(seed)

    def convolution(name, out, into, size):
        bound = (into * size * size) ** -0.5
        weights[f"{name}.weight"] = bound * torch.randn(out, into, size, size, generator=generator)
        weights[f"{name}.bias"] = 0.1 * torch.randn(out, generator=generator)

    weights = {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1),
    }
    convolution("net.slice1.0", 64, 3, 3)
    fires = [(2, 3, 64, 16, 64), (2, 4, 128, 16, 64), (3, 6, 128, 32, 128), (3, 7, 256, 32, 128), (4, 9, 256, 48, 192),
             (5, 10, 384, 48, 192), (6, 11, 384, 64, 256), (7, 12, 512, 64, 256)]  # fmt: skip
    for slice_, layer, into, squeeze, expand in fires:
        name = f"net.slice{slice_}.{layer}"
        convolution(f"{name}.squeeze", squeeze, into, 1)
        convolution(f"{name}.expand1x1", expand, squeeze, 1)
        convolution(f"{name}.expand3x3", expand, squeeze, 3)
    for number, channels in enumerate((64, 128, 256, 384, 384, 512, 512)):
        weights[f"lin{number}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator)
        weights[f"lins.{number}.model.1.weight"] = weights[f"lin{number}.model.1.weight"].clone()
    return weights


def make_lpips_file(path: Path, seed: int = 0) -> None:
    save_file(lpips_state_dict(seed), path)
