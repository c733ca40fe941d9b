"""Every row of the README's "Which knob to turn" does what it says: a figure on scenes of the demo, or the test that has it."""

import ast
import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pix2pix_zero.benchmarks.judge import QUESTIONS, load_judge
from pix2pix_zero.benchmarks.quality_parts.figures import measure, structure_error
from pix2pix_zero.benchmarks.quality_parts.scenes import EDITS, QualityEdit, draw_scenes
from pix2pix_zero.benchmarks.quality_parts.workbench import DemoModels, Workbench, node_default
from pix2pix_zero.devtools import graphs
from pix2pix_zero.host.sampling.edit import EditSettings, sample_edit
from pix2pix_zero.nodes.directions import Pix2PixZeroApplyDirection, Pix2PixZeroEditDirection
from pix2pix_zero.nodes.sampler import Pix2PixZeroKSampler

ROOT = Path(__file__).resolve().parents[2]
FIRST_SEED = 400_000  # none of the benchmark's
SCENES, STEPS = 4, 8
MORE_STEPS = 12  # where the edits that are compared are too near to each other with fewer
VISIBLE = 0.15  # of 1: a difference that is seen
DEFAULTS = EditSettings(
    1.5,  # the demo model's
    node_default(Pix2PixZeroKSampler, "guidance_strength"),
    (node_default(Pix2PixZeroKSampler, "start_percent"), node_default(Pix2PixZeroKSampler, "end_percent")),
    local_blend=node_default(Pix2PixZeroKSampler, "local_blend"),
    feature_until=node_default(Pix2PixZeroKSampler, "feature_until"),
)
WINTER = QualityEdit(
    graphs.EDITS["summer2winter"], {"winter": False, "night": False}, {"winter": True}, ("summer", "winter"), True
)

PROVED_HERE: dict[str, str] = {}
PROVED_ELSEWHERE = {
    "The redrawn picture differs from the source even without an edit": [
        "host/test_inversion_methods.py::test_the_unedited_picture_comes_back_exactly",
        "host/test_inversion_methods.py::test_fixed_points_bring_the_picture_back_by_plain_sampling_and_with_residuals_exactly",
        "host/test_inversion_methods.py::test_the_measured_reconstruction_is_that_of_a_stock_sampler",
    ],
    "The pasted edit lacks a part": [
        "unit/test_paste.py::test_without_an_area_it_is_where_the_pictures_differ",
        "unit/test_paste.py::test_grow_and_feather_reach_as_far_as_they_say",
    ],
    "The edge of the pasted edit shows": [
        "unit/test_paste.py::test_grow_and_feather_reach_as_far_as_they_say",
        "unit/test_paste.py::test_a_tint_of_the_whole_edit_is_taken_off",
    ],
    "Only a part of the picture may change": [
        "host/test_sampling.py::test_a_mask_on_the_sampler_limits_the_edit_like_a_noise_mask",
        "host/test_kept_source.py::test_outside_the_mask_every_sampler_ends_on_the_source",
    ],
    "Out of memory": [
        "host/test_memory.py::test_less_is_asked_for_with_every_level_and_in_half_precision",
        "host/test_presets.py::test_low_memory_gives_the_edit_of_the_default",
    ],
    "The model draws in 1 to 8 steps (LCM, Turbo, Lightning, Hyper)": [
        "host/test_unet_families_sampling.py::test_few_steps_give_the_picture_back_and_guided_edits_of_its_scale"
    ],
    "You want the paper's edit, or the authors' own update": [
        "host/test_presets.py::test_paper_is_guidance_alone_in_every_step_by_the_papers_own",
        "host/test_official_parity.py::test_official_edit_matches_diffusers",
    ],
}


def proves(row: str):
    """The test is the proof of the README's row with these words in its first column."""

    def noted(test):
        PROVED_HERE[row] = test.__name__
        return torch.inference_mode()(test)

    return noted


def rows_of_the_readme() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("## Which knob to turn")[2].partition("\n## ")[0]
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")][1:]


def test_every_row_is_proved_and_every_proof_is_there():
    assert sorted(rows_of_the_readme()) == sorted([*PROVED_HERE, *PROVED_ELSEWHERE])
    for place in {place for places in PROVED_ELSEWHERE.values() for place in places}:
        path, _, name = place.partition("::")
        tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, place


class Scenes:
    """The edits of some scenes in so many steps, and what is measured of them."""

    def __init__(self, bench: Workbench, judge, steps: int):
        self.bench, self.judge, self.steps = bench, judge, steps

    def edited(self, direction=None, strength=None, **settings):
        """(pictures, edited area), drawn once for the tests that ask for the same along the edit's own direction."""
        strength = self.bench.edit.concept.strength if strength is None else strength
        settings = replace(DEFAULTS, **settings)
        if direction is not None:
            return self._draw(direction, strength, settings)
        drawn = (self.steps, strength, settings)
        return self.bench.once(drawn, lambda: self._draw(self.bench.direction, strength, settings))

    def _draw(self, direction, strength: float, settings: EditSettings):
        bench = self.bench
        (moved,) = Pix2PixZeroApplyDirection.execute(bench.described, direction, strength).result
        samples, area = sample_edit(bench.model, bench.inversion(self.steps), moved, bench.described, settings)
        return bench.vae.decode(samples), area

    def figures(self, **settings) -> dict[str, float]:
        pictures, area = self.edited(**settings)
        found = {name: float(values.mean()) for name, values in measure(self.bench, self.judge, pictures).items()}
        question, wanted = self.bench.edit.asked
        seen = self.judge(pictures)[question][:, list(QUESTIONS[question]).index(wanted)]
        moved = structure_error(self.judge, pictures, self.bench.source)
        burnt = (pictures <= 0) | (pictures >= 1)
        return found | {
            "seen": float(seen.mean()),
            "moved": float(moved.mean()),
            "burnt": float(burnt.float().mean()),
            "left": self.left(pictures),
            "area": float(area.mean()),
        }

    def left(self, pictures) -> float:
        """The part of the source that shines through where the ground truth differs from it: 1 is the source, 0 the truth."""
        change = self.bench.source - self.bench.truth
        change *= (change.abs().amax(-1, keepdim=True) > VISIBLE).float()
        shares = ((pictures - self.bench.truth) * change).sum((1, 2, 3)) / change.square().sum((1, 2, 3))
        return float(shares.mean())


@pytest.fixture(scope="module")
def scenes():
    with torch.inference_mode():
        models, judge = DemoModels.load(), load_judge()

    @functools.cache
    def bench(name: str, count: int) -> Workbench:
        edit = WINTER if name == "summer2winter" else EDITS[name]
        return Workbench(models, edit, draw_scenes(edit, count, FIRST_SEED), STEPS)

    def of(name: str, count: int = SCENES, steps: int = STEPS) -> Scenes:
        return Scenes(bench(name, count), judge, steps)

    return of


def falls(values: list[float], part: float = 0.0) -> bool:
    """Whether each is below the one before, by that part of it at least."""
    return all(after < (1 - part) * before for before, after in zip(values, values[1:]))


@proves("The edit does not show")
def test_cfg_and_strength_bring_the_edit_out(scenes):
    cats = scenes("cat2dog")
    seen = [cats.figures(strength=strength)["seen"] for strength in (0.25, 0.5, 0.75)]
    assert falls(seen[::-1], 0.5) and seen[0] < 0.1 and seen[-1] > 0.9
    weak = [cats.figures(strength=0.5, cfg=cfg)["seen"] for cfg in (1.0, 1.5, 3.0)]
    assert falls(weak[::-1], 0.1)


@proves("Shape, pose or layout drift")
def test_features_guidance_and_a_lower_cfg_hold_the_layout(scenes):
    cats = scenes("cat2dog")
    assert falls([cats.figures(feature_until=until)["moved"] for until in (0.0, 0.5, 0.8)], 0.1)
    assert falls([cats.figures(cfg=cfg)["moved"] for cfg in (5.0, 3.0, 1.5)], 0.1)
    cats = scenes("cat2dog", steps=MORE_STEPS)
    guided = [cats.figures(guidance_strength=strength)["moved"] for strength in (0.0, 0.05, 0.2, 1.0)]
    assert falls(guided) and guided[-1] < 0.5 * guided[0]


@proves("The new thing keeps the shape of the old one")
def test_fewer_steps_with_the_sources_features_free_the_shape(scenes):
    assert falls([scenes("cat2dog").figures(feature_until=until)["moved"] for until in (0.0, 0.3, 0.8)], 0.05)


@proves("Traces of the old thing are left (a cat's ears behind the dog)")
def test_a_higher_cfg_and_then_fewer_features_take_the_old_thing_away(scenes):
    by_cfg = [scenes("cat2dog").figures(cfg=cfg)["left"] for cfg in (1.0, 1.5, 2.0)]
    assert falls(by_cfg, 0.3) and by_cfg[-1] < 0.1
    assert falls([scenes("cat2dog").figures(feature_until=until)["left"] for until in (0.5, 0.3)], 0.2)


@proves("The background changes")
def test_a_higher_local_blend_keeps_the_background(scenes):
    cats = scenes("cat2dog", steps=MORE_STEPS)
    found = [cats.figures(local_blend=blend) for blend in (0.0, 0.2, 0.4)]
    assert falls([each["background"] for each in found], 0.1)
    assert falls([each["area"] for each in found], 0.1), "edited_area shows where"


@proves("A change of the whole picture (*summer* to *winter*) leaves spots")
def test_without_local_blend_the_whole_picture_changes(scenes):
    scenes = scenes("summer2winter")
    spotted, whole = (scenes.figures(local_blend=blend) for blend in (0.4, 0.0))
    assert spotted["area"] < 0.95 < whole["area"] == 1
    assert whole["whole"] < spotted["whole"]


@proves("More changes than should")
def test_a_lower_strength_changes_less(scenes):
    assert falls([scenes("cat2dog").figures(strength=strength)["background"] for strength in (1.5, 1.0, 0.5)], 0.1)


@proves("Colours burn")
def test_a_lower_cfg_leaves_fewer_burnt_colours(scenes):
    assert falls([scenes("cat2dog").figures(cfg=cfg)["burnt"] for cfg in (5.0, 3.0, 1.5)], 0.5)


@proves("Something is to be added (*cat* to *cat wearing glasses*) and does not show")
def test_alignment_by_words_or_more_strength_adds_something(scenes):
    cats = scenes("add_glasses")
    concept = cats.bench.edit.concept
    (by_words,) = Pix2PixZeroEditDirection.execute(cats.bench.clip, concept.source, concept.target, "words").result
    faint = cats.figures(strength=1.0)
    for bolder in (cats.figures(strength=1.0, direction=by_words), cats.figures(strength=1.5)):
        assert falls([faint["structure"], bolder["structure"]], 0.2), (
            "the glasses are nearer to those of the ground truth"
        )
        assert bolder["moved"] > 1.2 * faint["moved"]


@proves("Two things should change")
def test_a_target_of_two_things_changes_both(scenes):
    cats = scenes("cat2dog")
    (both,) = Pix2PixZeroEditDirection.execute(cats.bench.clip, "cat", "dog wearing glasses").result
    pictures, _ = cats.edited(direction=both, strength=1.5)
    answers = cats.judge.answers(pictures)
    assert answers["subject"].count("dog") >= SCENES - 1
    assert answers["glasses"].count(True) >= SCENES - 1


@proves("Too slow")
def test_fast_fewer_steps_and_no_guidance_cost_fewer_evaluations(scenes):
    bench = scenes("cat2dog", count=1).bench
    rows = []
    model = bench.model.clone()
    model.set_model_unet_function_wrapper(
        lambda call, args: rows.append(len(args["input"])) or call(args["input"], args["timestep"], **args["c"])
    )

    def cost(steps=STEPS, **settings):
        rows.clear()
        sample_edit(model, bench.inversion(steps), bench.moved, bench.described, replace(DEFAULTS, **settings))
        return sum(rows)

    of_all = cost()
    assert cost(preset="fast") < 0.85 * of_all
    assert cost(steps=2) == pytest.approx(of_all / 4, rel=0.1)
    assert cost(guidance_strength=0.3, feature_until=0.0) >= cost(feature_until=0.0)
