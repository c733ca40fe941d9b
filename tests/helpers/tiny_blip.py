"""A tiny BLIP with random weights, as a user's folder holds it."""

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"a photo of the cat dog in on grass red big".split()]


def make_blip_folder(folder, seed=0):
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

    torch.manual_seed(seed)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(WORDS), "encoder_hidden_size": 32, "max_position_embeddings": 24, "pad_token_id": 0,
            "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "initializer_range": 1.0}  # fmt: skip
    config = BlipConfig(
        text_config={**small, **text},
        vision_config={**small, "image_size": 32, "patch_size": 8, "initializer_range": 1.0},
        initializer_range=1.0,
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    (folder / "vocab.txt").unlink()
    tokenizer.save_pretrained(folder)


def in_the_hubs_cache(folder):
    inside = folder / "snapshots" / "0123"
    inside.mkdir(parents=True)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(inside / path.name)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123")


def pictures(count, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 3, 3, generator=generator)
    return torch.nn.functional.interpolate(coarse, (40, 56), mode="bilinear").movedim(1, -1)
