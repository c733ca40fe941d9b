"""Random graphs for `dev.py soak`: edits with random knobs, and the same with one input that is wrong."""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .demo_graph import Demo
from .graphs import EDITS, EXAMPLE, Graph

PACK = "Pix2PixZero"
EXAMPLES = (
    "cat_to_dog_demo",
    "compare_methods",
    "edit_a_generated_image",
    "edit_a_small_subject",
    "flowedit",
    "plug_and_play",
    "prompt_to_prompt",
    "sdedit_and_word_swap",
)
SHOWN = ("SaveImage", "PreviewImage", "PreviewAny", "SaveAnimatedWEBP")
CHANGED = 0.15
"""Share of the inputs of a graph that get a random value."""
# What takes long, or asks for files and models that are not there, stays within these.
LIMITS = {
    "steps": (2, 6),
    "side": (64, 192),
    "samples": (1, 3),
    "regularization_steps": (0, 3),
    "autocorrelation_rolls": (1, 4),
    "width": (64, 192),
    "height": (64, 192),
    "model_size": (64, 160),
    "max_new_tokens": (1, 40),
    "map_memory": (0, 2),
    "fixed_point_iterations": (0, 2),
    "cfg": (0, 12),
}
COUNTS = ("count", "batch_size")
LEFT_ALONE = ("allow_download", "model_name", "clip_model", "dino_model", "lpips_model", "direction_name")
TEXTS = (
    "",
    "a cat",
    "two dogs, at night",
    "猫と犬",
    "👩‍👩‍👧 a photo",
    "cat " * 200,
    "a (cat:1.3) on [grass]",
    "\n\n ,;\n",
)
NOT_NUMBERS = (math.nan, math.inf, -math.inf)
ODD = {
    "FLOAT": (*NOT_NUMBERS, 1e30, -1e30, "a", None, [], {}),
    "INT": (*NOT_NUMBERS, 2**70, -(2**70), "a", None, [], {}),
    "STRING": ("\ud83d", "x" * 2_500_000, None, [], "a\x00b", *TEXTS),
    "BOOLEAN": ("perhaps", None, []),
    "COMBO": ("none of these", 3, None, []),
}


@dataclass(frozen=True)
class Case:
    """A graph in API form; what was done to it; whether a result would be wrong."""

    graph: dict
    what: str
    must_be_refused: bool = False


def reference(nonce: str, schemas: dict) -> tuple[dict, str]:
    """A graph whose picture is always the same, and the key of the node that shows it. `nonce` keeps ComfyUI's cache out."""
    demo = Demo("cat2dog", seed=7)
    text = demo.add("StringReplace", string="a photo of a cat on grass", find=nonce, replace="")
    demo.change(demo.source, text=text[0])
    demo.change(demo.inversion, steps=4)
    shown = demo.add("PreviewImage", images=demo.edited())
    demo.keep(shown)
    return demo.api(schemas), shown.key


def large_edit(side: int, schemas: dict) -> dict:
    """A guided edit of pictures of this side, in a graph."""
    demo = Demo()
    demo.change(demo.scene, side=side, count=2)
    demo.change(demo.source, text="a photo of a cat on grass")
    demo.change(demo.inversion, steps=2)
    shown = demo.add("PreviewImage", images=demo.edited(local_blend=0.2, guidance_strength=0.1))
    demo.keep(shown)
    return demo.api(schemas)


def random_edit(draw: random.Random, schemas: dict, most: int = 2) -> Case:
    """One of the examples, or of `BUILT`, with random knobs, cut down to one of its results, or to at most so many."""
    name = draw.choice((*EXAMPLES, *BUILT))
    graph = BUILT[name](draw) if name in BUILT else _example(name)
    _keep_some(graph, draw, most)
    api = graph.api(schemas)
    pictures = draw.choice((1, 1, 2, 3))
    for node, socket, kind, settings in _widgets(api, schemas):
        own = node["class_type"].startswith(PACK)
        if socket in COUNTS:
            node["inputs"][socket] = pictures  # the host's own nodes want batches that are alike
        elif socket in LIMITS or own and draw.random() < CHANGED:
            node["inputs"][socket] = _random_value(draw, socket, kind, settings, node["inputs"].get(socket))
    return Case(api, name)


def bad_input(draw: random.Random, schemas: dict) -> Case:
    """A random edit in which one input of a node of the pack is odd."""
    edit = random_edit(draw, schemas, most=1)  # the host runs those of several results that the input is not for
    node, socket, kind, settings = draw.choice(list(_widgets(edit.graph, schemas, PACK)))
    value = draw.choice(ODD[kind])
    node["inputs"][socket] = value
    no_number = isinstance(value, float) and not math.isfinite(value)
    return Case(edit.graph, f"{node['class_type']}.{socket} = {value!r:.40}", no_number and kind in ("FLOAT", "INT"))


def damaged_file(draw: random.Random, schemas: dict, folder: Path) -> tuple[Case, Path]:
    """A graph that loads a direction file of random bytes or with a broken header, and that file."""
    path = folder / f"soak_{draw.randrange(10**9)}.safetensors"
    header = draw.choice(
        (b'{"cond":', b"[]", b'{"cond": {"dtype": "F8_E4M3", "shape": [], "data_offsets": [0, 1]}}', b"")
    )
    size = draw.choice((len(header), 2**40, 0)).to_bytes(8, "little")
    path.write_bytes(draw.choice((size + header + draw.randbytes(9), draw.randbytes(draw.randrange(200)))))
    demo = Demo()
    loaded = demo.add(f"{PACK}LoadDirection", direction_name=path.name)
    moved = demo.apply(loaded[0])
    shown = demo.add("PreviewImage", images=demo.edited(moved))
    demo.keep(shown)
    return Case(demo.api(schemas), f"direction file of {path.stat().st_size} bytes", True), path


def long_run(draw: random.Random, schemas: dict) -> dict:
    """A graph that takes minutes, to be cancelled."""
    demo = Demo(draw.choice(list(EDITS)), draw.randrange(1000))
    demo.change(demo.inversion, steps=draw.choice((200, 600, 1000)))
    demo.add("PreviewImage", images=demo.edited())
    return demo.api(schemas)


def _example(name: str) -> Graph:
    return Graph(json.loads(EXAMPLE.with_name(f"{name}.json").read_text(encoding="utf-8")))


def _keep_some(graph: Graph, draw: random.Random, most: int) -> None:
    """Some of the nodes that show something, and what they need."""
    shown = graph.all(*SHOWN, f"{PACK}Save")
    graph.keep(*draw.sample(shown, draw.randint(1, min(most, len(shown)))))


def _widgets(api: dict, schemas: dict, prefix: str = "") -> Iterator[tuple[dict, str, str, dict]]:
    """(node, socket, kind, settings) of all inputs that hold a value and no link."""
    for node in api.values():
        inputs = schemas[node["class_type"]]["input"]
        for socket, (kind, *options) in (inputs.get("required", {}) | inputs.get("optional", {})).items():
            settings = options[0] if options else {}
            if isinstance(kind, list):
                kind, settings = "COMBO", {**settings, "options": kind}
            linked = isinstance(node["inputs"].get(socket), list)
            if kind in ODD and not linked and socket not in LEFT_ALONE and node["class_type"].startswith(prefix):
                yield node, socket, kind, settings


def _random_value(draw: random.Random, socket: str, kind: str, settings: dict, now: object) -> object:
    low, high = settings.get("min", 0), settings.get("max", 1)
    if socket in LIMITS:
        low, high = max(low, LIMITS[socket][0]), min(high, LIMITS[socket][1])
    if kind == "INT":
        return draw.randint(low, high)
    if kind == "FLOAT":
        return draw.choice((low, high, draw.uniform(low, high), now))
    if kind == "BOOLEAN":
        return draw.random() < 0.5
    if kind == "COMBO":
        return draw.choice(settings.get("options") or [now])
    return draw.choice((*TEXTS, now, now))


def _heatmap(draw: random.Random) -> Graph:
    demo = _demo(draw)
    shown = demo.add(
        f"{PACK}AttentionHeatmap",
        model=demo.model[0],
        inversion=demo.inversion[0],
        clip=demo.model[1],
        caption=demo.caption[0],
        words="cat",
    )
    demo.add("PreviewImage", images=shown[0])
    return demo


def _noise_report(draw: random.Random) -> Graph:
    demo = _demo(draw)
    demo.add("PreviewImage", images=demo.add(f"{PACK}NoiseReport", noise=demo.inversion[1])[0])
    return demo


def _combined(draw: random.Random) -> Graph:
    """Two directions, one from sentences, put together, saved, and used."""
    demo = _demo(draw)
    sentences = [demo.add(f"{PACK}Sentences", concept=concept, count=8)[0] for concept in ("cat", "dog")]
    second = demo.add(
        f"{PACK}EditDirectionFromSentences",
        clip=demo.model[1],
        source_sentences=sentences[0],
        target_sentences=sentences[1],
    )
    both = demo.add(f"{PACK}CombineDirections", direction_a=demo.direction()[0], direction_b=second[0])
    demo.add(f"{PACK}SaveDirection", direction=both[0], filename_prefix="soak/direction")
    demo.add("PreviewImage", images=demo.edited(demo.apply(both[0])))
    return demo


def _batch(draw: random.Random) -> Graph:
    """Two pictures as one batch, then measured."""
    demo = _demo(draw)
    other = demo.copy(demo.scene, seed=draw.randrange(10**6))
    both = demo.batch(demo.scene[0], other[0])
    demo.change(demo.latent, pixels=both)
    edited = demo.edited()
    report = demo.add(f"{PACK}EditMetrics", source=both, edited=edited)
    demo.add("PreviewAny", source=report[0])
    demo.add("PreviewImage", images=edited)
    return demo


def _features(draw: random.Random) -> Graph:
    demo = _demo(draw)
    demo.add("PreviewImage", images=demo.add(f"{PACK}FeaturePCA", model=demo.model[0], inversion=demo.inversion[0])[0])
    return demo


def _demo(draw: random.Random) -> Demo:
    return Demo(draw.choice(list(EDITS)), draw.randrange(10**6))


BUILT: dict[str, Callable[[random.Random], Graph]] = {
    "heatmap": _heatmap,
    "noise report": _noise_report,
    "two directions": _combined,
    "batch": _batch,
    "features": _features,
}
