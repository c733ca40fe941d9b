"""Where BLIP captioning models live on disk: names, folders, what must be in them, and the download a user ticks."""

import logging
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths

logger = logging.getLogger(__name__)

FOLDER_NAME = "blip"
DEMO = "demo"
WELL_KNOWN = ("Salesforce/blip-image-captioning-base", "Salesforce/blip-image-captioning-large")

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
TOKENIZERS = ("tokenizer.json", "vocab.txt")
PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt")
ARTEFACTS = (CONFIG, WEIGHTS, PREPROCESSOR, *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json")


def register_blip_folder() -> None:
    """Make `models/blip` known to ComfyUI, beside any `blip` folder of extra_model_paths.yaml or of another pack."""
    default = str(Path(folder_paths.models_dir) / FOLDER_NAME)
    paths, _ = folder_paths.folder_names_and_paths.setdefault(FOLDER_NAME, ([default], {".safetensors"}))
    if default not in paths:
        paths.append(default)


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
    # Checked as text and not resolved: a model folder that is a link to another disk is fine, "../x" is not.
    if name in ("", ".", "..") or any(len(path(name).parts) != 1 for path in (PurePosixPath, PureWindowsPath)):
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


def safetensors_revision(repo_id: str) -> str:
    """The revision of `repo_id` that holds safetensors: main, else the hub's own automatic conversion.

    Raises:
        FileNotFoundError: the repository offers its weights only as a pickle.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    if api.file_exists(repo_id, WEIGHTS):
        return "main"
    for discussion in api.get_repo_discussions(repo_id, author="SFconvertbot", discussion_type="pull_request"):
        revision = f"refs/pr/{discussion.num}"
        if discussion.status != "closed" and api.file_exists(repo_id, WEIGHTS, revision=revision):
            return revision
    raise FileNotFoundError(f"it offers no {WEIGHTS}, and other weights are never read")


def download_captioner(repo_id: str, folder: Path) -> None:
    """Fetch the safetensors, configuration and tokenizer files of `repo_id` into `folder`, nothing else.

    Raises:
        ValueError: the download failed; a later run goes on where it stopped.
    """
    from huggingface_hub import snapshot_download

    try:
        revision = safetensors_revision(repo_id)
        logger.info("Downloading %s (revision %s) from the Hugging Face hub to %s", repo_id, revision, folder)
        snapshot_download(repo_id, revision=revision, local_dir=folder, allow_patterns=list(ARTEFACTS))
    except Exception as error:  # the hub's client has no common base class, and raises that of its HTTP library
        raise ValueError(
            f"allow_download: {repo_id} could not be downloaded to {folder}: {error}. Check the network and run again, "
            f"or put these files there by hand: {', '.join(ARTEFACTS)}."
        ) from error
    logger.info("The captioner %s is in %s", repo_id, folder)


def fingerprint(model_name: str) -> str:
    """Changes whenever the chosen captioner's files change, so that ComfyUI loads them again."""
    if model_name == DEMO:
        return DEMO
    folder = captioner_folder(model_name)
    stats = [(path.name, path.stat()) for path in (folder / name for name in ARTEFACTS) if path.is_file()]
    return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
