"""Where BLIP captioning models live on disk: names, folders, what must be in them."""

from pathlib import Path

import folder_paths

from . import model_files
from .model_files import CONFIG, PICKLES, PREPROCESSOR, WEIGHTS

FOLDER_NAME = "blip"
DEMO = "demo"
WELL_KNOWN = ("Salesforce/blip-image-captioning-base", "Salesforce/blip-image-captioning-large")

TOKENIZERS = ("tokenizer.json", "vocab.txt")
ARTEFACTS = (CONFIG, WEIGHTS, PREPROCESSOR, *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json")


def register_blip_folder() -> None:
    """Make `models/blip` known to ComfyUI, beside any `blip` folder of extra_model_paths.yaml or of another pack."""
    model_files.register_folder(FOLDER_NAME, FOLDER_NAME)


def captioner_names() -> list[str]:
    """The demo's captioner, the folders below `models/blip`, then the well-known ids that can be downloaded."""
    folders = set()
    for base in map(Path, folder_paths.get_folder_paths(FOLDER_NAME)):
        if base.is_dir():
            folders.update(child.name for child in base.iterdir() if child.is_dir() and not child.name.startswith("."))
    return [DEMO, *sorted(folders - {DEMO}), *WELL_KNOWN]


def captioner_folder(model_name: str) -> Path:
    """The folder that `model_name` stands for, whether or not it exists.

    A well-known id stands for the folder of the same last part, which is also where it is downloaded to.

    Raises:
        ValueError: the name points outside the blip folders.
    """
    name = model_name.rsplit("/", 1)[-1] if model_name in WELL_KNOWN else model_name
    if not model_files.is_plain_name(name):
        raise ValueError(
            f"model_name: '{model_name}' is not the name of a folder in models/blip. Choose a name from the list."
        )
    bases = [Path(base) for base in folder_paths.get_folder_paths(FOLDER_NAME)]
    return next((base / name for base in bases if (base / name).is_dir()), bases[0] / name)


def missing_files(folder: Path, weights: bool = True) -> list[str]:
    """What a BLIP folder lacks, as names to show to the user; empty if it is complete."""
    missing = [name for name in (CONFIG, PREPROCESSOR) if not (folder / name).is_file()]
    if weights and not (folder / WEIGHTS).is_file():
        missing.append(WEIGHTS)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        missing.append(" or ".join(TOKENIZERS))
    return missing


def require_complete(folder: Path, model_name: str) -> None:
    """Raise a ValueError that says what to do unless `folder` holds a whole BLIP model."""
    source = next((repo_id for repo_id in WELL_KNOWN if repo_id.endswith("/" + folder.name)), None)
    by_tick = f" Or choose '{source}' and tick allow_download." if source else ""
    needed = f"{CONFIG}, {WEIGHTS}, {PREPROCESSOR} and {TOKENIZERS[0]} (or {TOKENIZERS[1]})"
    if not folder.is_dir():
        raise ValueError(
            f"model_name: there is no captioner '{model_name}'. Put {needed} of a BLIP captioning model into the "
            f"folder {folder}.{by_tick}"
        )
    missing = missing_files(folder)
    if not missing:
        return
    pickle = next((name for name in PICKLES if (folder / name).is_file()), None)
    if missing == [WEIGHTS] and pickle:
        raise ValueError(
            f"model_name: {folder} has its weights only as {pickle}, a pickle, which can run code and is never read "
            f"here. Get {WEIGHTS} instead, or, if you trust the file, convert it once in ComfyUI's Python: "
            "from transformers import BlipForConditionalGeneration as B; "
            f"B.from_pretrained(r'{folder}').save_pretrained(r'{folder}')"
        )
    raise ValueError(
        f"model_name: the captioner folder {folder} is incomplete. Missing: {', '.join(missing)}. "
        f"Put them there.{by_tick}"
    )


def fingerprint(model_name: str) -> str:
    """Changes whenever the chosen captioner's files change, so that ComfyUI loads them again."""
    if model_name == DEMO:
        return DEMO
    folder = captioner_folder(model_name)
    return model_files.fingerprint(folder / name for name in ARTEFACTS)
