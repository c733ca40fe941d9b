"""`python cluster`: the commands, whatever the folder around this one is called."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _load_pack() -> None:
    """Make the pack importable as `pix2pix_zero`, which imports neither ComfyUI nor torch."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    spec = importlib.util.spec_from_file_location(
        "pix2pix_zero", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["pix2pix_zero"] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    _load_pack()
    from pix2pix_zero.cluster.commands import main

    sys.exit(main())
