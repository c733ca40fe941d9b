"""A family's job in a process of its own."""

import json
import logging
import sys
from pathlib import Path

from ..cost_parts.child import choose_device


def main() -> None:
    """Carry out the job of the command line and write its result to the file named there."""
    choose_device()
    logging.getLogger().setLevel(logging.WARNING)
    from .full_size import FamilyJob, run_job

    job, answer = sys.argv[1:]
    result = run_job(FamilyJob(**json.loads(job)))
    Path(answer).write_text(json.dumps(result))
