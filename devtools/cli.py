"""The commands of `dev.py`."""

import argparse
import os
import time
import webbrowser
from pathlib import Path

from . import family_table
from .environment import Environment, lock, prepare
from .hosts import DEFAULT_VERSION, ROOT, SOURCES, named_versions
from .process import DevError, one_thread, run, told

# Tests of the host folder that do not depend on ComfyUI's version, most of them long.
OF_ANY_VERSION = (
    "*benchmark*",
    "test_demo_training*",
    "test_demo_captioner*",
    "test_help_pages*",
    "test_translations*",
)
MOST_WORKERS = 4  # of the tests; each takes a core and about 1 GB


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.takes_more:
        parser.error(f"unknown: {' '.join(rest)}")
    return told(lambda: options.command(options, rest))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dev.py",
        description="The developer command of ComfyUI-Pix2PixZero. It sets up what it needs in ignored folders.",
        epilog="COMFYUI_PATH in the environment uses your own ComfyUI, which is only read.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, command, help: str, takes_more: bool = False, host: bool = True) -> argparse.ArgumentParser:
        # a program that takes the other arguments explains them itself
        explains = name not in ("bench", "train")
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False, add_help=explains)
        sub.set_defaults(command=command, takes_more=takes_more)
        if host:
            several = ". Several between commas, or oldest, newest, all" if name == "test" else ""
            sub.add_argument(
                "--comfyui", metavar="VERSION", help=f"{', '.join(SOURCES)}; {DEFAULT_VERSION} when left out{several}"
            )
        return sub

    from .graphs import EDITS

    demo = add("demo", _demo, "edit a picture on a real server and save it in demo_output/")
    demo.add_argument("--seed", type=int, default=114, help="which scene is drawn (default: %(default)s)")
    demo.add_argument("--edit", choices=EDITS, default="cat2dog", help="default: %(default)s")
    test = add("test", _test, "lint, then run the tests; other arguments go to pytest", takes_more=True)
    test.add_argument("--gpu", action="store_true", help="then run the tests that need a CUDA device, on it")
    serve = add("serve", _serve, "run ComfyUI with the pack; other arguments go to it", takes_more=True)
    serve.add_argument("--port", type=int, default=8188, help="default: %(default)s")
    serve.add_argument("--open", action="store_true", help="open the first example in a browser")
    add(
        "lint",
        _lint,
        "check the code with ruff, and the table of families; other arguments go to it",
        takes_more=True,
        host=False,
    )
    bench = add("bench", _bench, "run benchmarks/NAME.py with the other arguments", takes_more=True)
    bench.add_argument("name", metavar="NAME", nargs="?", default="")
    add(
        "train",
        _train,
        "train the demo model, or, with `decoder`, `distilled` or `dit`, those parts; other arguments go to the recipe",
        takes_more=True,
    )
    add(
        "docs",
        _docs,
        "write the tables of help pages and the English texts; --pictures: also their pictures; --thumbnails: also those of "
        "the examples",
        True,
    )
    soak = add("soak", _soak, "random edits, bad inputs and interrupts on a real server, and a table of what grew")
    soak.add_argument("--minutes", type=float, default=10.0, help="how long (default: %(default)s)")
    soak.add_argument("--seed", type=int, default=0, help="another number, other runs (default: %(default)s)")
    soak.add_argument("--runs", type=int, help="stop after so many, if that is sooner")
    add("lock", _lock, "compile requirements-dev.in to requirements-dev.txt", host=False)
    return parser


def _demo(options: argparse.Namespace, _: list[str]) -> int:
    return _run_module(
        prepare(options.comfyui), "pix2pix_zero.devtools.demo", ["--edit", options.edit, "--seed", str(options.seed)]
    )


def _test(options: argparse.Namespace, rest: list[str]) -> int:
    versions = named_versions(options.comfyui)
    status = _ruff(prepare(versions[0]), []) or _check_tables()
    if status:
        return status
    folders, left_out = ("unit", "host", "browser"), ()
    failed, results = 0, []
    for version in versions:
        environment = prepare(version)
        print(f"Testing with ComfyUI {environment.comfyui.version} ...", flush=True)
        begin = time.monotonic()
        status = _pytest(environment, rest, folders, left_out)
        if options.gpu and not status:
            # they share one GPU
            status = _pytest(environment, ["--gpu", "-m", "gpu", *rest, "-n", "0"], folders, left_out)
        seconds = round(time.monotonic() - begin)
        outcome = "failed" if status else "passed"
        results.append(f"ComfyUI {environment.comfyui.version}: {outcome} ({seconds // 60}:{seconds % 60:02})")
        failed = failed or status
        # the rest does not depend on the version
        folders, left_out = ("host",), OF_ANY_VERSION
    if len(results) > 1:
        print("", *results, sep="\n", flush=True)
    return failed


def _pytest(environment: Environment, rest: list[str], folders: tuple[str, ...], left_out: tuple[str, ...]) -> int:
    tests = ROOT / "tests"
    # pytest runs in ComfyUI's folder, so the files a person names are given their full path
    named = [argument for argument in rest if Path(argument.partition("::")[0]).exists()]
    paths = [Path(argument).absolute() for argument in named] or [tests / folder for folder in folders]
    rest = [argument for argument in rest if argument not in named]
    command = [environment.python, "-m", "pytest", "-p", "no:cacheprovider", "-rfEs"]
    command += ["--durations=15", "--durations-min=1"]
    if not named:
        command += ["-n", str(min(os.cpu_count() or 1, MOST_WORKERS)), "--dist", "loadgroup"]
        command.append("--no-loadscope-reorder")  # tests/conftest.py puts what takes long first
        command += [f"--ignore-glob={tests / 'host' / name}" for name in left_out]
    command += ["--rootdir", tests, "-c", tests / "pytest.ini", *rest, *paths]
    return run(command, cwd=environment.comfyui.path, env=environment.variables(**one_thread()))


def _serve(options: argparse.Namespace, rest: list[str]) -> int:
    from .graphs import EXAMPLE
    from .server import ForegroundServer, check_port_is_free

    check_port_is_free(options.port)
    environment = prepare(options.comfyui)
    keep = ROOT / ".comfyui" / "serve"
    with ForegroundServer(environment, options.port, keep=keep, options=rest) as server:
        print(f"\nComfyUI {environment.comfyui.version} with the pack: {server.url} (Ctrl-C ends it)", flush=True)
        print(f"The first example: {server.example_url(EXAMPLE.stem)}\n", flush=True)
        if options.open and not webbrowser.open(server.example_url(EXAMPLE.stem)):
            print("No browser was found; open the address above yourself.", flush=True)
        return server.wait()


def _lint(options: argparse.Namespace, rest: list[str]) -> int:
    return _ruff(prepare(), rest) or _check_tables()


def _check_tables() -> int:
    if not family_table.is_up_to_date():
        raise DevError("README.md: its table of families is not what the tests prove. Run `python dev.py docs`.")
    return 0


def _ruff(environment: Environment, rest: list[str]) -> int:
    return run([environment.python, "-m", "ruff", "check", *rest], cwd=ROOT)


def _benchmarks() -> list[str]:
    programs = (path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
    return sorted(path.stem for path in programs)


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    if options.name not in _benchmarks():
        raise DevError(f"Name a benchmark, then its arguments: {', '.join(_benchmarks())}.")
    return _run_module(prepare(options.comfyui), f"pix2pix_zero.benchmarks.{options.name}", rest)


def _run_module(environment: Environment, name: str, rest: list[str]) -> int:
    """Like `python -m`, but without the current folder on the path: our nodes/ would hide ComfyUI's nodes.py."""
    code = "import runpy, sys; del sys.path[0], sys.argv[0]; runpy.run_module(sys.argv[0], None, '__main__', True)"
    return run([environment.python, "-c", code, name, *rest], env=environment.variables())


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    environment = prepare(options.comfyui)
    if not any(argument.partition("=")[0] == "--work" for argument in rest):
        rest = ["--work", str(ROOT / ".comfyui" / "training"), *rest]
    module = "train"
    for word, name in {"distilled": "distill_students", "decoder": "train_decoder", "dit": "train_dit"}.items():
        if word in rest:
            rest.remove(word)
            module = name
    return _run_module(environment, f"pix2pix_zero.demo_model.{module}", rest)


def _docs(options: argparse.Namespace, rest: list[str]) -> int:
    return _run_module(prepare(options.comfyui), "pix2pix_zero.devtools.help_pages", rest)


def _soak(options: argparse.Namespace, _: list[str]) -> int:
    arguments = ["--minutes", str(options.minutes), "--seed", str(options.seed)]
    arguments += [] if options.runs is None else ["--runs", str(options.runs)]
    return _run_module(prepare(options.comfyui), "pix2pix_zero.devtools.soak", arguments)


def _lock(options: argparse.Namespace, rest: list[str]) -> int:
    lock()
    return 0
