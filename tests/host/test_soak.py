"""The random run on a real server: thirty runs of it, and that it tells when something is wrong."""

import random
import sys

import pytest
from forked_python import process_at
from pix2pix_zero.devtools import soak as soaking
from pix2pix_zero.devtools.server import GraphError, Server
from pix2pix_zero.devtools.soak import KINDS, WARM_UP, Level, Outcome, in_words, soak
from pix2pix_zero.devtools.soak_runs import bad_input, random_edit

RUNS, SEED = 30, 1  # some of every kind, and enough to see growth after the warm-up


def test_random_runs_of_every_kind_leave_no_fault(quick_environment, monkeypatch):
    monkeypatch.setattr(soaking, "running", lambda: quick_environment)
    if sys.platform == "linux":  # there it is a fork
        monkeypatch.setattr(Server, "process_id", property(lambda server: process_at(server.port)))
    outcome = soak(minutes=8, seed=SEED, runs=RUNS)
    assert not outcome.faults(), outcome.table()
    assert (outcome.done + outcome.refused).total() == RUNS
    assert {*outcome.done, *outcome.refused} == {*KINDS}
    assert len(outcome.pictures) == len(outcome.levels) > WARM_UP + 1, "the reference picture is drawn in between"


def test_runs_are_drawn_again_from_the_seed(server):
    schemas = server.object_info()
    for draw_one in (random_edit, bad_input):
        first, again, other = (repr(draw_one(random.Random(seed), schemas)) for seed in ("3:14", "3:14", "3:15"))
        assert first == again != other


def levels(**last):
    """Measurements that stand still, but for the last one's."""
    still = {"memory": 900.0, "threads": 20, "open_files": 30, "leftover_files": 0}
    count = WARM_UP + 3
    return [Level(10 * i, **{**still, **(last if i == count - 1 else {})}) for i in range(count)]


def failed(**outcome):
    return Outcome(pictures=["a", "a"], **{"levels": levels(), **outcome})


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (failed(failures=[(3, "edit", "RuntimeError")]), "run 3, edit: RuntimeError"),
        (failed(levels=levels(memory=1300.0)), "memory grew by 400"),
        (failed(levels=levels(threads=40)), "threads grew by 20"),
        (failed(levels=levels(open_files=60)), "open files grew by 30"),
        (failed(levels=levels(leftover_files=1)), "leftover files grew by 1"),
        (Outcome(pictures=["a", "b"]), "another one from its 2. time on"),
    ],
)
def test_what_is_wrong_is_told(outcome, fault):
    assert any(fault in told for told in outcome.faults())
    assert fault in outcome.table()


def test_nothing_is_told_where_nothing_is_wrong():
    assert failed().faults() == []
    assert "the same bit for bit" in failed().table()


@pytest.mark.parametrize(
    ("details", "told"),
    [
        ({"exception_type": "ValueError", "exception_message": "cfg: too high", "current_inputs": {"cfg": [1]}}, True),
        (
            {"exception_type": "ValueError", "exception_message": "a, b: none", "current_inputs": {"a": [1], "b": [2]}},
            True,
        ),
        (
            {"exception_type": "ValueError", "exception_message": "a, c: none", "current_inputs": {"a": [1], "b": [2]}},
            False,
        ),
        ({"exception_type": "ValueError", "exception_message": "bad value", "current_inputs": {"cfg": [1]}}, False),
        ({"exception_type": "IndexError", "exception_message": "cfg: none", "current_inputs": {"cfg": [1]}}, False),
        ({"node_errors": {"3": {}}, "error": {"message": "Prompt outputs failed validation"}}, True),
        ({}, False),
    ],
)
def test_only_a_refusal_that_names_a_socket_counts_as_words(details, told):
    assert in_words(GraphError("refused", details)) is told


@pytest.mark.parametrize(("node", "told"), [("Edit", True), ("Save", False)])
def test_a_refusal_may_name_a_socket_of_the_node_that_nothing_is_connected_to(node, told):
    schemas = {"Edit": {"input": {"required": {"model": []}, "optional": {"clip": []}}}, "Save": {"input": {}}}
    details = {
        "exception_type": "ValueError",
        "exception_message": "clip: connect it",
        "current_inputs": {"model": [1]},
    }
    assert in_words(GraphError("refused", {**details, "node_type": node}), schemas) is told
