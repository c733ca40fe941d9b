"""The noise report: plots of a noise map's statistics beside those of true noise, and the figures as text."""

import torch
from PIL import Image

from ..editing import noise_statistics as statistics
from ..editing.inputs import interruptible
from ..editing.noise_statistics import NoiseStatistics, noise_statistics
from ..editing.trajectory import Inversion
from . import charts
from .charts import Chart, Sheet

WIDTH, HEIGHT = 1500, 1290
LEFT, RIGHT = 80, WIDTH - 40
SPREADS = 3.0
"""The grey bands are so many standard deviations of true noise wide to each side: 1 value in 400 lies outside by chance."""


def report_noise(
    noise: dict, inversion: Inversion | None = None, compare_with: dict | None = None
) -> tuple[torch.Tensor, str]:
    """(plots as IMAGE [B, height, width, 3], the figures as text) for a noise LATENT [B, C, H, W].

    `inversion`: what the noise belongs to, for its scale; without it each noise is divided by its standard deviation.
    `compare_with`: another noise LATENT, of as many maps or of one. Raises ValueError, naming the socket, for latents
    that are none.
    """
    maps = _noise_maps(noise, inversion, "noise")
    others = [None] * len(maps)
    if compare_with is not None:
        others = list(_noise_maps(compare_with, inversion, "compare_with"))
        if len(others) not in (1, len(maps)):
            raise ValueError(
                f"compare_with: it holds {len(others)} latents for {len(maps)} of noise. Give one, or one for each."
            )
        others = others * len(maps) if len(others) == 1 else others
    pictures, lines = [], []
    for number, (one, other) in enumerate(interruptible(zip(maps, others)), 1):
        shown = [("noise", one)] + ([] if other is None else [("compare_with", other)])
        measured = {name: noise_statistics(each) for name, each in shown}
        pictures.append(charts.as_image(_draw(dict(shown), measured)))
        prefix = f"{number}: " if len(maps) > 1 else ""
        lines += [f"{prefix}{name}: {_figures(measured[name], each.shape)}" for name, each in shown]
    scale = (
        "Divided by its own standard deviation, as no inversion is connected."
        if inversion is None
        else "As the model sees it."
    )
    return torch.stack(pictures), "\n".join([*lines, scale])


def _noise_maps(latent: dict, inversion: Inversion | None, socket: str) -> torch.Tensor:
    """The maps [B, C, H, W], in units of true noise."""
    samples = latent.get("samples")
    if not torch.is_tensor(samples):
        raise ValueError(f"{socket}: it holds no samples. Connect the noise output of Invert Picture.")
    samples = samples.cpu().float()
    if samples.ndim != 4 or min(samples.shape[-2:]) < 2 or not samples.numel():
        raise ValueError(
            f"{socket}: its shape is {list(samples.shape)}, but noise is [batch, channels, height, width], at least 2 x 2. "
            "Connect the noise output of Invert Picture."
        )
    if not samples.isfinite().all():
        raise ValueError(
            f"{socket}: it contains NaN or infinite values. Invert the picture again, with the VAE in fp32."
        )
    if inversion is None:
        return samples / samples.std((1, 2, 3), keepdim=True, correction=0).clamp(min=1e-12)
    channels = inversion.latent_format.latent_channels
    if samples.shape[1] != channels:
        raise ValueError(
            f"{socket}: it has {samples.shape[1]} channels, but the model of the inversion {channels}. Connect the noise of "
            "an inversion with the same model."
        )
    power = inversion.path.power(float(inversion.sigmas[-1]))
    return inversion.latent_format.process_in(samples) / power**0.5


def _figures(measured: NoiseStatistics, shape: torch.Size) -> str:
    spreads = statistics.autocorrelation_spread(*shape)
    texts = [
        f"mean {float(measured.mean.mean()):.3f}",
        f"variance {float(measured.variance.mean()):.3f}",
        f"KL divergence {measured.kl:.5f}",
    ]
    worst = [(abs(scale) / spread).max() for scale, spread in zip(measured.autocorrelation, spreads) if len(scale)]
    if worst:
        number = int(torch.stack(worst).argmax())
        found, spread = measured.autocorrelation[number], spreads[number]
        shift = int((abs(found) / spread).argmax())
        means = f" of {2**number} x {2**number} means" if number else ""
        texts.append(
            f"autocorrelation {float(found[shift]):.3f} at shift {shift + 1}{means} (true noise within "
            f"{SPREADS * float(spread[shift]):.3f})"
        )
    ratio = float(measured.spectrum[: max(1, len(measured.spectrum) // 4)].mean())
    texts.append(f"power of the lowest quarter of frequencies {ratio:.2f} (true noise 1)")
    return ", ".join(texts)


def _draw(maps: dict[str, torch.Tensor], measured: dict[str, NoiseStatistics]) -> Image.Image:
    sheet = Sheet(WIDTH, HEIGHT)
    _heading(sheet, maps, measured)
    middle = (LEFT + RIGHT) / 2
    shape = maps["noise"].shape
    _histogram(sheet, (LEFT, 150, middle - 40, 440), measured, shape)
    _spectrum(sheet, (middle + 50, 150, RIGHT, 440), measured, shape)
    _autocorrelation(sheet, (LEFT, 560, RIGHT, 820), measured, shape)
    _channels(sheet, (LEFT, 945, LEFT + 640, 1205), measured, shape)
    _pictures(sheet, (LEFT + 720, 945, RIGHT, 1205), maps)
    return sheet.finish()


def _heading(sheet: Sheet, maps: dict, measured: dict) -> None:
    channels, height, width = maps["noise"].shape
    sheet.text((LEFT, 56), "Noise report", 30, anchor="ls")
    sheet.text(
        (LEFT, 84),
        f"{channels} channels of {width} x {height}. Grey: what {SPREADS:g} standard deviations of chance reach.",
        15,
        charts.FAINT_INK,
        "ls",
    )
    x = RIGHT
    for label, draw in reversed(
        [*((name, colour) for name, colour in zip(measured, charts.SERIES)), ("true noise", None)]
    ):
        x -= charts.font(16).getlength(label)
        sheet.text((x, 52), label, 16, anchor="lm")
        x -= 44
        if draw is None:
            sheet.box(x, 44, x + 34, 60, charts.BAND)
            sheet.dashes([(x, 52), (x + 34, 52)], charts.INK, 1.5)
        else:
            sheet.line([(x, 52), (x + 34, 52)], draw, 4)
        x -= 34


def _series(measured: dict[str, NoiseStatistics]) -> list[tuple[NoiseStatistics, tuple[int, int, int]]]:
    """The compared noise first, so that the noise itself lies on top."""
    return list(zip(measured.values(), charts.SERIES))[::-1]


def _histogram(sheet: Sheet, place, measured: dict, shape: torch.Size) -> None:
    spread = SPREADS * statistics.density_spread(shape.numel())
    centres = statistics.bin_centres(len(spread))
    normal = statistics.normal_density(centres)
    highest = max(float(each.density.max()) for each in measured.values())
    limits = 0.0, 1.05 * max(highest, float((normal + spread).max()))
    chart = Chart(sheet, place, (-statistics.RANGE, statistics.RANGE), limits)
    chart.frame("Values", "standard deviations of true noise", range(-4, 5))
    xs = centres.tolist()
    chart.band(xs, (normal - spread).clamp(min=0).tolist(), (normal + spread).tolist())
    for each, colour in _series(measured):
        chart.steps(statistics.bin_centres(len(each.density)).tolist(), each.density.tolist(), colour)
    fine = torch.linspace(-statistics.RANGE, statistics.RANGE, 161, dtype=torch.float64)
    chart.dashes(fine.tolist(), statistics.normal_density(fine).tolist(), charts.INK, 2)


def _spectrum(sheet: Sheet, place, measured: dict, shape: torch.Size) -> None:
    spread = SPREADS * statistics.power_spread(*shape)
    smallest, largest = 0.5, 2.0
    for each in measured.values():
        smallest, largest = min(smallest, float(each.spectrum.min())), max(largest, float(each.spectrum.max()))
    limits = 2.0 ** torch.tensor(smallest).clamp(min=1e-4).log2().floor(), 2.0 ** torch.tensor(largest).log2().ceil()
    chart = Chart(sheet, place, (0.0, 0.5), tuple(map(float, limits)), logarithmic=True)
    exponents = range(round(torch.tensor(chart.y[0]).log2().item()), round(torch.tensor(chart.y[1]).log2().item()) + 1)
    step = -(-len(exponents) // 7)
    chart.frame("Power by frequency", "cycles per pixel", None, [2.0**e for e in exponents if e % step == 0], _fraction)
    frequencies = [(k + 1) / min(shape[1:]) for k in range(len(spread))]
    chart.band(frequencies, (1 - spread).clamp(min=1e-6).tolist(), (1 + spread).tolist())
    chart.dashes([0.0, 0.5], [1.0, 1.0], charts.INK)
    for each, colour in _series(measured):
        step = 0.5 / len(each.spectrum)
        chart.line([step * (k + 1) for k in range(len(each.spectrum))], each.spectrum.tolist(), colour, dots=True)


def _fraction(value: float) -> str:
    return f"{value:g}" if value >= 1 else f"1/{round(1 / value)}"


def _autocorrelation(sheet: Sheet, place, measured: dict, shape: torch.Size) -> None:
    left, top, right, bottom = place
    spreads = [SPREADS * spread for spread in statistics.autocorrelation_spread(*shape)]
    largest = max(float(abs(scale).max()) for each in measured.values() for scale in each.autocorrelation if len(scale))
    limit = max(0.05, 1.1 * largest, *(1.2 * float(spread.max()) for spread in spreads if len(spread)))
    gap, count = 40, len(spreads)
    width = (right - left - gap * (count - 1)) / count
    for number, spread in enumerate(spreads):
        start = left + number * (width + gap)
        shifts = list(range(1, len(spread) + 1))
        chart = Chart(sheet, (start, top, start + width, bottom), (0.5, len(spread) + 0.5), (-limit, limit))
        name = "Autocorrelation" if number == 0 else f"of {2**number} x {2**number} means"
        step = max(1, -(-len(shifts) // 8))
        chart.frame(name, "shift", [s for s in shifts if s % step == 0 or s == 1 == step], y_labels=number == 0)
        edges = [0.5, *shifts, len(spread) + 0.5]
        padded = [float(spread[0]), *spread.tolist(), float(spread[-1])]
        chart.band(edges, [-s for s in padded], padded)
        chart.dashes([0.5, len(spread) + 0.5], [0.0, 0.0], charts.INK)
        for each, colour in _series(measured):
            if number < len(each.autocorrelation):
                found = each.autocorrelation[number].tolist()
                chart.line(list(range(1, len(found) + 1)), found, colour, dots=True)


def _channels(sheet: Sheet, place, measured: dict, shape: torch.Size) -> None:
    left, top, right, bottom = place
    channels, height, width = shape
    pixels = height * width
    panels = (
        ("Mean by channel", "mean", 0.0, SPREADS / pixels**0.5),
        ("Variance by channel", "variance", 1.0, SPREADS * (2 / pixels) ** 0.5),
    )
    middle = (left + right) / 2
    for (title, name, true, spread), (start, end) in zip(panels, ((left, middle - 35), (middle + 35, right))):
        values = [getattr(each, name) for each in measured.values()]
        far = max(1.3 * spread, *(1.15 * float((value - true).abs().max()) for value in values), 0.05)
        low = max(0.0, true - far) if name == "variance" else true - far
        chart = Chart(sheet, (start, top, end, bottom), (0.5, channels + 0.5), (low, true + far))
        step = -(-channels // 8)
        chart.frame(title, "channel", [c for c in range(1, channels + 1) if c % step == 0])
        ends = [0.5, channels + 0.5]
        chart.band(ends, [true - spread] * 2, [true + spread] * 2)
        chart.dashes(ends, [true, true], charts.INK)
        for number, (each, colour) in enumerate(_series(measured)[::-1]):
            beside = 0.24 * (number - (len(measured) - 1) / 2)
            for channel, value in enumerate(getattr(each, name).tolist(), 1):
                sheet.dot(*chart.at(channel + beside, value), 7, colour)


def _pictures(sheet: Sheet, place, maps: dict[str, torch.Tensor]) -> None:
    left, top, right, bottom = place
    sheet.text((left, top - 12), "The noise itself, its first channel", 17, anchor="ls")
    side = min(bottom - top, (right - left - 40) / max(2, len(maps)))
    for number, ((name, noise), colour) in enumerate(zip(maps.items(), charts.SERIES)):
        grey = charts.as_pillow((noise[0] / 6 + 0.5)[..., None].clamp(0, 1))
        height, width = noise.shape[-2:]
        scale = side / max(height, width)
        x = left + number * (side + 40)
        sheet.paste(grey, x, top, width * scale, height * scale, Image.Resampling.NEAREST)
        if len(maps) > 1:
            sheet.text((x, top + height * scale + 10), name, 15, colour)
