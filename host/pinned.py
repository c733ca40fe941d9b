"""The models that can be downloaded: the commit that each of their files comes from, and what the file must be."""

from collections.abc import Mapping
from typing import NamedTuple


class Pin(NamedTuple):
    """Where a file comes from: a commit on the hub, and the SHA-256 of its content in hexadecimal digits.

    `sha256` None: not known here; the file is compared with what the hub itself names for it at that commit.
    """

    commit: str
    sha256: str | None


def _at(commit: str, files: Mapping[str, str | None]) -> dict[str, Pin]:
    return {name: Pin(commit, sha256) for name, sha256 in files.items()}


_OF_CLIP = {
    "preprocessor_config.json": "910e70b3956ac9879ebc90b22fb3bc8a75b6a0677814500101a4c072bd7857bd",
    "special_tokens_map.json": "f8c0d6c39aee3f8431078ef6646567b0aba7f2246e9c54b8b99d55c22b707cbf",
}
# Salesforce/blip-image-captioning-base and facebook/dino-vit*8 are not here: no commit of theirs with safetensors is known.
PINNED: dict[str, dict[str, Pin]] = {
    "Salesforce/blip-image-captioning-large": _at(
        "2227ac38c9f16105cb0412e7cab4759978a8fd90",
        dict.fromkeys(
            (
                "config.json",
                "model.safetensors",
                "preprocessor_config.json",
                "tokenizer.json",
                "vocab.txt",
                "tokenizer_config.json",
                "special_tokens_map.json",
            )
        ),
    ),
    "openai/clip-vit-large-patch14": _at(
        "32bd64288804d66eefd0ccbe215aa642df71cc41",
        _OF_CLIP
        | {
            "config.json": "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a",
            "model.safetensors": "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
            "tokenizer.json": "a83e0809aa4c3af7208b2df632a7a69668c6d48775b3c3fe4e1b1199d1f8b8f4",
            "vocab.json": "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69",
            "merges.txt": "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
            "tokenizer_config.json": "deef455e52fa5e8151e339add0582e4235f066009601360999d3a9cda83b1129",
        },
    ),
    "openai/clip-vit-base-patch32": {
        # main has the weights only as a pickle, this is the hub's own conversion of them
        "model.safetensors": Pin(
            "eaee4c876b93e66f7fac584b529025a96d71ad66",
            "99d28a652e6ec46629ab7047a0ac82c69b1fe11e0ce672c43af65d3a9a3fc05d",
        ),
        **_at(
            "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
            _OF_CLIP
            | {
                "config.json": "b575ef3c36f2a057fa19e221650105052d61cc9c1a972ec15019c6261ec98770",
                "tokenizer.json": "b556ac8c99757ffb677208af34bc8c6721572114111a6e0aaf5fa69ff0b8d842",
                "vocab.json": "5047b556ce86ccaf6aa22b3ffccfc52d391ea4accdab9c2f2407da5b742d4363",
                "merges.txt": "f526393189112391ce6f9795d4695f704121ce452c3aad1f5335cc41337eba85",
                "tokenizer_config.json": "34b7336e4bee12e0a9730eaf5189f582ef3c3eea5027f65730e5717256755aad",
            },
        ),
    },
}
