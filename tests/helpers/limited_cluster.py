"""`python cluster` with other limits: python limited_cluster.py '{"run.LEAVING": 1}' CLUSTER ARGUMENTS."""

import importlib
import json
import runpy
import sys
from pathlib import Path

limits = json.loads(sys.argv.pop(1))
runpy.run_path(str(Path(sys.argv.pop(1), "__main__.py")))["_load_pack"]()
for name, value in limits.items():
    module, constant = name.split(".")
    module = importlib.import_module(f"pix2pix_zero.cluster.{module}")
    getattr(module, constant)  # it is still called so
    setattr(module, constant, value)
sys.exit(importlib.import_module("pix2pix_zero.cluster.commands").main())
