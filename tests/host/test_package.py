"""The package that users install: what is in it, and that it works where nothing else is."""

import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 20_000_000  # bytes
SHIPPED = {
    "__init__.py",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "attention_patches",
    "cluster",
    "demo_model",
    "directions_data",
    "distillation",
    "editing",
    "example_workflows",
    "host",
    "pictures",
    "locales",
    "nodes",
    "pyproject.toml",
    "requirements.txt",
    "subgraphs",
    "web",
}


def git(*arguments: str, stdin: bytes = b"") -> list[str]:
    answer = subprocess.run(["git", *arguments], cwd=ROOT, input=stdin, capture_output=True, check=False)
    if answer.returncode not in (0, 1):
        pytest.skip("not a git checkout")
    return [name for name in answer.stdout.decode().split("\0") if name]


@pytest.fixture(scope="module")
def files() -> list[str]:
    """As `comfy node pack` chooses them: what git tracks (or will), less the patterns of .comfyignore, by git's own rules."""
    tracked = [
        name for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard") if (ROOT / name).is_file()
    ]
    ignoring = ["-c", f"core.excludesFile={ROOT / '.comfyignore'}", "check-ignore", "--no-index", "-z", "--stdin"]
    ignored = set(git(*ignoring, stdin="\0".join(tracked).encode()))
    assert tracked and ignored
    return [name for name in tracked if name not in ignored]


@pytest.fixture(scope="module")
def package(files) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files:
            archive.write(ROOT / name, name)
    return stream.getvalue()


def test_the_package_holds_what_users_need_and_nothing_else(files):
    assert {name.split("/")[0] for name in files} <= SHIPPED
    assert {"__init__.py", "nodes", "host", "demo_model", "web", "locales"} <= {name.split("/")[0] for name in files}
    assert [name for name in files if "train" in name.lower() or "test" in name.lower()] == []
    kinds = {Path(name).suffix for name in files}
    assert kinds <= {".py", ".js", ".json", ".txt", ".md", ".jpg", ".toml", ".safetensors", ""}
    weights = [name for name in files if name.endswith(".safetensors")]
    assert {name for name in weights if not name.startswith("demo_model/distilled/")} == {
        "demo_model/weights.safetensors",
        "demo_model/transformer.safetensors",
    }
    assert all((ROOT / name).stat().st_size < 1_500_000 for name in weights if name.startswith("demo_model/distilled/"))


def test_the_package_is_small(package):
    assert len(package) < LARGEST


def test_nothing_in_the_package_runs_when_it_is_installed(files):
    assert {"install.py", "uninstall.py", "prestartup_script.py", "enable.py", "disable.py"}.isdisjoint(files)


@pytest.fixture(scope="module")
def installed(package, tmp_path_factory):
    """A server whose only pack is the unpacked package, without the repository anywhere on its path."""
    import comfy
    from comfyui_version import __version__
    from pix2pix_zero.devtools import server as servers
    from pix2pix_zero.devtools.environment import Environment
    from pix2pix_zero.devtools.hosts import ComfyUI
    from pix2pix_zero.devtools.process import one_thread

    base = tmp_path_factory.mktemp("fresh")
    folder = base / "custom_nodes" / servers.PACK_FOLDER
    zipfile.ZipFile(io.BytesIO(package)).extractall(folder)

    class WithoutTheRepository(Environment):
        packages = folder / "nothing here"

    comfyui = ComfyUI(Path(next(iter(comfy.__path__))).parent, __version__)
    with pytest.MonkeyPatch.context() as patch:
        # the folder is a real one here, not a link to the repository
        patch.setattr(servers, "link_folder", lambda link, target: None)
        variables = {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", **one_thread()}
        environment = WithoutTheRepository(comfyui, Path(sys.prefix))
        with servers.Server(
            environment, keep=base, options=["--disable-api-nodes"], gpu=False, variables=variables
        ) as up:
            yield up, base, folder


def test_the_installed_package_edits_a_picture_and_writes_nothing_into_its_folder(installed, files):
    server, base, folder = installed
    graph = json.loads((ROOT / "tests" / "workflows" / "cat_to_dog_demo.json").read_text(encoding="utf-8"))
    for node in graph.values():
        if node["class_type"] == "Pix2PixZeroInversion":
            node["inputs"]["steps"] = 2
    outputs = server.run(graph)
    assert any("images" in output for output in outputs.values())
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(files)


def test_the_installed_package_brings_its_help_its_languages_and_its_examples(installed):
    server, _, folder = installed
    assert server.get("/extensions/pix2pix-zero/docs/Pix2PixZeroKSampler.md").startswith(b"# ")
    assert "cat_to_dog_demo" in json.loads(server.get("/workflow_templates"))[folder.name]
    assert "Pix2PixZeroKSampler" in json.loads(server.get("/i18n"))["en"]["nodeDefs"]


def test_nothing_is_left_but_the_users_own_files_when_the_folder_is_removed(installed):
    _, base, folder = installed
    shutil.rmtree(folder)
    left = [
        path.relative_to(base) for path in base.rglob("*") if path.is_file() and "pix2pix" in path.as_posix().lower()
    ]
    # the picture that the example was told to save
    assert [path for path in left if path.parts[0] != "output"] == []
