"""The thumbnails of the template browser, `example_workflows/NAME.jpg`: what the examples draw on a real server.

With them the picture of README, `assets/five_edits.jpg`.
"""

import io
import json
from collections.abc import Callable

from PIL import Image

from ..pictures.charts import as_image, as_pillow
from ..pictures.strips import picture_strip
from .environment import running
from .graphs import EDITS, Graph, Node, demo_graph
from .hosts import ROOT
from .process import DevError, one_thread
from .server import GraphError, Server

EXAMPLES = ROOT / "example_workflows"
GRAPHS = ROOT / "tests" / "workflows"
QUALITY = 88
WIDEST = 560
GAP = 8
FIVE_EDITS = ROOT / "assets" / "five_edits.jpg"
CAT, HORSE = 8, 12  # scenes of recipes that need one
SEEDS = {"cat2dog": 114, "horse2zebra": 12, "add_glasses": 12, "day2night": 8, "sketch2pastel": 12}

Pictures = Callable[[Graph], list[list]]
"""The outputs to lay side by side, of an example's graph."""


def _source_and_saved(graph: Graph) -> list[list]:
    return [_source(graph), graph.inputs(graph.only("SaveImage"))["images"]]


def _source(graph: Graph) -> list:
    return graph.inputs(graph.only("Pix2PixZeroPasteEdit"))["source"]


def _on_the_demo(graph: Graph) -> list[list]:
    """A photograph cannot be part of the pack, so the demo's model and a scene stand in."""
    model = graph.only("CheckpointLoaderSimple")
    graph.replace(model, "Pix2PixZeroDemoModel")
    graph.replace(graph.only("LoadImage"), "Pix2PixZeroDemoScene", seed=CAT)
    graph.change(graph.only("Pix2PixZeroCrop"), model_size=128, mask=None)
    graph.change(graph.only("Pix2PixZeroLoadCaptioner"), model_name="demo")
    graph.change(graph.only("Pix2PixZeroKSampler"), cfg=1.5)
    return _source_and_saved(graph)


def _with_features(graph: Graph) -> list[list]:
    source, edited = _source_and_saved(graph)
    return [source, graph.only("Pix2PixZeroFeaturePCA")[0], edited]


def _strip(graph: Graph) -> list[list]:
    return [graph.only("Pix2PixZeroStrip")[0]]


def _with_a_demo_student(graph: Graph) -> list[list]:
    """The student of day to night that ships, on a scene: nobody's own file and picture are there."""
    graph.replace(graph.only("UpscaleModelLoader"), "Pix2PixZeroDemoDistilled", edit="day2night")
    graph.replace(graph.only("LoadImage"), "Pix2PixZeroDemoScene", subject="horse", time_of_day="day", seed=HORSE)
    edited = graph.inputs(graph.only("SaveImage"))["images"]
    return [graph.inputs(Node(edited[0]))["image"], edited]


RECIPES: dict[str, Pictures] = {
    "cat_to_dog_demo": _source_and_saved,
    "compare_methods": _strip,
    "distill_an_edit": _strip,  # pairs and training included: about five minutes
    "edit_a_generated_image": _source_and_saved,
    "edit_a_small_subject": _source_and_saved,
    "edit_with_flow": _source_and_saved,
    "edit_your_picture": _on_the_demo,
    "flowedit": _source_and_saved,
    "plug_and_play": _with_features,
    "prompt_to_prompt": _source_and_saved,
    "sdedit_and_word_swap": _strip,
    "use_a_distilled_edit": _with_a_demo_student,
}

# The same graph for other checkpoints, or with sentences from elsewhere: on the demo's model the same picture.
TWINS = {"edit_your_picture": ("edit_your_picture_sd2", "edit_your_picture_sdxl", "edit_with_written_sentences")}


def draw_thumbnails(names: list[str]) -> None:
    """Run the examples, all or those named, and write their thumbnails; `five_edits` is the picture of README.

    Raises DevError: there is no such example, or its graph failed.
    """
    if not names or FIVE_EDITS.stem in names:
        draw_five_edits()
    names = [name for name in names or RECIPES if name != FIVE_EDITS.stem]
    if unknown := set(names) - set(RECIPES):
        raise DevError(f"There is no example {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}.")
    with Server(running(), options=["--disable-api-nodes"], variables=one_thread()) as server:
        info = server.object_info()
        for name in names:
            graph = Graph(json.loads((GRAPHS / f"{name}.json").read_text(encoding="utf-8")))
            shown: list[Node] = [graph.add("PreviewImage", images=output) for output in RECIPES[name](graph)]
            graph.keep(*shown)
            try:
                outputs = server.run(graph.api(info))
            except GraphError as error:
                raise DevError(f"{name}: {error}") from None
            files = [outputs[node.key]["images"][0] for node in shown]
            sheet = _in_a_row([Image.open(io.BytesIO(server.view(entry))).convert("RGB") for entry in files])
            for shown_for in (name, *TWINS.get(name, ())):
                path = EXAMPLES / f"{shown_for}.jpg"
                sheet.save(path, quality=QUALITY, optimize=True)
                print(f"{shown_for}: {sheet.width}x{sheet.height}, {path.stat().st_size / 1000:.0f} kB", flush=True)


def _in_a_row(pictures: list[Image.Image]) -> Image.Image:
    """Side by side at one height, without labels; a single picture as it is."""
    if len(pictures) == 1:
        (sheet,) = pictures
    else:
        side = (WIDEST - GAP * (len(pictures) - 1)) // len(pictures)
        sheet = Image.new("RGB", (WIDEST, side), "white")
        for number, picture in enumerate(pictures):
            square = picture.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(square, (number * (side + GAP), 0))
    sheet.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
    return sheet


def draw_five_edits() -> None:
    """The picture of README: a scene for each edit of `bench quality`, and under it the edit as it is pasted back."""
    rows: tuple[list[Image.Image], list[Image.Image]] = ([], [])
    with Server(running(), options=["--disable-api-nodes"], variables=one_thread()) as server:
        info = server.object_info()
        for name, seed in SEEDS.items():
            graph, shown, _ = demo_graph(EDITS[name], seed)
            graph.keep(Node(shown["source"]), Node(shown["edited"]))
            outputs = server.run(graph.api(info))
            for row, key in zip(rows, ("source", "edited")):
                entry = outputs[shown[key]]["images"][0]
                row.append(Image.open(io.BytesIO(server.view(entry))).convert("RGB"))
    images = [as_image(picture)[None] for row in rows for picture in row]
    labels = [""] * len(SEEDS) + [f"{EDITS[name].source} → {EDITS[name].target}" for name in SEEDS]
    sheet = as_pillow(picture_strip(images, ["\n".join(labels)], len(SEEDS))[0])
    sheet.thumbnail((760, 760), Image.Resampling.LANCZOS)
    sheet.save(FIVE_EDITS, quality=70, optimize=True)
    print(f"{FIVE_EDITS.name}: {sheet.width}x{sheet.height}, {FIVE_EDITS.stat().st_size / 1000:.0f} kB", flush=True)
