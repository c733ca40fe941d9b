"""What a tooltip advises can be entered: its numbers are within the widget's bounds and on its steps, its choices are offered."""

import json
import math
import re

import pytest
from pix2pix_zero.devtools.hosts import ROOT
from pix2pix_zero.editing import sentences
from pix2pix_zero.host.distilled import names
from pix2pix_zero.host.networks import captioner, edit_figures
from pix2pix_zero.host.text import prompt_words
from pix2pix_zero.host.views import attention_heat
from pix2pix_zero.nodes import NODES, demo, strip
from pix2pix_zero.pictures import strips

NUMBER = r"(?<!\d)-?\d+(?:\.\d+)?"
# "0 switches it off", "down to 0", "start at 5", "0.3 is a good start", "0.01 is its authors' value"; not "50 steps at 512x512".
ADVICE = (
    rf"(?:(?:down |raise it,? )?to|start at|At|in steps of|take) ({NUMBER})(?![\d.]*[x%\w])",
    rf"(?:^|[.;:,(] )({NUMBER}),? (?:is|are|does|switches|keeps|takes|lets|edits|puts|to|from)\b",
    rf"(?:^|[.;:,(] )({NUMBER}):",
)
BEYOND = rf"\b([Aa]bove|[Bb]elow|past) ({NUMBER})\b"


def widgets(kind: str) -> dict:
    """By name of node and input, the inputs of a type."""
    return {
        f"{node.__name__}.{item.id}": item
        for node in NODES
        for item in node.GET_SCHEMA().inputs
        if item.get_io_type() in kind
    }


NUMBERS, CHOICES = widgets(("FLOAT", "INT")), widgets(("COMBO",))


def advised(tooltip: str) -> list[float]:
    return [float(found) for pattern in ADVICE for found in re.findall(pattern, tooltip)]


BOUNDS = {
    ("Sentences", "concept"): sentences.LONGEST_CONCEPT,
    ("EditDirection", "source"): sentences.LONGEST_CONCEPT,
    ("EditDirection", "target"): sentences.LONGEST_CONCEPT,
    ("EditDirectionFromSentences", "source_sentences"): sentences.MOST_SENTENCES,
    ("EditDirectionFromSentences", "target_sentences"): sentences.MOST_SENTENCES,
    ("AttentionHeatmap", "caption"): prompt_words.MOST_WORDS,
    ("AttentionHeatmap", "words"): attention_heat.MOST_PHRASES,
    ("PromptToPrompt", "source"): prompt_words.MOST_WORDS,
    ("PromptToPrompt", "target"): prompt_words.MOST_WORDS,
    ("Strengths", "values"): strips.MOST_NUMBERS,
    ("Strengths", "name"): strip.LONGEST_NAME,
    ("Strip", "images"): strips.MOST_PIXELS // 10**6,
    ("Strip", "labels"): strips.LONGEST_LABEL,
    ("DemoScene", "count"): demo.MOST_PIXELS // 2**20,
    ("Caption", "prefix"): captioner.LONGEST_PREFIX,
    ("Caption", "caption"): captioner.LONGEST_CAPTIONS,
    ("EditMetrics", "source_text"): edit_figures.LONGEST_TEXT,
    ("EditMetrics", "target_text"): edit_figures.LONGEST_TEXT,
    ("SavePair", "dataset"): names.LONGEST,
    ("Distill", "name"): names.LONGEST,
}


@pytest.mark.parametrize(("node", "socket"), BOUNDS)
def test_a_bound_that_no_widget_shows_stands_in_the_tooltip(node, socket):
    (found,) = [each for each in NODES if each.__name__ == f"Pix2PixZero{node}"]
    (item,) = [item for item in found.GET_SCHEMA().inputs if item.id == socket]
    assert re.search(rf"at most {BOUNDS[node, socket]}\b", item.tooltip, re.IGNORECASE)


def test_the_advice_in_tooltips_is_found():
    assert advised("Lower it, down to 0, or start at 5. 0.3 is good; 0 to 2, 50 steps at 512x512") == [0, 5, 2, 0.3, 0]
    assert sum(len(advised(item.tooltip)) for item in NUMBERS.values()) > 30


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_a_tooltip_advises_can_be_entered(name):
    item = NUMBERS[name]
    assert item.min <= item.default <= item.max
    for value in advised(item.tooltip):
        assert item.min <= value <= item.max, f"{value:g} is not between {item.min} and {item.max}"
        steps = (value - item.min) / (getattr(item, "step", None) or 1)
        assert math.isclose(steps, round(steps), abs_tol=1e-6), f"{value:g} is between two steps of the widget"
    for word, number in re.findall(BEYOND, item.tooltip):
        beyond = item.min < float(number) if word.lower() == "below" else float(number) < item.max
        assert beyond or float(number) == item.max, f"{word} {number} cannot be entered"


@pytest.mark.parametrize("name", CHOICES)
def test_choices_that_a_tooltip_explains_are_offered(name):
    item = CHOICES[name]
    explained = re.findall(r"(?:^|[.;] )([a-z][\w -]*): ", item.tooltip)
    assert set(explained) <= set(item.options), explained


@pytest.mark.parametrize("language", ["ko", "zh", "ja"])
def test_translated_tooltips_hold_the_same_numbers(language):
    """Those in digits; a translation may write out others."""
    translated, english = (
        json.loads((ROOT / "locales" / code / "nodeDefs.json").read_text(encoding="utf-8")) for code in (language, "en")
    )
    wrong = {}
    for node, texts in translated.items():
        for socket, of_input in texts.get("inputs", {}).items():
            if "tooltip" in of_input:
                here, there = of_input["tooltip"], english[node]["inputs"][socket]["tooltip"]
                missing = {*re.findall(NUMBER, there)} - {*re.findall(NUMBER, here)}
                if missing:
                    wrong[f"{node}.{socket}"] = missing
    assert wrong == {}
