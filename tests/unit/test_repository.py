"""What the repository promises about its files."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tracked(*patterns: str) -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def packed(path: Path) -> bool:
    """Whether the file is part of the package that users install."""
    name = path.relative_to(ROOT).as_posix()
    ignored = [line for line in read(ROOT / ".comfyignore").splitlines() if line and not line.startswith("#")]
    return not any(name == entry or (entry.endswith("/") and name.startswith(entry)) for entry in ignored)


def test_no_file_names_a_package_index():
    hosts = re.compile("py" + r"pi\.org|python" + "hosted|simple/" + "torch")
    text = [path for path in tracked() if path.suffix not in (".safetensors", ".jpg", ".png")]
    assert [path.name for path in text if hosts.search(read(path))] == []


def test_nothing_that_ships_reads_a_pickle():
    reads = re.compile(r"torch\.load\(|\bpickle\.loads?\(|weights_only|allow_pickle=True")
    assert [path.name for path in tracked("*.py") if packed(path) and reads.search(read(path))] == []


def test_the_package_requires_nothing_beyond_comfyui():
    assert [line for line in read(ROOT / "requirements.txt").splitlines() if line and not line.startswith("#")] == []
    assert "dependencies = []" in read(ROOT / "pyproject.toml")


def test_the_package_leaves_out_what_only_developers_need():
    names = {path.relative_to(ROOT).parts[0] for path in tracked() if packed(path)}
    assert names.isdisjoint({"tests", "devtools", "dev.py", "benchmarks", ".ci", "requirements-dev.txt"})
    assert {"__init__.py", "nodes", "editing", "host", "example_workflows", "pyproject.toml", "LICENSE"} <= names


def imported_files(path: Path) -> set[Path]:
    """The files of this repository that a file imports by a relative import."""
    found = set()
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            modules = [base, *(base / name.name for name in node.names)]
            found |= {file for module in modules if (file := module.with_suffix(".py")).is_file()}
    return found


def test_what_ships_imports_nothing_that_does_not_ship():
    files = [path for path in tracked("*.py") if packed(path)]
    imports = {path: imported_files(path) for path in files}
    assert sum(map(len, imports.values())) > 100
    assert [(path.name, file.name) for path in files for file in imports[path] if not packed(file)] == []


def test_the_version_is_the_newest_of_the_changelog():
    version = re.search(r'^version = "(.+)"', read(ROOT / "pyproject.toml"), re.MULTILINE)[1]
    assert re.search(r"^## (\S+)", read(ROOT / "CHANGELOG.md"), re.MULTILINE)[1] == version


def test_every_file_the_readme_links_to_is_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", read(ROOT / "README.md"))
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_the_continuous_integration_runs_the_command_of_the_readme():
    command = re.search(r"python (dev.py test [^\"]+) ", read(ROOT / ".ci" / "run"))[1]
    assert f"python {command}" in read(ROOT / "README.md")


def test_the_developers_page_lists_every_benchmark():
    programs = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in read(path)}
    listed = re.findall(r"^\| `python dev.py bench (\w+)`", read(ROOT / "CONTRIBUTING.md"), re.MULTILINE)
    assert sorted(listed) == sorted(programs)


def test_the_developers_page_says_what_is_in_every_file_of_the_core():
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("host", "editing", "attention_patches")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    rows = re.findall(r"^\| `([a-z_/]+\.py)` \|", read(ROOT / "CONTRIBUTING.md"), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == files, "add a row to the table 'Where what is', or take one out"


def test_every_file_that_the_developers_page_names_is_there():
    named = set(re.findall(r"`([\w./]+/[\w.]+\.(?:py|md|json|yml|toml))`", read(ROOT / "CONTRIBUTING.md")))
    examples = {
        "web/docs/NODE.md",
        "web/docs/NODE/ko.md",
        "locales/LANGUAGE/nodeDefs.json",
        "locales/LANGUAGE/main.json",
    }
    assert len(named) > 60
    assert [name for name in sorted(named - examples) if not (ROOT / name).is_file()] == []


def test_every_call_that_the_developers_page_names_is_in_its_file():
    pairs = re.findall(r"`([A-Za-z_.]+)`\s+(?:in\s+|\()`([\w/]+\.py)`", read(ROOT / "CONTRIBUTING.md"))
    assert len(pairs) >= 15
    lacking = [
        (name, file)
        for name, file in pairs
        for part in name.split(".")
        if not re.search(rf"^\s*(def|class) {part}\b", read(ROOT / file), re.MULTILINE)
    ]
    assert lacking == []


def test_the_packages_icon_and_banner_are_what_the_registry_takes():
    from PIL import Image

    with Image.open(ROOT / "assets" / "icon.png") as icon, Image.open(ROOT / "assets" / "banner.jpg") as banner:
        assert icon.size == (256, 256)
        assert banner.width * 9 == banner.height * 21
    assert sum(path.stat().st_size for path in tracked("assets/*")) < 100_000


def test_all_weights_together_have_at_most_twenty_megabytes():
    weights = tracked("*.safetensors")
    assert len(weights) > 3
    assert sum(path.stat().st_size for path in weights) <= 20_000_000


def workflow(name: str) -> dict:
    import yaml  # the host requires it

    # the base loader leaves `on` a word; to the others it is a truth value
    return yaml.load(read(ROOT / ".github" / "workflows" / name), yaml.BaseLoader)


def test_the_tests_run_on_every_push_and_pull_request():
    tests = workflow("tests.yml")
    assert {"push", "pull_request", "workflow_call"} <= tests["on"].keys()
    assert not any(tests["on"].values()), "they run for every branch and every file"
    (job,) = tests["jobs"].values()
    (step,) = [step for step in job["steps"] if "run" in step]
    assert step["run"] == "bash .ci/run"
    assert not {"if", "continue-on-error"} & {*job, *step}


def test_a_release_is_published_only_after_the_tests_have_passed_on_its_commit():
    jobs = workflow("publish.yml")["jobs"]
    publishing = [name for name, job in jobs.items() if "publish-node-action" in str(job)]
    assert publishing == ["publish"]
    assert jobs["tests"]["uses"] == "./.github/workflows/tests.yml"
    assert jobs["publish"]["needs"] == "tests" and "if" not in jobs["publish"]
    checkouts = [step for step in jobs["publish"]["steps"] if "checkout" in step["uses"]]
    assert [step.get("with", {}).get("ref") for step in checkouts] == [None], "it publishes the commit that was tested"


def test_a_release_is_published_only_when_the_version_has_changed():
    publish = workflow("publish.yml")
    assert publish["on"]["push"] == {"branches": ["main"], "paths": ["pyproject.toml"]}
    assert publish["jobs"]["tests"]["if"] == "needs.version.outputs.changed == 'true'"
    assert publish["jobs"]["tests"]["needs"] == "version"
    # the line that the workflow reads the version from
    assert re.search(r'^version = "\d+\.\d+\.\d+"$', read(ROOT / "pyproject.toml"), re.MULTILINE)


def test_what_only_the_owner_knows_is_left_open_and_named_for_the_owner():
    project, page = read(ROOT / "pyproject.toml"), read(ROOT / "CONTRIBUTING.md")
    for key in ("PublisherId", "Icon", "Banner"):
        assert f'{key} = "' in project and f"`{key}`" in page, key
    assert "REGISTRY_ACCESS_TOKEN" in page


MOST_PARAMETERS = 6
SIGNATURES_OF_OTHERS = {
    "_carry_out": "wraps ComfyUI's apply_model",
    "execute": "a node's sockets",
}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Those that a caller has to know, without the object itself and what is only passed on."""
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls", "ctx")]


def test_no_function_has_a_long_list_of_parameters():
    """Knobs travel in objects named for what they are. Tests have fixtures, and a helper there may take what it likes."""
    long = {
        (path.relative_to(ROOT).as_posix(), node.name)
        for path in tracked("*.py")
        if path.relative_to(ROOT).parts[0] != "tests"
        for node in ast.walk(ast.parse(read(path)))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(parameters(node)) > MOST_PARAMETERS
    }
    assert {place for place in long if place[1] not in SIGNATURES_OF_OTHERS} == set()
    assert {name for _, name in long} == set(SIGNATURES_OF_OTHERS), "an exception that is none any more"
