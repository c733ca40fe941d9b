"""Where the networks that judge edits live on disk: names, folders, what must be in them.

`models/pix2pix_zero/metrics` holds a folder per CLIP or DINO model, in the layout of Hugging Face transformers, and LPIPS as
plain .safetensors files. CLIP folders of that layout below `models/clip_vision` are offered too.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from . import model_files
from .model_files import CONFIG, PICKLES, PREPROCESSOR, WEIGHTS

FOLDER_NAME = "pix2pix_zero_metrics"
PLACE = "models/pix2pix_zero/metrics"
NONE = "none"

TOKENIZERS = ("tokenizer.json", "vocab.json and merges.txt")


@dataclass(frozen=True)
class ModelKind:
    """A kind of network: the socket it is chosen at, its `model_type` in config.json, and what a folder of it holds."""

    socket: str
    words: str
    model_type: str
    needed: tuple[str, ...]
    tokenizer: bool
    well_known: tuple[str, ...]
    borrowed: str = ""
    """Another folder of ComfyUI in which folders of this kind may lie."""

    @property
    def artefacts(self) -> tuple[str, ...]:
        """The files that are downloaded."""
        tokenizer = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
        return (*self.needed, *(tokenizer if self.tokenizer else ()))


CLIP = ModelKind(
    "clip_model",
    "CLIP model",
    "clip",
    (CONFIG, WEIGHTS, PREPROCESSOR),
    True,
    ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32"),
    "clip_vision",
)
DINO = ModelKind(
    "dino_model",
    "DINO vision transformer",
    "vit",
    (CONFIG, WEIGHTS),
    False,
    ("facebook/dino-vitb8", "facebook/dino-vits8"),
)


def register_metrics_folder() -> None:
    """Make `models/pix2pix_zero/metrics` known to ComfyUI, beside any of extra_model_paths.yaml."""
    model_files.register_folder(FOLDER_NAME, "pix2pix_zero", "metrics")


def model_names(kind: ModelKind) -> list[str]:
    """ "none", the user's folders that may hold this kind of model, then the well-known ids that can be downloaded."""
    own = {child.name for child in _folders(FOLDER_NAME) if model_type(child) in (kind.model_type, None)}
    borrowed = {child.name for child in _borrowed(kind)}
    return [NONE, *sorted((own | borrowed) - {NONE}), *kind.well_known]


def lpips_names() -> list[str]:
    """ "none" and the .safetensors files in `models/pix2pix_zero/metrics`."""
    bases = map(Path, folder_paths.get_folder_paths(FOLDER_NAME))
    return [NONE, *sorted({path.name for base in bases for path in base.glob("*.safetensors")})]


def lpips_file(name: str) -> Path:
    """The LPIPS weights that `name` stands for. Raises ValueError if there is no such file."""
    _check_name(name, "lpips_model")
    bases = [Path(base) for base in folder_paths.get_folder_paths(FOLDER_NAME)]
    path = next((base / name for base in bases if (base / name).is_file()), None)
    if path is None:
        raise ValueError(f"lpips_model: there is no file '{name}' in {bases[0]}. Choose a name from the list.")
    return path


def model_folder(kind: ModelKind, name: str) -> Path:
    """The folder that `name` stands for, whether or not it exists; a well-known id's is named after its last part.

    Raises:
        ValueError: the name points outside the folders for models.
    """
    last = name.rsplit("/", 1)[-1] if name in kind.well_known else name
    _check_name(last, kind.socket)
    bases = [Path(base) for base in folder_paths.get_folder_paths(FOLDER_NAME)]
    own = next((base / last for base in bases if (base / last).is_dir()), None)
    borrowed = next((child for child in _borrowed(kind) if child.name == last), None)
    return own or borrowed or bases[0] / last


def complete_folder(kind: ModelKind, name: str, allow_download: bool) -> Path:
    """The folder of a whole model, downloaded first if the user ticked that and it is a well-known one.

    Raises:
        ValueError: the folder is missing, incomplete or outside the folders for models, or the download failed.
    """
    folder = model_folder(kind, name)
    repo_id = next((repo_id for repo_id in kind.well_known if repo_id.endswith("/" + folder.name)), None)
    if allow_download and name in kind.well_known and missing_files(kind, folder):
        model_files.download_model(name, folder, kind.artefacts)
    missing = missing_files(kind, folder)
    if not missing:
        return folder
    by_tick = f" Or choose '{repo_id}' and tick allow_download." if repo_id else ""
    if not folder.is_dir():
        raise ValueError(
            f"{kind.socket}: there is no {kind.words} '{name}'. Put {', '.join(missing)} of one into the folder {folder}."
            f"{by_tick}"
        )
    pickle = next((file for file in PICKLES if (folder / file).is_file()), None)
    if WEIGHTS in missing and pickle:
        raise ValueError(
            f"{kind.socket}: {folder} has its weights only as {pickle}, a pickle, which can run code and is never read "
            f"here. Get {WEIGHTS} instead.{by_tick}"
        )
    raise ValueError(f"{kind.socket}: the folder {folder} is incomplete. Missing: {', '.join(missing)}.{by_tick}")


def missing_files(kind: ModelKind, folder: Path) -> list[str]:
    """What a folder lacks to be a model of this kind, as names to show to the user; empty if it is complete."""
    missing = [name for name in kind.needed if not (folder / name).is_file()]
    if kind.tokenizer and not any(
        all((folder / name).is_file() for name in choice.split(" and ")) for choice in TOKENIZERS
    ):
        missing.append(" or ".join(TOKENIZERS))
    return missing


def fingerprint(kind: ModelKind | None, name: str) -> str:
    """Changes whenever the chosen model's files change; `kind` is None for LPIPS."""
    if name == NONE:
        return NONE
    paths = [lpips_file(name)] if kind is None else [model_folder(kind, name) / file for file in kind.artefacts]
    return model_files.fingerprint(paths)


def _check_name(name: str, socket: str) -> None:
    if not model_files.is_plain_name(name):
        raise ValueError(f"{socket}: '{name}' is not the name of a model in {PLACE}. Choose a name from the list.")


def _folders(folder_name: str) -> list[Path]:
    bases = [Path(base) for base in folder_paths.get_folder_paths(folder_name)]
    children = (child for base in bases if base.is_dir() for child in base.iterdir())
    return [child for child in children if child.is_dir() and not child.name.startswith(".")]


def _borrowed(kind: ModelKind) -> list[Path]:
    if not kind.borrowed:
        return []
    return [child for child in _folders(kind.borrowed) if model_type(child) == kind.model_type]


def model_type(folder: Path) -> str | None:
    """The `model_type` of a folder's config.json; None where there is none to read."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
