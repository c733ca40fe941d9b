"""The results as tables."""

from .tuning import ENOUGH, Result

COLUMNS = {
    "hit": ("hit", 2),
    "whole": ("whole", 2),
    "structure": ("structure", 2),
    "inside": ("inside", 2),
    "background": ("background", 2),
    "psnr": ("PSNR", 1),
    "ssim": ("SSIM", 3),
}


def table(results: list[Result]) -> str:
    """Means over the test scenes with their 95 % intervals, a row for each method."""
    measured = [name for name in COLUMNS if name in results[0].test]
    head = ("", "knob", *(COLUMNS[name][0] for name in measured), "s/picture")
    rows = [
        (
            result.method + missed(result),
            f"{result.knob} {result.value:g}" if result.knob else "",
            *(_shown(result.test[name], COLUMNS[name][1]) for name in measured),
            f"{result.seconds:.1f}" if result.seconds is not None else "",
        )
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in (head, *rows)
    )


def missed(result: Result) -> str:
    """An asterisk where no value of the knob reached the hit rate on the tuning scenes."""
    return "*" if result.curve and max(figures["hit"][0] for _, figures in result.curve) < ENOUGH else ""


def _shown(values: list[float], digits: int) -> str:
    return "{0:.{3}f} ({1:.{3}f}-{2:.{3}f})".format(*values, digits)
