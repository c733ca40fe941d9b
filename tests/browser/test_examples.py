"""The example workflows as a person meets them: opened, saved, run and cancelled in ComfyUI's own frontend."""

import json
import re
from pathlib import Path

import pytest
from pix2pix_zero.host.distilled.pair_sets import FEWEST
from pix2pix_zero.host.messages import NOT_GUIDED

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "example_workflows"
API_COPIES = ROOT / "tests" / "workflows"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
TO_BRING = {
    "edit_with_written_sentences": ["CLIPLoader", "CheckpointLoaderSimple", "LoadImage"],
    **dict.fromkeys(
        ("edit_your_picture", "edit_your_picture_sd2", "edit_your_picture_sdxl"),
        ["CheckpointLoaderSimple", "LoadImage"],
    ),
    "use_a_distilled_edit": ["LoadImage", "LoadVideo", "UpscaleModelLoader"],
}
"""The nodes whose files a person has to bring."""
STEPS = 2
ONE_STEP_OF_MANY = "distill_an_edit"
"""Draws an edit of each of fifty pictures."""


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def nodes_of(api_form: dict) -> dict:
    """The nodes of an API form without what a newer frontend adds to `_meta`, as the pack that a node is of."""
    return {name: {**node, "_meta": {"title": node["_meta"]["title"]}} for name, node in api_form.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_example_opens_and_stays_the_same_when_saved_and_opened_again(name, frontend):
    frontend.open(read(EXAMPLES, name))
    frontend.screenshot(f"{name}_opened")
    complaints = frontend.complaints()
    if name in TO_BRING:
        complaints = sorted(complaint for complaint in complaints if complaint.startswith("red: "))
    assert complaints == [f"red: {kind}" for kind in TO_BRING.get(name, [])]
    assert nodes_of(frontend.api_form()) == nodes_of(read(API_COPIES, name))
    frontend.open(frontend.serialize())
    assert nodes_of(frontend.api_form()) == nodes_of(read(API_COPIES, name))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TO_BRING])
def test_the_example_runs_and_shows_previews_of_every_phase(name, frontend):
    frontend.open(read(EXAMPLES, name))
    steps = 1 if name == ONE_STEP_OF_MANY else STEPS
    assert frontend.set_widgets("steps", steps)
    if name == ONE_STEP_OF_MANY:
        assert frontend.set_widgets("value", FEWEST) == 1, "the number of pairs"
    frontend.set_widgets("seed", 20 + NAMES.index(name))  # nothing comes out of the server's cache
    seen = frontend.run()
    assert seen["ending"][0] == "execution_success", seen["ending"]
    phases = ("Inversion", "Reference", "KSampler")
    samplers = [node for phase in phases for node in frontend.nodes(f"Pix2PixZero{phase}")]
    samplers += frontend.nodes("SamplerCustomAdvanced") + frontend.nodes("KSampler")
    assert [node for node in samplers if not seen["previews"].get(node)] == []
    if frontend.nodes("Pix2PixZeroKSampler"):
        # the last line of text on the node, which may draw several pictures: "Sampling 2/2"; or what it warns of in its place
        last = rf"\bstep {steps}/{steps}|sampling {steps}/{steps}|^{re.escape(NOT_GUIDED)}"
        assert frontend.page.get_by_text(re.compile(last, re.I)).count()
    frontend.page.wait_for_timeout(500)  # the pictures are loaded
    assert len(frontend.pictures()) >= len(frontend.nodes("PreviewImage") + frontend.nodes("SaveImage"))
    assert frontend.complaints() == []
    frontend.screenshot(f"{name}_finished")


def test_a_run_that_is_cancelled_leaves_the_server_ready(frontend):
    frontend.open(read(EXAMPLES, "cat_to_dog_demo"))
    frontend.set_widgets("steps", 500)
    frontend.queue()
    (inversion,) = frontend.nodes("Pix2PixZeroInversion")
    frontend.wait_until(f"window.seen.previews['{inversion}'] > 2")
    frontend.command("Comfy.Interrupt")
    frontend.wait_until("window.seen.ending", 30)
    assert frontend.page.evaluate("() => window.seen.ending[0]") == "execution_interrupted"
    frontend.set_widgets("steps", STEPS + 1)
    frontend.set_widgets("seed", 6)
    assert frontend.run()["ending"][0] == "execution_success"
    assert frontend.complaints() == []
