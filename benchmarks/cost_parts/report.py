"""From the results of the jobs to figures per variant, and their tables."""

import statistics
from collections import defaultdict
from dataclasses import dataclass, field

BASE, SCALE = "diffusers", "ksampler"
PHASES = ("whole", "inversion", "edit", "edit_again")
# With an inversion at hand diffusers still runs its whole edit, so editing again is held against a new one.
COMPARED = {**{phase: phase for phase in (*PHASES, "whole_cpu")}, "edit_again": "whole"}


@dataclass
class Results:
    """What the jobs of one variant returned, by their kind, and why those of a kind were given up."""

    done: dict[str, list[dict]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[str, str] = field(default_factory=dict)

    def of(self, kind: str) -> dict:
        """The result of the only job of a kind; empty if there is none."""
        return self.done[kind][0] if self.done[kind] else {}


def summarize(variants: dict[str, Results]) -> dict[str, dict]:
    """The figures of each variant. Ratios are to diffusers and to the plain KSampler in the same round."""
    base, scale = (variants[name].done["time"] if name in variants else [] for name in (BASE, SCALE))
    return {name: _figures(results, base, scale) for name, results in variants.items()}


def _figures(results: Results, base: list[dict], scale: list[dict]) -> dict:
    count, rounds = results.of("count"), results.done["time"]
    return {
        "failures": results.failures,
        "finite": all(result["finite"] for result in [count, *rounds] if result),
        "per_step": _per_step(count) if count else None,
        "count": count,
        "gradient_error": results.of("gradient").get("relative_error"),
        "growth": results.of("growth").get("peak_bytes"),
        "seconds": {phase: _spread([times[phase] for times in rounds]) for phase in PHASES},
        "ratio_to_diffusers": {phase: _ratios(rounds, base, phase, other) for phase, other in COMPARED.items()},
        "ratio_to_ksampler": {phase: _ratios(rounds, scale, phase, "whole") for phase in PHASES},
        "rounds": rounds,
    }


def _ratios(rounds: list[dict], others: list[dict], phase: str, to: str) -> dict | None:
    return _spread([times[phase] / other[to] for times, other in zip(rounds, others)])


def _spread(values: list[float]) -> dict | None:
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _per_step(count: dict) -> dict:
    """What each step of a usual edit costs, and of operations what comes once."""
    guided, unguided = (_slopes(count[name]) for name in ("counts", "unguided_counts"))
    share, first = count["guided_share"], count["counts"][0]
    steps = {name: share * guided[name] + (1 - share) * unguided.get(name, 0.0) for name in guided}
    for name in ("fe", "forward_rows"):
        steps[name] -= count["held_share"]  # a step without its negative text is one forward pass less
    return {**steps, "fe_once": first["fe"] - first["steps"] * guided["fe"]}


def _slopes(counts: list[dict]) -> dict[str, float]:
    if not counts:
        return {}
    few, many = counts[0], counts[-1]
    names = ("fe", "forward_calls", "forward_rows", "backward_calls", "backward_rows")
    return {name: (many[name] - few[name]) / (many["steps"] - few["steps"]) for name in names}


def tables(variants: dict[str, dict]) -> str:
    """What was counted, then what was timed, one row for each variant."""
    timed = [_timed(variants), ""] if any(figures["rounds"] for figures in variants.values()) else []
    return "\n".join([_counted(variants), "", *timed, *_failures(variants)])


def _counted(variants: dict[str, dict]) -> str:
    peer = variants.get(BASE, {}).get("count")
    head = (
        "FE/step",
        "FE once",
        "forward rows (calls)/step",
        "backward",
        "peak MB",
        "/diffusers",
        "growth MB",
        "gradient",
    )
    rows = []
    for name, figures in variants.items():
        count, step, growth = figures["count"], figures["per_step"], figures["growth"]
        if not count:
            continue
        rows.append(
            (
                name,
                f"{step['fe']:.2f}",
                f"{step['fe_once']:.2f}",
                f"{step['forward_rows']:g} ({step['forward_calls']:g})",
                f"{step['backward_rows']:g} ({step['backward_calls']:g})",
                f"{count['peak_bytes'] / 1e6:.0f}",
                f"{count['peak_bytes'] / peer['peak_bytes']:.3f}" if peer else "",
                " -> ".join(f"{peak / 1e6:.0f}" for peak in growth.values()) if growth else "",
                f"{figures['gradient_error']:.1e}" if figures["gradient_error"] is not None else "",
            )
        )
    return _aligned(("counted", *head), rows)


def _timed(variants: dict[str, dict]) -> str:
    head = ("seconds", *PHASES[1:3], "again", "/diffusers", "CPU time", *PHASES[1:3], "again*", "/ksampler")
    rows = []
    for name, figures in variants.items():
        if not figures["rounds"]:
            continue
        seconds, ratios = figures["seconds"], figures["ratio_to_diffusers"]
        rows.append(
            (
                name,
                *(f"{seconds[phase]['median']:.2f}" for phase in PHASES),
                *(_shown(ratios[phase]) for phase in ("whole", "whole_cpu", *PHASES[1:])),
                _shown(figures["ratio_to_ksampler"]["whole"]),
            )
        )
    table = _aligned(("timed", *head), rows)
    return f"{table}\nMedian (lowest-highest) of the rounds. * editing again, to diffusers' inversion and edit"


def _shown(spread: dict | None) -> str:
    return "{median:.2f} ({min:.2f}-{max:.2f})".format(**spread) if spread else ""


def _failures(variants: dict[str, dict]) -> list[str]:
    lines = []
    for name, figures in variants.items():
        lines += [f"{name}: {kind} {reason}" for kind, reason in figures["failures"].items()]
        lines += [] if figures["finite"] else [f"{name}: the result is not finite"]
    return lines


def _aligned(head: tuple, rows: list[tuple]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in (head, *rows)
    )
