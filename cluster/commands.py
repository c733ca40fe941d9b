"""The command line of `python cluster`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from .pack import FORMATS, pack
from .workflow import ClusterError

NO_RAY = (
    "Ray is not installed in this Python. Make one for it, apart from ComfyUI's: python -m venv ray-env, then "
    f"ray-env/bin/python -m pip install -r {Path(__file__).with_name('requirements.txt')}. Run this with ray-env/bin/python."
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status. What went wrong is told in one line."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except ClusterError as failure:
        print(f"cluster: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. What is done is kept; the same command goes on with the rest.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cluster", description="An edit of many pictures on many ComfyUI servers.")
    commands = parser.add_subparsers(required=True, metavar="command")
    help = "send every picture of a folder through a workflow"
    pairs = commands.add_parser("pairs", help=help, description=help, allow_abbrev=False)
    pairs.set_defaults(command=_pairs)
    add = pairs.add_argument
    add("--workflow", type=Path, required=True, help="exported with Workflow > Export (API)")
    add("--pictures", type=Path, required=True, metavar="DIR", help="the pictures; folders in it are not looked into")
    add("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    which = pairs.add_mutually_exclusive_group(required=True)
    which.add_argument("--servers", default="", metavar="URL,...", help="ComfyUI servers that run")
    which.add_argument("--spawn", type=_positive, default=0, metavar="N", help="start so many ComfyUI servers")
    add("--comfyui", default="", metavar="PATH", help="the ComfyUI folder to start them from, on every machine")
    add("--python", default="", metavar="PATH", help="the Python that runs it, if it is not in that folder's venv")
    add("--gpus-each", type=float, metavar="N", help="GPUs for each of them (default: 1 where Ray sees any, else 0)")
    add("--address", default="", help="a Ray cluster, such as ray://head:10001 (default: this machine alone)")
    add(
        "--patience",
        type=float,
        default=3600,
        metavar="S",
        help="seconds that a picture may take (default: %(default)s)",
    )
    add(
        "--away",
        type=float,
        default=60,
        metavar="S",
        help="seconds that one of --servers may be down (default: %(default)s)",
    )
    pairs.epilog = "With --spawn, what follows -- goes to ComfyUI, such as -- --lowvram."
    help = "write a data set of pairs as other trainers read it"
    packs = commands.add_parser("pack", help=help, description=help, allow_abbrev=False)
    packs.set_defaults(command=lambda options: pack(options.pairs, options.out, options.format, options.caption))
    packs.add_argument("--pairs", type=Path, required=True, metavar="DIR", help="a data set of Save Edit Pair")
    packs.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    packs.add_argument("--format", choices=FORMATS, required=True)
    packs.add_argument("--caption", default="", help="for pairs that have none")
    # all that follows -- is ComfyUI's
    add("comfyui_options", nargs="*", metavar="-- OPTIONS", help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def _pairs(options: argparse.Namespace) -> int:
    if not all(importlib.util.find_spec(name) for name in ("ray", "requests", "filelock")):
        raise ClusterError(NO_RAY)
    from .comfyui import Start
    from .run import Settings, run, specs

    if options.spawn and not options.comfyui:
        raise ClusterError("--spawn: name the folder of ComfyUI with --comfyui.")
    if options.comfyui_options and not options.spawn:
        raise ClusterError(f"what is {options.comfyui_options[0]!r}? Options of ComfyUI need --spawn.")
    # Ray tells its actors to use one thread; ComfyUI is to have what this program was given
    threads = (("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS")),)
    comfyui, python = options.comfyui, options.python
    if not options.address:  # elsewhere the paths are those of the other machines
        comfyui, python = (os.path.abspath(os.path.expanduser(path)) if path else "" for path in (comfyui, python))
    start = Start(comfyui, python, tuple(options.comfyui_options), threads) if options.spawn else None
    servers = specs(options.servers, options.spawn, start, options.patience, options.away)
    if not servers:
        raise ClusterError("--servers: it names none.")
    return run(
        Settings(options.workflow, options.pictures, options.out, servers, options.gpus_each, options.address.strip())
    )
