"""Trains the students that ship with the demo: `python dev.py train distilled --work FOLDER --edit cat2dog`.

The pack's own guided edit of training scenes makes the pairs; a student learns from them alone. It is measured on the test
scenes of `bench quality`, and written to FOLDER/EDIT/ with a sheet of test scenes (source, teacher, student). Pairs and
training that are there are kept: the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.multiprocessing as processes

log = logging.getLogger("pix2pix_zero.distilled")

PAIR_SEED = 1_000_000  # as all training scenes
TEST_SEED = 300_000  # of `bench quality`
SHOWN = 16
CHECKPOINT = "checkpoint.safetensors"
# What a training that has begun keeps: with others of these, a finished one would be measured as if it had them.
KEPT = (
    "pairs",
    "pair_minutes",
    "in_place",
    "steps",
    "batch",
    "crop",
    "learning_rate",
    "features",
    "mirror",
    "half",
    "seed",
)
SAY_EVERY = 120.0  # seconds: measuring costs as much as some steps


@dataclass(frozen=True)
class Recipe:
    """Sizes of a run. TRAINING.md names those of the students that ship."""

    edit: str
    pairs: int = 1872
    pair_minutes: float | None = None
    in_place: float = 1.0
    train_steps: int = 2000
    minutes: float | None = None
    steps: int = 15
    tests: int = 64
    pair_batch: int = 16
    batch: int = 6
    crop: int = 0
    workers: int = 1
    learning_rate: float = 2e-3
    features: float = 0.0
    mirror: bool = False
    half: bool = False
    seed: int = 0


def quiet_host(device: str) -> None:
    """Set the host up for a device, before any of it is imported, with one thread where that is the CPU."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    from comfy.cli_args import args as host_options

    host_options.cpu = device == "cpu"
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)
    if device == "cpu":
        torch.set_num_threads(1)


def check_recipe(folder: Path, recipe: Recipe) -> None:
    """Keep what a training in `folder` begins with. Raises ValueError if `recipe` can't be, or if another one has begun there."""
    from ..benchmarks.quality_parts.scenes import EDITS

    if recipe.edit not in EDITS:
        raise ValueError(f"--edit {recipe.edit}: there is none. Give one of {', '.join(EDITS)}.")
    if not 0 < recipe.in_place <= 1:
        raise ValueError(f"--in-place {recipe.in_place:g}: give a part of the pairs, above 0 and up to 1.")
    if recipe.in_place < 1 and not EDITS[recipe.edit].whole_picture:
        raise ValueError(
            f"--in-place: the edges of {recipe.edit} have to change. It is for edits of the whole picture."
        )
    begun, ours = folder / "recipe.json", {name: getattr(recipe, name) for name in KEPT}
    if (folder / CHECKPOINT).is_file() and begun.is_file():
        other = json.loads(begun.read_text(encoding="utf-8"))
        unlike = [name for name in KEPT if other.get(name) != ours[name]]
        if unlike:
            was = ", ".join(f"{name} {other.get(name)}" for name in unlike)
            raise ValueError(f"{folder / CHECKPOINT} was begun with {was}. Give the same, or remove it to begin anew.")
    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(ours) + "\n", encoding="utf-8")


def distill(work: Path, recipe: Recipe, device: str) -> dict[str, object]:
    """Run what is missing of a recipe in `work`; its figures, which are also written beside the student."""
    from ..distillation.kept_edges import most_in_place
    from ..distillation.pairs import PairFolder

    folder = work / recipe.edit
    folder.mkdir(parents=True, exist_ok=True)
    training, tests = folder / "pairs", folder / "tests"
    seeds = range(PAIR_SEED, PAIR_SEED + recipe.pairs)
    test_seeds = range(TEST_SEED, TEST_SEED + recipe.tests)
    _draw(recipe, [(tests, test_seeds, None), (training, seeds, recipe.pair_minutes)], device)
    wanted = {str(seed) for seed in seeds}
    keys = [key for key in PairFolder(training).keys() if key in wanted]
    pairs = PairFolder(training).read(keys)
    if recipe.in_place < 1:
        pairs = most_in_place(pairs, recipe.in_place)
    log.info("%d pairs of %d, %d test scenes", len(pairs), len(keys), recipe.tests)
    student, curve = _train(recipe, folder, pairs, device)
    tested = PairFolder(tests).read([str(seed) for seed in test_seeds])
    figures = _measure(recipe, folder, tested, student, len(pairs))
    figures |= {"teacher_seconds": round(_teacher_seconds(recipe), 3), "recipe": asdict(recipe), "held_out": curve}
    (folder / f"{recipe.edit}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    log.info("teacher: %s s a picture on %s; wrote %s", figures["teacher_seconds"], device, folder)
    return figures


def _draw(recipe: Recipe, wanted: list[tuple[Path, range, float | None]], device: str) -> None:
    """Draw pairs into folders, each from its seeds in at most so many minutes from now."""
    from .training.teacher import Job, draw_share

    now = time.time()
    jobs = [
        Job(str(folder), seeds, float("inf") if minutes is None else now + 60 * minutes)
        for folder, seeds, minutes in wanted
    ]
    arguments = (device, recipe.edit, jobs, recipe.steps, recipe.pair_batch)
    if recipe.workers == 1:
        draw_share(slice(None), *arguments)
        return
    context = processes.get_context("spawn")
    shares = [
        context.Process(target=draw_share, args=(slice(first, None, recipe.workers), *arguments))
        for first in range(recipe.workers)
    ]
    for share in shares:
        share.start()
    for share in shares:
        share.join()
    if any(share.exitcode for share in shares):
        raise SystemExit("A process that drew pairs has failed; see above. The same command goes on.")


def _train(recipe: Recipe, folder: Path, pairs, device: str) -> tuple[torch.nn.Module, list[tuple[int, float]]]:
    from ..distillation.learning import Report, Settings, Training
    from ..distillation.losses import LossWeights
    from ..host.networks.students import make_student
    from ..host.networks.teacher_features import EncoderFeatures
    from .loader import load_demo_model

    settings = Settings(
        steps=recipe.train_steps,
        minutes=recipe.minutes,
        batch=recipe.batch,
        crop=recipe.crop,
        learning_rate=recipe.learning_rate,
        half=recipe.half,
        mirror=recipe.mirror,
        seed=recipe.seed,
        weights=LossWeights(features=recipe.features),
    )
    features = EncoderFeatures(load_demo_model()[2], device) if recipe.features else None
    student = make_student(seed=recipe.seed).to(device, memory_format=torch.channels_last)
    run = Training(student, pairs.to(device), settings, features, folder / CHECKPOINT)
    curve: list[tuple[int, float]] = []
    said = time.monotonic()

    def say(report: Report) -> None:
        nonlocal said
        if time.monotonic() - said < SAY_EVERY and report.progress < 1:
            return
        said = time.monotonic()
        curve.append((report.step, run.held_out_error()))
        log.info(
            "%.0f %%, step %d, minute %.1f (%.1f steps a second), loss %.4f, held out inside %.2f of 255",
            100 * report.progress,
            report.step,
            report.seconds / 60,
            report.rate,
            report.loss,
            curve[-1][1],
        )
        _save(run.average, recipe, folder, len(pairs), {})

    log.info("%s: %d weights, on %s", recipe.edit, sum(p.numel() for p in student.parameters()), device)
    return run.run(say), curve


def _save(student: torch.nn.Module, recipe: Recipe, folder: Path, pairs: int, figures: dict) -> Path:
    from ..benchmarks.quality_parts.scenes import EDITS
    from ..host.networks.students import save_student

    concept = EDITS[recipe.edit].concept
    facts = {
        "source": concept.source,
        "target": concept.target,
        "size": 128,
        "teacher": "the pix2pix-zero demo model",
        "pairs": pairs,
        "agreement": {name: round(value, 3) for name, value in figures.items()},
    }
    path = folder / f"{recipe.edit}.safetensors"
    save_student(student, path, facts)
    return path


def _measure(recipe: Recipe, folder: Path, tests, student: torch.nn.Module, pairs: int) -> dict:
    """Save the student, and measure what the host loads of it."""
    from ..benchmarks.distill_parts.figures import Compared, agreement, apply, contact_sheet, milliseconds
    from ..benchmarks.judge import load_judge
    from ..benchmarks.quality_parts.scenes import EDITS, draw_scenes
    from ..host.networks.students import load_student

    edit = EDITS[recipe.edit]
    loaded = load_student(_save(student, recipe, folder, pairs, {}))
    scenes = draw_scenes(edit, recipe.tests, TEST_SEED)
    teacher = tests.edited.movedim(1, -1).float() / 255
    edited = apply(loaded, scenes.sources)
    figures = agreement(edit, scenes, Compared(teacher, edited), load_judge())
    path = _save(student, recipe, folder, pairs, figures)
    contact_sheet([row[:SHOWN] for row in (scenes.sources, teacher, edited)]).save(folder / f"{recipe.edit}.png")
    found = {
        **{name: round(value, 3) for name, value in figures.items()},
        "milliseconds": {name: round(value, 3) for name, value in milliseconds(loaded).items()},
        "megabytes": round(path.stat().st_size / 1e6, 3),
        "pairs": pairs,
    }
    for name, value in found.items():
        log.info("%s: %s", name, value)
    return found


def _teacher_seconds(recipe: Recipe) -> float:
    """Of one picture, from the picture to the picture, once all is warm."""
    from ..benchmarks.quality_parts.scenes import EDITS
    from .training.teacher import Teacher, render_sources

    teacher = Teacher(EDITS[recipe.edit], recipe.steps)
    picture = render_sources(teacher.edit, [TEST_SEED])
    for _ in range(2):
        start = time.perf_counter()
        teacher.draw(picture)
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dev.py train distilled", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for pairs, checkpoints and results (about 100 MB an edit)")
    add("--edit", required=True, metavar="NAME", help="cat2dog, day2night or another of `bench quality`")
    add("--pairs", type=int, default=Recipe.pairs, help="default: %(default)s")
    add("--pair-minutes", type=float, help="no pairs after that (default: no limit)")
    add(
        "--in-place",
        type=float,
        default=Recipe.in_place,
        help="part of the pairs to train on, those whose edges stayed best in place; for edits of the whole picture "
        "(default: %(default)s, all)",
    )
    add("--train-steps", type=int, default=Recipe.train_steps, help="of the student (default: %(default)s)")
    add(
        "--minutes",
        type=float,
        help="of training, instead of --train-steps: another machine makes another student then",
    )
    add("--steps", type=int, default=Recipe.steps, help="of the teacher (default: %(default)s)")
    add("--tests", type=int, default=Recipe.tests, help="scenes to measure on (default: %(default)s)")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--workers", type=int, help="processes that draw pairs (default: 4 on cuda, else the cores)")
    add("--pair-batch", type=int, help="pictures that are edited at once (default: 64 on cuda, else 16)")
    add("--batch", type=int, help="pairs in a training step (default: 64 on cuda, else 6)")
    add(
        "--crop",
        type=int,
        default=Recipe.crop,
        help="side of the squares that are trained on, 0 for whole scenes (default: %(default)s)",
    )
    add("--learning-rate", type=float, default=Recipe.learning_rate, help="default: %(default)s")
    add("--features", type=float, default=Recipe.features, help="weight of the feature loss (default: %(default)s)")
    add(
        "--mirror",
        action="store_true",
        help="mirror half of the pairs; the demo's edits are not mirrored with a picture",
    )
    add(
        "--half",
        action=argparse.BooleanOptionalAction,
        help="train in mixed precision: fp16 on cuda, bf16 on a CPU (default: on cuda; few CPUs are faster so)",
    )
    add("--seed", type=int, default=Recipe.seed, help="default: %(default)s")
    given = vars(parser.parse_args(arguments))
    work, device = given.pop("work"), given.pop("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device == "cuda"
    sizes = {"workers": 4 if on_cuda else os.cpu_count() or 1, "pair_batch": 64 if on_cuda else Recipe.pair_batch}
    sizes |= {"batch": 64 if on_cuda else Recipe.batch, "half": on_cuda}
    given.update({name: value for name, value in sizes.items() if given[name] is None})
    if on_cuda:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    quiet_host(device)
    recipe = Recipe(**given)
    try:
        check_recipe(work / recipe.edit, recipe)
    except ValueError as failure:
        parser.error(str(failure))
    distill(work, recipe, device)


if __name__ == "__main__":
    main()
