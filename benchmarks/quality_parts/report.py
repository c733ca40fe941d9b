"""The results as tables."""

from .tuning import Result

COLUMNS = {
    "hit": ("hit", 2),
    "whole": ("whole", 2),
    "structure": ("structure", 2),
    "inside": ("inside", 2),
    "background": ("background", 2),
    "psnr": ("PSNR", 1),
    "ssim": ("SSIM", 3),
}

PASTED = {
    "hit": ("hit", 2),
    "whole_before": ("whole before", 2),
    "whole": ("whole", 2),
    "outside": ("outside", 2),
    "kept": ("kept", 2),
}


def table(results: list[Result]) -> str:
    """Means over the test scenes with their 95 % intervals, a row for each method."""
    seconds = [f"{result.seconds:.1f}" if result.seconds is not None else "" for result in results]
    return _table(results, COLUMNS, [result.test for result in results], {"s/picture": seconds})


def pasted_table(results: list[Result]) -> str:
    """The same of the pictures pasted back into the renders."""
    return _table(results, PASTED, [result.pasted for result in results])


def _table(
    results: list[Result], columns: dict[str, tuple[str, int]], figures: list[dict], more: dict[str, list[str]] = {}
) -> str:
    measured = [name for name in columns if name in figures[0]]
    head = ("", "knob", *(columns[name][0] for name in measured), *more)
    rows = [
        (
            result.method + missed(result),
            f"{result.knob} {result.value:g}" if result.knob else "",
            *(_shown(found[name], columns[name][1]) for name in measured),
            *(column[number] for column in more.values()),
        )
        for number, (result, found) in enumerate(zip(results, figures))
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in (head, *rows)
    )


def missed(result: Result) -> str:
    """An asterisk where no value of the knob reached the hit rate on the tuning scenes."""
    return "*" if result.curve and max(figures["hit"][0] for _, figures in result.curve) < result.enough else ""


def _shown(values: list[float], digits: int) -> str:
    return "{0:.{3}f} ({1:.{3}f}-{2:.{3}f})".format(*values, digits)
