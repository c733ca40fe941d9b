"""Freeze each method's knob on the tuning scenes, then measure it on the test scenes."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..judge import Judge
from .figures import measure, summarize
from .methods import Method, reconstruction
from .pasting import measure_pasted
from .workbench import Workbench

ENOUGH = 0.95
UNEDITED = {
    "source, unchanged": lambda bench: bench.source,
    "ground truth": lambda bench: bench.truth,
    "plain DDIM": lambda bench: bench.vae.decode(reconstruction(bench)),
}


@dataclass
class Result:
    """A method's figures on one edit. `curve`: knob value and figures on the tuning scenes, in the knob's order. `enough`: the
    hit rate there that makes a value fit. `pasted`: of the pictures pasted back into the renders.
    """

    method: str
    knob: str
    value: float | None
    test: dict[str, list[float]]
    seconds: float | None
    curve: list[tuple[float, dict[str, list[float]]]] = field(default_factory=list)
    each: dict[str, list[float]] = field(default_factory=dict)
    pasted: dict[str, list[float]] = field(default_factory=dict)
    enough: float = ENOUGH


def unedited(test: Workbench, judge: Judge) -> tuple[list[Result], dict[str, Tensor]]:
    """What the figures of the test scenes are to be held against: (results, pictures)."""
    pictures = {name: make(test) for name, make in UNEDITED.items()}
    figures = {name: summarize(measure(test, judge, rows)) for name, rows in pictures.items()}
    pasted = {name: summarize(measure_pasted(test, judge, rows)) for name, rows in pictures.items()}
    return [Result(name, "", None, figures[name], None, pasted=pasted[name]) for name in pictures], pictures


def compare(
    method: Method, tuning: Workbench, test: Workbench, judge: Judge, said: Callable[[str], None]
) -> tuple[Result, Tensor]:
    """(the result, the pictures of the test scenes). `said` is told of each measurement."""
    enough = ENOUGH * float(measure(tuning, judge, tuning.truth)["hit"].mean())
    curve = []
    for value in method.values:
        pictures, seconds = tuning.timed(method.draw, value)
        curve.append((value, summarize(measure(tuning, judge, pictures))))
        hit, whole = (curve[-1][1][name][0] for name in ("hit", "whole"))
        said(f"{method.name}, {method.knob} {value:g}: hit {hit:.2f}, whole {whole:.2f}, {seconds:.1f} s")
    frozen = choose(curve, enough)
    pictures, seconds = test.timed(method.draw, frozen)
    figures = measure(test, judge, pictures)
    each = {name: values.tolist() for name, values in figures.items()}
    pasted = summarize(measure_pasted(test, judge, pictures))
    return Result(method.name, method.knob, frozen, summarize(figures), seconds, curve, each, pasted, enough), pictures


def choose(curve: list[tuple[float, dict[str, list[float]]]], enough: float) -> float:
    """The knob value with the lowest whole-picture error among those that edit enough; if none does, that edits most.

    `enough`: a hit rate, ENOUGH of that which the judge gives the ground truth: it is blind to some edits of sketches.
    """

    def order(point: tuple[float, dict]) -> tuple[float, float]:
        figures = point[1]
        return -min(figures["hit"][0], enough), figures["whole"][0]

    return min(curve, key=order)[0]
