"""The developer environment: `.venv` with everything ComfyUI needs, and the ComfyUI tree beside it."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .hosts import DEFAULT_VERSION, ROOT, ComfyUI, Download, choose
from .process import DevError, Job, clean_environment

LOCK = ROOT / "requirements-dev.txt"
CLUSTER_LOCK = ROOT / "cluster" / "requirements.txt"
CLUSTER_LOG = ROOT / ".comfyui" / "cluster.log"
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)([^\\\n]*)", re.MULTILINE)


@dataclass(frozen=True)
class Environment:
    """A Python that can run ComfyUI with the pack."""

    comfyui: ComfyUI
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def packages(self) -> Path:
        """A folder that holds the repository under its importable name, `pix2pix_zero`."""
        return self.folder / "pack"

    def variables(self, **changes: str) -> dict[str, str]:
        """Environment variables for a child in which ComfyUI and `pix2pix_zero` can be imported.

        Its bytecode is kept in this environment's folder: importing torch takes twice as long without, and neither the
        repository nor a person's own ComfyUI is written to.
        """
        given = {
            "PYTHONPATH": os.pathsep.join([str(self.comfyui.path), str(self.packages)]),
            "PYTHONPYCACHEPREFIX": str(self._bytecode),
            "PYTHONDONTWRITEBYTECODE": "",
            "COMFYUI_PATH": str(self.comfyui.path),
        }
        return clean_environment(**{**given, **changes})

    def bytecode_of(self, folder: Path) -> Path:
        """Where that of the files in a folder is kept."""
        folder = folder.absolute()
        return self._bytecode / folder.relative_to(folder.anchor)

    @property
    def _bytecode(self) -> Path:
        return self.folder / "bytecode"


def running() -> Environment:
    """The environment of this process, in which ComfyUI can be imported."""
    import comfy
    from comfyui_version import __version__

    path = Path(next(iter(comfy.__path__))).parent
    return Environment(ComfyUI(path, __version__, own=not path.is_relative_to(ROOT)), Path(sys.prefix))


def prepare(version: str | None = None) -> Environment:
    """Install what is missing and return the environment; quick when nothing is.

    `version`: a ComfyUI version of `hosts.SOURCES`; None for `COMFYUI_PATH`, else the default version. Raises DevError when
    something could not be installed; the next call resumes.
    """
    comfyui = choose(version)
    name = ".venv" if comfyui.version == DEFAULT_VERSION else f".venv-{comfyui.version}"
    environment = Environment(comfyui, ROOT / name)
    stamp = environment.folder / "installed.txt"
    packages_missing = not stamp.is_file() or stamp.read_text(encoding="utf-8") != _fingerprint(comfyui)
    tree_missing = not comfyui.own and not (comfyui.path / "main.py").is_file()
    if packages_missing or tree_missing:
        if packages_missing:
            stamp.unlink(missing_ok=True)
        make_venv(environment)
        if tree_missing:
            # Not beside the installation: that replaces packages which pip is using.
            print(f"Downloading ComfyUI {comfyui.version} ...", flush=True)
            with Download(environment.python, comfyui) as download:
                download.finish()
        if packages_missing:
            print(f"Installing the Python packages into {name} (several GB the first time) ...", flush=True)
            install_packages(environment)
        stamp.write_text(_fingerprint(comfyui), encoding="utf-8")
    link_folder(environment.packages / "pix2pix_zero", ROOT)
    return environment


def prepare_cluster(environment: Environment) -> Path:
    """The Python that runs `cluster`, in an environment of its own that holds Ray; quick when it is there.

    `environment`: whose uv installs it. Raises DevError when Ray could not be installed.
    """
    own = Environment(environment.comfyui, ROOT / ".venv-cluster")
    stamp, wanted = own.folder / "installed.txt", hashlib.sha256(CLUSTER_LOCK.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        uv = [environment.python, "-m", "uv"]
        variables = clean_environment(**_index_of_pip(environment))
        own.folder.mkdir(exist_ok=True)
        for command, what in (
            (["venv", "--quiet", "--clear", "--python", sys.executable, own.folder], "make .venv-cluster"),
            (["pip", "install", "--quiet", "--python", own.python, "-r", CLUSTER_LOCK], "install Ray"),
        ):
            with Job([*uv, *command], CLUSTER_LOG, variables) as job:
                job.finish(what)
        stamp.write_text(wanted, encoding="utf-8")
    return own.python


def _fingerprint(comfyui: ComfyUI) -> str:
    """What the installed packages depend on. The Python of the venv is part of it, ours may change."""
    return f"{hashlib.sha256(LOCK.read_bytes()).hexdigest()} ComfyUI {comfyui.version}\n"


def make_venv(environment: Environment) -> None:
    """Create the virtual environment with a working pip, or repair it."""

    def has_pip() -> bool:
        try:
            command = [environment.python, "-m", "pip", "--version"]
            return subprocess.run(command, capture_output=True, env=clean_environment(), check=False).returncode == 0
        except OSError:
            return False

    log = ROOT / ".comfyui" / "venv.log"
    for options in ([], ["--clear"]):
        if has_pip():
            return
        print(f"Making {environment.folder.name} ...", flush=True)
        try:
            with Job([sys.executable, "-m", "venv", *options, environment.folder], log, clean_environment()) as job:
                job.finish(f"make {environment.folder.name} (on Debian and Ubuntu, install python3-venv)")
        except DevError:
            if options:
                raise
    if not has_pip():
        raise DevError(
            f"{environment.folder.name} has no working pip. Delete the folder and run the same command again."
        )


def install_packages(environment: Environment) -> None:
    """Install the locked packages with uv, which is itself installed by pip."""
    lock = LOCK.read_text(encoding="utf-8")
    folder = environment.folder
    bootstrap = folder / "uv.txt"
    bootstrap.write_text(re.search(r"^uv==(?:.*\\\n)*.*\n", lock, re.MULTILINE).group(), encoding="utf-8")
    pip = [environment.python, "-m", "pip", "install", "--require-hashes", "--retries", "2"]
    quiet = clean_environment(PIP_DISABLE_PIP_VERSION_CHECK="1")
    with Job([*pip, "-r", bootstrap], folder / "uv.log", quiet) as job:
        job.finish("install uv")
    wanted = ["-r", LOCK]
    if environment.comfyui.version != DEFAULT_VERSION:
        constraints = folder / "constraints.txt"
        theirs = (environment.comfyui.path / "requirements.txt").read_text(encoding="utf-8")
        constraints.write_text(_constraints(lock, theirs), encoding="utf-8")
        tools = (ROOT / "requirements-dev.in").read_text(encoding="utf-8").partition("# tools\n")[2].split()
        wanted = [*tools, "-r", environment.comfyui.path / "requirements.txt", "-c", constraints]
    uv = [environment.python, "-m", "uv", "pip", "install", "--quiet", "--python", environment.python]
    with Job([*uv, *wanted], folder / "install.log", clean_environment(**_index_of_pip(environment))) as job:
        job.finish("install the Python packages")


def _index_of_pip(environment: Environment) -> dict[str, str]:
    """Where pip is told to use a mirror of the package index, uv is told the same."""
    if "UV_DEFAULT_INDEX" in os.environ or "UV_INDEX_URL" in os.environ:
        return {}
    address = os.environ.get("PIP_INDEX_URL")
    if not address:
        command = [environment.python, "-m", "pip", "config", "get", "global.index-url"]
        asked = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=False)
        address = asked.stdout.strip() if asked.returncode == 0 else ""
    return {"UV_DEFAULT_INDEX": address} if address else {}


def _constraints(lock: str, theirs: str) -> str:
    """Our pins, less those packages (and their parts) that another ComfyUI version pins itself."""
    own = tuple(match[1].lower() for match in PINNED.finditer(theirs))
    lines = (match for match in PINNED.finditer(lock) if not match[1].lower().startswith(own))
    return "".join(f"{match[1]}=={match[2]}{match[3].rstrip()}\n" for match in lines)


def link_folder(link: Path, target: Path) -> None:
    """Make `link` a link to the folder `target`: a symbolic link, on Windows a junction (needs no rights)."""
    if link.exists() and link.resolve() == target.resolve():
        return
    unlink_folder(link)
    link.parent.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def unlink_folder(link: Path) -> None:
    """Remove a link made by `link_folder`, never what it points to."""
    if os.name == "nt" and link.exists():
        os.rmdir(link)
    else:
        link.unlink(missing_ok=True)


def sees_gpu(environment: Environment) -> bool:
    """Whether torch sees a GPU. Torch takes seconds to import, so it is asked only where there may be one."""
    if sys.platform == "darwin":
        return os.uname().machine == "arm64"
    if not (shutil.which("nvidia-smi") or os.path.exists("/dev/nvidia0")):
        return False
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    asked = subprocess.run([environment.python, "-c", question], capture_output=True, check=False)
    return asked.returncode == 0


def lock() -> None:
    """Compile the lists of packages to hashes for every platform and Python from 3.10 on."""
    environment = prepare()
    options = ["--universal", "--python-version", "3.10", "--generate-hashes", "--no-annotate"]
    options += ["--no-header", "--no-emit-index-url", "--no-emit-find-links", "--upgrade"]
    for target, source in ((LOCK, ROOT / "requirements-dev.in"), (CLUSTER_LOCK, CLUSTER_LOCK.with_suffix(".in"))):
        header = f"# {target.name}: made from {source.name} by `python dev.py lock`\n"
        result = target.with_suffix(".new")
        compiler = [environment.python, "-m", "uv", "pip", "compile", "--quiet", *options]
        with Job([*compiler, "-o", result, source], environment.folder / "lock.log") as job:
            job.finish(f"compile {source.name}")
        target.write_text(header + result.read_text(encoding="utf-8"), encoding="utf-8")
        result.unlink()
