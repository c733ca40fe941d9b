"""Fixtures that several test files without ComfyUI share."""

import pytest
from cluster_workflows import BLUR, EDIT, PAIR, SOURCE, written
from pix2pix_zero.cluster.workflow import Workflow, read_workflow


@pytest.fixture
def workflow(tmp_path) -> Workflow:
    return read_workflow(written(tmp_path, EDIT))


@pytest.fixture
def pairs_workflow(tmp_path) -> Workflow:
    return read_workflow(written(tmp_path, {"1": SOURCE, "2": BLUR, "3": PAIR}))
