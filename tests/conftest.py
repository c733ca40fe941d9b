"""What every test shares: where ComfyUI and the pack are, the device, how the executor calls a node, and a server."""

import contextlib
import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _find_comfyui() -> Path | None:
    if "COMFYUI_PATH" in os.environ:
        return Path(os.environ["COMFYUI_PATH"]).resolve()
    for entry in (Path.cwd(), *map(Path, sys.path)):
        if (entry / "comfy" / "cli_args.py").is_file():
            return entry.resolve()
    installed = sorted((ROOT / ".comfyui").glob("*/comfy/cli_args.py"))
    return installed[-1].parent.parent if installed else None


def _put_on_path(comfyui: Path | None) -> None:
    # The repository root must not be importable: its nodes/ would shadow ComfyUI's nodes.py.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    if comfyui is not None:
        sys.path[:] = [str(comfyui), *(entry for entry in sys.path if Path(entry or ".").resolve() != comfyui)]


def _load_pack() -> None:
    """Make the repository importable as the package `pix2pix_zero`, whatever the checkout is called."""
    if importlib.util.find_spec("pix2pix_zero") is not None:
        return
    spec = importlib.util.spec_from_file_location(
        "pix2pix_zero", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["pix2pix_zero"] = module
    spec.loader.exec_module(module)


# Begun first, so that no process is left alone with one of them in the end.
LONGEST = (
    "browser",
    "test_cluster.py",
    "server",
    "test_soak.py",
    "texts of flows",
    "test_which_knob.py",
    "test_distill_nodes.py",
    "test_host_nodes.py",
    "test_host_flags.py",
    "test_unet_families.py",
    "test_quality_benchmark.py",
    "test_flow_methods.py",
    "test_interrupts.py",
    "test_demo_edit.py",
    "test_unet_families_edits.py",
    "test_small_pictures.py",
    "test_unet_families_sampling.py",
    "test_sampling.py",
    "test_weight_holding.py",
)
TEXTS_OF_FLOWS = ("test_flow_directions", "test_joint_")  # they share small encoders that take long to make
FORKED = "PIX2PIX_ZERO_FORKED_PYTHON"  # the variable that names it to the processes of xdist
COMFYUI = _find_comfyui()
_put_on_path(COMFYUI)
_load_pack()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests marked gpu, on the CUDA device")


def pytest_configure(config: pytest.Config) -> None:
    gpu = config.getoption("--gpu")
    if gpu:
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--gpu was given, but torch sees no CUDA device here.")
    if COMFYUI is not None:
        # ComfyUI chooses its device when comfy.model_management is first imported, so this comes before any test does.
        from comfy.cli_args import args

        args.cpu = not gpu
        if config.getoption("numprocesses", None) and not hasattr(config, "workerinput") and not gpu:
            _fork_for_all(config)


def _fork_for_all(config: pytest.Config) -> None:
    """Begin the Python that is forked here, once for all processes of xdist."""
    with contextlib.ExitStack() as stack:
        os.environ[FORKED] = str(stack.enter_context(_forking()).python)
        config.add_cleanup(stack.pop_all().close)


def _forking():
    from forked_python import forking
    from pix2pix_zero.devtools.environment import running
    from pix2pix_zero.devtools.process import one_thread

    return forking(running(), {**one_thread(), "HF_HUB_OFFLINE": "1"})


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(_group(item)))
        items.sort(key=lambda item: LONGEST.index(_group(item)) if _group(item) in LONGEST else len(LONGEST))
    if config.getoption("--gpu"):
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: python dev.py test --gpu")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    # What is imported stays, and is 400,000 objects that every garbage collection would look at again.
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def _group(item: pytest.Item) -> str:
    """What is tested in one process: a file's tests share its models, others a server, a browser or text encoders."""
    if item.path.parent.name == "browser":
        return "browser"
    if "server" in item.fixturenames:
        return "server"
    return "texts of flows" if item.path.name.startswith(TEXTS_OF_FLOWS) else item.path.name


@pytest.fixture
def run_node():
    """`run_node(NodeClass, **inputs)`: the node's outputs as a tuple, run in inference mode as the executor does."""
    import torch

    def run(node_class, **inputs) -> tuple:
        with torch.inference_mode():
            return node_class.execute(**inputs).result

    return run


@pytest.fixture(scope="session")
def quick_environment(pytestconfig: pytest.Config) -> Iterator:
    """The environment of the tests, whose Python imports what takes ComfyUI long only once."""
    from forked_python import with_python
    from pix2pix_zero.devtools.environment import running

    if pytestconfig.getoption("--gpu"):
        yield running()
    elif FORKED in os.environ:
        yield with_python(running(), Path(os.environ[FORKED]))
    else:
        with _forking() as environment:
            yield environment


@pytest.fixture(scope="session")
def start_server(pytestconfig: pytest.Config, quick_environment) -> Callable:
    """`with start_server(*options, keep) as server`: the real ComfyUI with the pack, with further options of its own.

    `keep`: a base directory that stays, see `devtools.server.Server`.
    """
    from pix2pix_zero.devtools.process import one_thread
    from pix2pix_zero.devtools.server import Server

    @contextlib.contextmanager
    def start(*options: str, keep: Path | None = None) -> Iterator[Server]:
        offline = pytest.MonkeyPatch()
        offline.setenv("HF_HUB_OFFLINE", "1")  # nothing may be downloaded by a test
        gpu = None if pytestconfig.getoption("--gpu") else False
        settings = dict(keep=keep, options=["--disable-api-nodes", *options], gpu=gpu, variables=one_thread())
        try:
            with Server(quick_environment, **settings) as server:
                yield server
        finally:
            offline.undo()

    return start


@pytest.fixture(scope="session")
def server(start_server: Callable) -> Iterator:
    """The real ComfyUI with the pack, started once for all tests that ask for it.

    `run(api_graph) -> outputs`, `object_info()`, `interrupt()`, `get(path)`, `view(image)`. `run` raises
    `devtools.server.GraphError` in the server's own words. See also `devtools.graphs.Graph`.
    """
    with start_server() as server:
        yield server
