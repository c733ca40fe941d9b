"""What `python dev.py bench cost --quick` counts, held to what the algorithm needs. Times are never part of a test."""

import json
import sys

import pytest
from pix2pix_zero.benchmarks.cost import main
from pix2pix_zero.benchmarks.cost_parts import child
from pix2pix_zero.benchmarks.cost_parts.jobs import Job
from pix2pix_zero.host.sampling.edit import PRESETS

PEERS = {"diffusers", "authors"}
UNGUIDED = 3  # one picture inverted, then both branches
# A forward pass is 1 FE. A backward pass to the input alone has one product for each product with weights, and two for
# each of attention, which is first repeated; the feed-forward layers are computed once more.
GUIDANCE = 1.25


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    output = tmp_path_factory.mktemp("cost") / "bench_cost.json"
    ours = PRESETS.keys() - {"official"}
    main(["--quick", "--rounds", "0", "--output", str(output), "--variants", *PEERS, *ours, "unguided"])
    return json.loads(output.read_text(encoding="utf-8"))["results"]["fp32"]


def step(variants, name):
    assert variants[name]["failures"] == {}
    assert variants[name]["finite"]
    return variants[name]["per_step"]


@pytest.mark.parametrize("name", sorted(PEERS))
def test_peers_take_the_passes_of_their_loops(variants, name):
    """One picture inverted, then a reference, a guided and a final pass, each of two branches."""
    per_step = step(variants, name)
    assert (per_step["forward_rows"], per_step["forward_calls"]) == (7, 4)
    assert (per_step["backward_rows"], per_step["backward_calls"]) == (2, 1)
    assert per_step["fe_once"] == pytest.approx(0, abs=0.01)


def test_gradients_of_all_weights_cost_diffusers_more_than_the_authors(variants):
    # Backward, 2 rows: to the inputs and to nearly every weight, or to the inputs and those of cross-attention.
    assert step(variants, "diffusers")["fe"] == pytest.approx(7 + 2 * 2, abs=0.5)
    assert step(variants, "authors")["fe"] == pytest.approx(7 + 2 * 1.1, abs=0.3)


def test_unguided_edits_are_three_forward_passes_per_step(variants):
    per_step = step(variants, "unguided")
    assert per_step["fe"] == pytest.approx(3, abs=0.01)
    assert (per_step["forward_rows"], per_step["backward_rows"]) == (3, 0)


def test_default_adds_one_backward_pass_to_the_unguided_edit(variants):
    per_step = step(variants, "default")
    assert (per_step["forward_rows"], per_step["backward_rows"]) == (3, 1)
    assert per_step["fe"] <= UNGUIDED + GUIDANCE
    assert per_step["fe_once"] <= 1.01, "the estimate at the noise end, once"


def test_fast_guides_some_steps_and_leaves_the_negative_out_of_others(variants):
    per_step = step(variants, "fast")
    guided, held = variants["fast"]["count"]["guided_share"], variants["fast"]["count"]["held_share"]
    assert guided <= 1 / 3
    assert (per_step["forward_rows"], per_step["backward_rows"]) == pytest.approx((3 - held, guided))
    assert per_step["fe"] <= UNGUIDED - held + guided * GUIDANCE
    assert per_step["fe_once"] <= 1.01


def test_low_memory_draws_the_maps_again_and_repeats_the_blocks(variants):
    per_step = step(variants, "low memory")
    assert (per_step["forward_rows"], per_step["backward_rows"]) == (4, 1)
    assert per_step["fe"] <= UNGUIDED + 1 + 1 + GUIDANCE
    assert per_step["fe_once"] <= 1.01


@pytest.mark.parametrize("preset", ["default", "fast", "low memory"])
def test_guidance_gradients_are_those_of_float64(variants, preset):
    assert 0 < variants[preset]["gradient_error"] <= 5e-5


@pytest.fixture
def job():
    return Job("count", "default", "fp32", 64, (1, 2), True, "gradient.safetensors")


def test_a_job_runs_in_a_process_with_the_same_modules(job):
    repeat = (
        "import json, os, sys; json.dump([json.loads(sys.argv[1]), sys.path, dict(os.environ)], open(sys.argv[2], 'w'))"
    )
    asked, path, environment = child.run_in_child(job, threads=3, entry=repeat)
    assert Job(**{**asked, "steps": tuple(asked["steps"])}) == job
    assert {entry for entry in sys.path if entry} <= set(path)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert "MALLOC_TRIM_THRESHOLD_" in environment


def test_a_job_that_fails_says_why(job):
    with pytest.raises(child.JobError, match="too much"):
        child.run_in_child(job, threads=1, entry="raise MemoryError('that was too much')")
