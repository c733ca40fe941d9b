"""What a node says of itself: whole, in the frontend's language, on the node while it runs and when it has finished."""

import json
from pathlib import Path

import pytest
from browser_page import speak
from hand_wired import wire_by_hand

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "example_workflows" / "cat_to_dog_demo.json"
SAID = """kind => app.graph.nodes.filter(node => node.type === kind).flatMap(node => node.widgets ?? [])
  .filter(widget => widget.name === '$$pix2pix-zero-text').map(widget => {
    const shown = widget.element;
    return {text: shown.textContent, whole: shown.scrollHeight <= shown.clientHeight + 1, seen: shown.isConnected};
  })"""


def said(frontend, kind: str) -> list[str]:
    """What the nodes of a type say, each of them seen, and whole."""
    frontend.page.wait_for_timeout(500)  # it is drawn
    found = frontend.page.evaluate(SAID, kind)
    assert all(each["whole"] and each["seen"] for each in found), found
    return [each["text"] for each in found]


def messages(language: str) -> dict[str, str]:
    return json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["pix2pixZero"]


@pytest.mark.parametrize("language", ["en", "ko", "zh", "ja"])
def test_the_text_stays_on_a_finished_node_in_the_language_of_the_frontend(language, opened_frontend):
    frontend = opened_frontend
    speak(frontend, language)
    frontend.failures.clear()
    frontend.open(json.loads(EXAMPLE.read_text(encoding="utf-8")))
    frontend.set_widgets("steps", 2)
    frontend.set_widgets("seed", 50 + len(language) + ord(language[0]))
    assert frontend.run()["ending"][0] == "execution_success"
    frontend.screenshot(f"said_{language}")
    texts = messages(language)
    assert said(frontend, "Pix2PixZeroInversion") == [texts["exact"]]
    sampling = texts["sampling"].format(step=2, steps=2)
    several = texts["of_several"].format(number=3, count=3, text=sampling)
    assert [text.casefold() for text in said(frontend, "Pix2PixZeroKSampler")] == [
        sampling.casefold(),
        several.casefold(),
    ]
    before = frontend.api_form()
    frontend.open(frontend.serialize())
    assert frontend.api_form() == before, "the text is no value of the node's"
    assert frontend.complaints() == []


@pytest.mark.parametrize(
    ("swapped", "other", "message"),
    [
        (True, "a photo of a cat", "swapped"),
        (False, "a blurry picture", "other_negative"),
        (False, "a photo of a cat", None),
    ],
)
def test_texts_in_the_wrong_places_are_said_on_the_sampler(swapped, other, message, frontend):
    wire_by_hand(frontend, swapped, other)
    assert frontend.run()["ending"][0] == "execution_success"
    (text,) = said(frontend, "Pix2PixZeroKSampler")
    warnings = [line for line in text.split("\n") if line in messages("en").values()]
    assert warnings == ([] if message is None else [messages("en")[message]])


def test_a_picture_many_times_the_models_size_is_said_before_the_long_work(frontend):
    wire_by_hand(frontend, side=384)
    frontend.set_widgets("steps", 1000)
    frontend.queue()
    (inversion,) = frontend.nodes("Pix2PixZeroInversion")
    frontend.wait_until(f"window.seen.previews['{inversion}'] > 0")
    (text,) = said(frontend, "Pix2PixZeroInversion")
    frontend.command("Comfy.Interrupt")
    frontend.wait_until("window.seen.ending", 30)
    assert messages("en")["large"].format(width=384, height=384, times=9, side=128) in text.split("\n")


def test_a_saved_direction_is_offered_at_once(frontend):
    page = frontend.page
    page.evaluate(
        """() => {
          const add = kind => { const node = LiteGraph.createNode(kind); app.graph.add(node); return node; };
          const model = add('Pix2PixZeroDemoModel'), made = add('Pix2PixZeroEditDirectionFromSentences');
          made.widgets[0].value = 'a cat'; made.widgets[1].value = 'a dog';
          const save = add('Pix2PixZeroSaveDirection'); add('Pix2PixZeroLoadDirection');
          model.connect(1, made, 0); made.connect(0, save, 0);
        }"""
    )
    assert frontend.run()["ending"][0] == "execution_success"
    (text,) = said(frontend, "Pix2PixZeroSaveDirection")
    file = text.removeprefix("Saved ")
    offered = """file => app.graph.nodes.filter(node => node.type === 'Pix2PixZeroLoadDirection')
      .every(node => node.widgets.find(one => one.name === 'direction_name').options.values.includes(file))"""
    page.wait_for_function(offered, arg=file, timeout=10_000)
    assert page.evaluate(
        "() => app.graph.nodes.every(node => node.type !== 'Pix2PixZeroLoadDirection' || node.widgets[0].value)"
    ), "one that had nothing to choose takes the first"
    page.evaluate("() => { app.graph.add(LiteGraph.createNode('Pix2PixZeroLoadDirection')); }")
    assert page.evaluate(offered, file), "a new node offers it too"
    assert frontend.complaints() == []
