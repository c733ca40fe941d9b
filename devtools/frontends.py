"""A frontend newer than the one that ComfyUI pins, to test the pack on both.

Frontends are packages of the Python package index. The wheel is downloaded by name, checked against the SHA-256 below, and
unpacked into an ignored folder, which ComfyUI takes as `--front-end-root`.
"""

import hashlib
import shutil
import tempfile
import zipfile
from pathlib import Path

from .hosts import ROOT
from .process import DevError, Job, clean_environment

PACKAGE = "comfyui-frontend-package"
NEWEST = "1.58.1"
SHA256 = "37912597537a731a8f421179618a736c24184c5bdbfa327f38b2fb7c291852d9"


def newest_frontend(python: Path) -> Path:
    """The folder of the newest frontend that is tested, downloaded with the pip of `python` where it is missing.

    Raises DevError: no network, another SHA-256, a broken archive.
    """
    folder = ROOT / ".comfyui" / f"frontend-{NEWEST}"
    if not (folder / "index.html").is_file():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=folder.parent) as place:
            _unpack(_download(python, Path(place)), Path(place) / "unpacked", folder)
    return folder


def _download(python: Path, place: Path) -> Path:
    wanted = place / "wanted.txt"
    wanted.write_text(f"{PACKAGE}=={NEWEST} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [python, "-m", "pip", "download", "--no-deps", "--require-hashes", "--retries", "2", "-d", place]
    log = ROOT / ".comfyui" / f"frontend-{NEWEST}.log"
    with Job([*command, "-r", wanted], log, clean_environment(PIP_DISABLE_PIP_VERSION_CHECK="1")) as job:
        job.finish(f"download the frontend {NEWEST}")
    return next(place.glob("*.whl"))


def _unpack(wheel: Path, place: Path, folder: Path) -> None:
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise DevError(f"{wheel.name} is not the file that was expected; run the same command again.")
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
    except (zipfile.BadZipFile, OSError) as error:
        raise DevError(f"Could not unpack {wheel.name}: {error}. Run the same command again.") from error
    static = place / "comfyui_frontend_package" / "static"
    if not (static / "index.html").is_file():
        raise DevError(f"{wheel.name} holds no frontend.")
    shutil.rmtree(folder, ignore_errors=True)
    static.rename(folder)
