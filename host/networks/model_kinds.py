"""The kinds of networks a user may choose: where their folders lie, what must be in them, what is offered.

A folder has the layout of Hugging Face transformers, or is one of the hub's cache. LPIPS is a plain .safetensors file.
"""

import json
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths

from ..files import WEIGHTS, download_model, files_fingerprint, register_folder
from ..pinned import PINNED

CONFIG = "config.json"
SHARDS = "model.safetensors.index.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt")
NONE = "none"
DEMO = "demo"
METRICS_FOLDER = "pix2pix_zero_metrics"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelKind:
    """A kind of network: the socket it is chosen at and its classes in transformers."""

    socket: str
    words: str
    model_type: str
    """What its config.json calls it."""
    folder_name: str
    place: str
    """Its folder below `models`."""
    without: str
    """The first name of the list, for which there is no folder."""
    well_known: tuple[str, ...]
    """Ids on the hub; those that are pinned can be downloaded."""
    network: str
    config: str
    image_processor: str = ""
    tokenizer: str = ""
    vocabularies: tuple[tuple[str, ...], ...] = ()
    """The files a tokenizer is read from: all of one of these sets."""
    borrowed: str = ""
    """Another folder of ComfyUI in which folders of this kind may lie."""


BLIP = ModelKind(
    socket="model_name",
    words="BLIP captioning model",
    model_type="blip",
    folder_name="blip",
    place="models/blip",
    without=DEMO,
    well_known=("Salesforce/blip-image-captioning-base", "Salesforce/blip-image-captioning-large"),
    network="BlipForConditionalGeneration",
    config="BlipConfig",
    image_processor="BlipImageProcessor",
    tokenizer="BertTokenizerFast",
    vocabularies=(("tokenizer.json",), ("vocab.txt",)),
)
CLIP = ModelKind(
    socket="clip_model",
    words="CLIP model",
    model_type="clip",
    folder_name=METRICS_FOLDER,
    place="models/pix2pix_zero/metrics",
    without=NONE,
    well_known=("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32"),
    network="CLIPModel",
    config="CLIPConfig",
    image_processor="CLIPImageProcessor",
    tokenizer="CLIPTokenizerFast",
    vocabularies=(("tokenizer.json",), ("vocab.json", "merges.txt")),
    borrowed="clip_vision",
)
DINO = ModelKind(
    socket="dino_model",
    words="DINO vision transformer",
    model_type="vit",
    folder_name=METRICS_FOLDER,
    place="models/pix2pix_zero/metrics",
    without=NONE,
    well_known=("facebook/dino-vitb8", "facebook/dino-vits8"),
    network="ViTModel",
    config="ViTConfig",
)


def register_folders() -> None:
    """Make the folders of these models known to ComfyUI, beside any of extra_model_paths.yaml or of another pack."""
    for kind in (BLIP, CLIP, DINO):
        register_folder(kind.folder_name, *kind.place.split("/")[1:])


def model_names(kind: ModelKind) -> list[str]:
    """What needs no folder, the user's folders that may hold this kind of model, then the ids on the hub."""
    own = [folder for folder in _folders(kind.folder_name) if model_type(folder) in (kind.model_type, None)]
    names = {folder.name for folder in (*own, *_borrowed(kind))}
    return [kind.without, *sorted(names - {kind.without}), *kind.well_known]


def lpips_names() -> list[str]:
    """ "none" and the .safetensors files in `models/pix2pix_zero/metrics`."""
    return [NONE, *sorted({path.name for path in _contents(METRICS_FOLDER) if path.suffix == ".safetensors"})]


def lpips_file(name: str) -> Path:
    """The LPIPS weights that `name` stands for. Raises ValueError if there is no such file."""
    _check_name(name, "lpips_model", CLIP.place)
    bases = _bases(METRICS_FOLDER)
    path = next((base / name for base in bases if os.path.isfile(base / name)), None)
    if path is None:
        raise ValueError(f"lpips_model: there is no file '{name}' in {bases[0]}. Choose a name from the list.")
    return path


def model_folder(kind: ModelKind, name: str) -> Path:
    """The folder that `name` stands for, whether or not it exists.

    A well-known id stands for the folder of the same last part, which is also where it is downloaded to, or for that of
    the hub's cache.

    Raises ValueError: the name is no text, or points outside the folders for models.
    """
    known = name in kind.well_known
    names = [name.rsplit("/", 1)[-1], "models--" + name.replace("/", "--")] if known else [name]
    _check_name(names[0], kind.socket, kind.place)
    bases = _bases(kind.folder_name)
    own = [base / each for each in names for base in bases if os.path.isdir(base / each)]
    borrowed = [folder for folder in _borrowed(kind) if folder.name in names]
    return next(iter((*own, *borrowed)), bases[0] / names[0])


def complete_folder(kind: ModelKind, name: str, allow_download: bool) -> Path:
    """Where the files of a whole model lie, downloaded first if the user ticked that and it is a well-known one.

    Raises ValueError: the folder is missing, incomplete or outside the folders for models, or the download failed.
    """
    folder = model_folder(kind, name)
    if allow_download and name in kind.well_known and missing_files(kind, snapshot(folder)):
        download_model(name, folder)
    folder = snapshot(folder)
    missing = missing_files(kind, folder)
    if not missing:
        return folder
    source = _to_download(kind, name, folder)
    choice = "" if source == name else f"choose '{source}' and "
    by_tick = f" Or {choice}tick allow_download." if source else ""
    if kind is BLIP:
        by_tick += " Or write the caption yourself, into caption of Caption Image."
    if not os.path.isdir(folder):
        raise ValueError(
            f"{kind.socket}: there is no {kind.words} '{name}'. Put {', '.join(missing)} of one into the folder {folder}."
            f"{by_tick}"
        )
    pickle = next((file for file in PICKLES if has_file(folder, file)), None)
    if missing == [WEIGHTS] and pickle:
        raise ValueError(
            f"{kind.socket}: {folder} has its weights only as {pickle}, a pickle, which can run code and is never read "
            f"here. Get {WEIGHTS} instead, or, if you trust the file, convert it once in ComfyUI's Python: "
            f"from transformers import {kind.network} as M; M.from_pretrained(r'{folder}').save_pretrained(r'{folder}')"
        )
    raise ValueError(
        f"{kind.socket}: the folder {folder} is incomplete. Missing: {', '.join(missing)}. Put them there.{by_tick}"
    )


def _to_download(kind: ModelKind, name: str, folder: Path) -> str | None:
    """The id whose download would help: that of the folder, or another one for an id that is not pinned."""
    pinned = [repo_id for repo_id in kind.well_known if repo_id in PINNED]
    same = [repo_id for repo_id in pinned if repo_id.endswith("/" + folder.name)]
    return next(iter(same or (pinned if name in kind.well_known else ())), None)


def missing_files(kind: ModelKind, folder: Path) -> list[str]:
    """What a folder lacks to be a model of this kind, as names to show to the user; empty if it is complete."""
    missing = [] if has_file(folder, CONFIG) else [CONFIG]
    if not has_file(folder, WEIGHTS, SHARDS):
        missing.append(WEIGHTS)
    if kind.image_processor and not has_file(folder, PREPROCESSOR):
        # transformers 5 writes it into the processor's file
        if not has_file(folder, PROCESSOR) or read_image_processor(folder, kind.socket) is None:
            missing.append(PREPROCESSOR)
    if kind.tokenizer and not any(all(has_file(folder, name) for name in names) for names in kind.vocabularies):
        missing.append(" or ".join(" and ".join(names) for names in kind.vocabularies))
    return missing


def model_type(folder: Path) -> str | None:
    """The `model_type` of a folder's config.json; None where there is none to read."""
    try:
        return read_json(snapshot(folder) / CONFIG, "").get("model_type")
    except ValueError:
        return None


def fingerprint(kind: ModelKind, name: str | None) -> str:
    """Changes whenever the chosen model's files change. One for every name that comes by a link and is not yet known."""
    if not isinstance(name, str) or name == kind.without:
        return str(name)
    try:
        folder = snapshot(model_folder(kind, name))
    except ValueError:  # said when the node runs
        return name
    files = [path for path in children(folder) if path.suffix in (".json", ".txt", ".safetensors")]
    return f"{name} {files_fingerprint(files)}"


def lpips_fingerprint(name: str | None) -> str:
    """As `fingerprint`, of an LPIPS file."""
    try:
        return str(name) if name in (NONE, None) else f"{name} {files_fingerprint([lpips_file(name)])}"
    except ValueError:
        return str(name)


def _check_name(name: object, socket: str, place: str) -> None:
    if not isinstance(name, str) or not is_plain_name(name):
        raise ValueError(f"{socket}: {name!r} is not the name of a model in {place}. Choose a name from the list.")


def _bases(folder_name: str) -> list[Path]:
    return [Path(base) for base in folder_paths.get_folder_paths(folder_name)]


def _contents(folder_name: str) -> list[Path]:
    return [path for base in _bases(folder_name) for path in children(base) if not path.name.startswith(".")]


def _folders(folder_name: str) -> list[Path]:
    """The folders in which some model lies, whole or not."""
    files = (CONFIG, WEIGHTS, SHARDS, *PICKLES)
    return [path for path in _contents(folder_name) if has_file(snapshot(path), *files)]


def _borrowed(kind: ModelKind) -> list[Path]:
    return [path for path in _folders(kind.borrowed) if model_type(path) == kind.model_type] if kind.borrowed else []


def children(folder: Path) -> list[Path]:
    """What lies in a folder, sorted. One that cannot be read counts as empty, with one warning that names it."""
    if not os.path.isdir(folder):  # Path.is_dir raises where a folder above it cannot be read
        return []
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        _warn_unreadable(folder, error.strerror)
        return []


@cache  # the lists are drawn up at every look of the browser
def _warn_unreadable(folder: Path, reason: str | None) -> None:
    logger.warning("The folder %s cannot be read (%s), so what lies in it is not offered.", folder, reason)


def is_plain_name(name: str) -> bool:
    """Whether it names something inside a folder, on every system."""
    # Checked as text and not resolved: a model folder that is a link to another disk is fine, "../x" is not.
    return name not in ("", ".", "..") and all(len(path(name).parts) == 1 for path in (PurePosixPath, PureWindowsPath))


def has_file(folder: Path, *names: str) -> bool:
    """Whether one of these files lies in the folder."""
    return any(os.path.isfile(folder / name) for name in names)


def snapshot(folder: Path) -> Path:
    """Where a model's files lie: the folder itself or, in one of the hub's cache, the snapshot of its main revision."""
    if has_file(folder, CONFIG) or not os.path.isdir(folder / "snapshots"):
        return folder
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        snapshots = [path for path in (folder / "snapshots").iterdir() if has_file(path, CONFIG)]
    except (OSError, ValueError):
        return folder
    return next((path for path in snapshots if path.name == revision), folder)


def read_json(path: Path, socket: str) -> dict:
    """The object in a JSON file. Raises ValueError, naming `socket` and the file, if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{socket}: {path} is not readable JSON: {error}. Get it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{socket}: {path} is not readable JSON: it holds no object. Get it again.")
    return content


def read_image_processor(folder: Path, socket: str) -> tuple[dict, Path] | None:
    """The settings of a folder's image processor and their file, wherever transformers 4 or 5 wrote them."""
    if has_file(folder, PREPROCESSOR):
        return read_json(folder / PREPROCESSOR, socket), folder / PREPROCESSOR
    if has_file(folder, PROCESSOR):
        settings = read_json(folder / PROCESSOR, socket).get("image_processor")
        return (settings, folder / PROCESSOR) if isinstance(settings, dict) else None
    return None
