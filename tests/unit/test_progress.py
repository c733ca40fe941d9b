"""The line of text on a running node, and one progress bar for all of its runs."""

import contextvars
import gc
import sys
from types import SimpleNamespace

import pytest
from pix2pix_zero.host import running


@pytest.fixture
def sent(monkeypatch):
    """What a server was told to show, as (text, node)."""
    messages = []
    server = SimpleNamespace(send_progress_text=lambda text, node: messages.append((text, node)))
    host = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    context = SimpleNamespace(get_executing_context=lambda: SimpleNamespace(node_id="12:7"))
    monkeypatch.setitem(sys.modules, "server", host)
    monkeypatch.setitem(sys.modules, "comfy_execution.utils", context)
    return messages


def test_the_text_goes_to_the_node_that_is_running(sent):
    running.show("Inverting 3/50")
    assert sent == [("Inverting 3/50", "12:7")]


def test_a_node_that_runs_for_several_pictures_says_which_one(sent):
    for _ in running.in_turn(2):
        running.show("Inverting 1/1")
    for _ in running.in_turn(1):
        running.show("Sampling 1/1")
    assert [text for text, _ in sent] == ["Picture 1/2: inverting 1/1", "Picture 2/2: inverting 1/1", "Sampling 1/1"]


def test_a_run_that_fails_leaves_the_count_as_it_was(sent):
    with pytest.raises(RuntimeError):
        for _ in running.in_turn(3):
            raise RuntimeError
    running.show("Sampling 1/4")
    assert [text for text, _ in sent] == ["Sampling 1/4"]


def test_the_progress_bar_goes_on_from_run_to_run():
    seen = []
    report = running.over_turns(lambda step, x0, x, steps: seen.append((step, steps)))
    for _ in running.in_turn(3):
        for step in range(2):
            report(step, None, None, 2)
    assert seen == [(step, 6) for step in range(6)]


@pytest.mark.parametrize(
    "host",
    [
        None,
        SimpleNamespace(),
        SimpleNamespace(PromptServer=SimpleNamespace()),
        SimpleNamespace(PromptServer=SimpleNamespace(instance=None)),
        SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace())),
    ],
    ids=["no server module", "another module of that name", "no server yet", "no server", "a server without such text"],
)
def test_nothing_happens_where_nobody_can_be_told(sent, monkeypatch, host):
    if host is None:
        monkeypatch.delitem(sys.modules, "server")
    else:
        monkeypatch.setitem(sys.modules, "server", host)
    running.show("Inverting 3/50")
    assert sent == []


def test_nothing_happens_outside_a_running_node(sent, monkeypatch):
    monkeypatch.setattr(sys.modules["comfy_execution.utils"], "get_executing_context", lambda: None)
    running.show("Inverting 3/50")
    assert sent == []


def test_what_is_told_stays_above_the_line_of_the_step_and_is_kept_once(sent):
    with running.listening() as told:
        for _ in running.in_turn(2):
            running.warn("negative is another text.")
            running.show("Sampling 1/4")
    running.show("Sampling 2/4")
    assert told == ["negative is another text."]
    assert [text for text, _ in sent] == [
        "negative is another text.",
        "negative is another text.\nPicture 1/2: sampling 1/4",
        "negative is another text.",
        "negative is another text.\nPicture 2/2: sampling 1/4",
        "Sampling 2/4",
    ]


def test_runs_that_are_cut_off_in_another_context_say_nothing_and_change_nothing(monkeypatch):
    """As where a node fails in one thread of the host, and the garbage collector runs in another, in the midst of a run."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: said.append(told.exc_value))

    def cut_off():
        going = running.in_turn(3)
        next(going)
        return going

    going = [contextvars.copy_context().run(cut_off)]
    for _ in running.in_turn(2):
        going.clear()
        gc.collect()
        assert running.turn_count() == 2
    assert said == [] and running.turn_count() == 1
