"""What `python dev.py bench families` counts on the meta device, held to what the pack expects. Times are never tested."""

import json
import sys

import pytest
from pix2pix_zero.benchmarks.families import main

LOW_MEMORY_CARD = 12 * 10**9


@pytest.fixture(scope="module")
def vega(tmp_path_factory, quick_environment):
    output = tmp_path_factory.mktemp("families") / "bench_families.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(quick_environment.python))
        main(["--only-memory", "--families", "vega", "--threads", "1", "--output", str(output)])
    return json.loads(output.read_text(encoding="utf-8"))["vega"]["memory"]


def test_a_guided_pass_in_16_bit_takes_what_is_asked_for_or_a_little_less(vega):
    for mode, peak in vega["peak"].items():
        assert 1.0 <= vega["estimate"][mode] / peak <= 1.25, mode
    assert vega["maps"] == vega["maps_estimate"]


def test_each_mode_of_checkpointing_takes_much_less_than_the_one_before(vega):
    none, feed_forward, blocks = vega["peak"].values()
    assert none > 1.6 * feed_forward > 1.6 * 1.6 * blocks
    assert blocks < 2.5 * vega["plain"]


def test_the_parts_make_up_the_peak(vega):
    kept = sum(vega["parts"].values())
    assert set(vega["parts"]) >= {"self-attention", "cross-attention, norms", "feed-forward", "residual blocks"}
    assert 0.9 <= kept / vega["peak"]["none"] <= 1.0


def test_the_low_memory_path_fits_a_small_card_beside_the_weights(vega):
    assert vega["weights"] + vega["peak"]["blocks"] + vega["maps"] < LOW_MEMORY_CARD
