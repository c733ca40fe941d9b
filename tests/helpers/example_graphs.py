"""The example workflows as files and as graphs that a server without any further file can run."""

import copy
import json

from comfyui_version import __version__
from pix2pix_zero.devtools.hosts import DEFAULT_VERSION, ROOT
from pix2pix_zero.host.distilled.pair_sets import FEWEST

EXAMPLES = ROOT / "example_workflows"
API_COPIES = ROOT / "tests" / "workflows"
NAMES = [
    "cat_to_dog_demo",
    "compare_methods",
    "distill_an_edit",
    "edit_a_generated_image",
    "edit_a_small_subject",
    "edit_with_flow",
    "edit_your_picture",
    "edit_your_picture_sd2",
    "edit_your_picture_sdxl",
    "flowedit",
    "plug_and_play",
    "prompt_to_prompt",
    "sdedit_and_word_swap",
    "use_a_distilled_edit",
]
ALONG_A_DIRECTION = ["cat_to_dog_demo", "edit_a_generated_image", "edit_with_flow", "edit_your_picture", "flowedit"]
# With the newer inputs of ComfyUI's text generation node.
LANGUAGE_MODEL = "edit_with_written_sentences"
if __version__ == DEFAULT_VERSION:
    NAMES.append(LANGUAGE_MODEL)
YOUR_PICTURE = ["edit_your_picture", "edit_your_picture_sd2", "edit_your_picture_sdxl"]


def read(name: str) -> dict:
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


def read_api(name: str) -> dict:
    return json.loads((API_COPIES / f"{name}.json").read_text(encoding="utf-8"))


def ids_of(api: dict, class_type: str) -> list[str]:
    return [key for key, node in api.items() if node["class_type"] == class_type]


def only(api: dict, class_type: str) -> dict:
    (key,) = ids_of(api, class_type)
    return api[key]


def titled(api: dict, title: str) -> str:
    (key,) = (key for key, node in api.items() if node.get("_meta", {}).get("title") == title)
    return key


def quick(api: dict, steps: int = 4) -> dict:
    """The graph with few steps."""
    api = copy.deepcopy(api)
    for node in api.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = steps
    return api


def with_strength(api: dict, strength: float) -> dict:
    api = copy.deepcopy(api)
    for key in ids_of(api, "Pix2PixZeroApplyDirection"):
        api[key]["inputs"]["strength"] = strength
    return api


def on_the_demo_model(api: dict) -> dict:
    """`edit_your_picture` with the demo's model, captioner and scene in the place of files that one has to bring."""
    api = copy.deepcopy(api)
    only(api, "CheckpointLoaderSimple").update(class_type="Pix2PixZeroDemoModel", inputs={})
    scene = only(read_api("cat_to_dog_demo"), "Pix2PixZeroDemoScene")
    only(api, "LoadImage").update(class_type="Pix2PixZeroDemoScene", inputs=scene["inputs"])
    only(api, "Pix2PixZeroCrop")["inputs"].update(model_size=128)
    only(api, "Pix2PixZeroLoadCaptioner")["inputs"]["model_name"] = "demo"
    return api


def with_sentences_of_the_bank(api: dict) -> dict:
    """The example of the language model on the demo, with the pack's own sentences in the place of those it would write."""
    api = on_the_demo_model(api)
    del api[ids_of(api, "CLIPLoader")[0]]
    for key, concept in zip(ids_of(api, "TextGenerate"), ("cat", "dog")):
        api[key].update(class_type="Pix2PixZeroSentences", inputs={"concept": concept, "count": 16, "seed": 0})
    return api


def with_a_shipped_student(api: dict) -> dict:
    """`use_a_distilled_edit` with a student, a scene and three frames of the demo in the place of files that one has to bring."""
    api = copy.deepcopy(api)
    scene = only(read_api("cat_to_dog_demo"), "Pix2PixZeroDemoScene")["inputs"]
    api["1000"] = {"class_type": "PrimitiveInt", "inputs": {"value": 3}}
    api["1001"] = {"class_type": "Pix2PixZeroDemoScene", "inputs": {**scene, "count": ["1000", 0]}}
    only(api, "UpscaleModelLoader").update(class_type="Pix2PixZeroDemoDistilled", inputs={"edit": "day2night"})
    only(api, "LoadImage").update(class_type="Pix2PixZeroDemoScene", inputs=scene)
    only(api, "LoadVideo").update(class_type="CreateVideo", inputs={"images": ["1001", 0], "fps": 8.0})
    return api


def with_few_pairs(api: dict) -> dict:
    """`distill_an_edit` on as few pairs as a student may learn from."""
    api = copy.deepcopy(api)
    only(api, "PrimitiveInt")["inputs"].update(value=FEWEST)
    return api


def without_strip(api: dict) -> dict:
    """The graph without the output of a strip over strengths, so that its edits are not drawn."""
    shown = [key for key, node in api.items() if node["_meta"]["title"] == "One edit for each strength"]
    return {key: node for key, node in api.items() if key not in shown}


def showing_the_source(api: dict) -> dict:
    """The graph with the unedited picture in node 1000."""
    source = api[api[titled(api, "Before and after")]["inputs"]["images"][0]]["inputs"]["source"]
    return {**api, "1000": {"class_type": "PreviewImage", "inputs": {"images": source}}}


GRAPHS = {name: read_api for name in NAMES} | {
    **{name: lambda name: on_the_demo_model(read_api(name)) for name in YOUR_PICTURE},
    LANGUAGE_MODEL: lambda name: with_sentences_of_the_bank(read_api(name)),
    "distill_an_edit": lambda name: with_few_pairs(read_api(name)),
    "use_a_distilled_edit": lambda name: with_a_shipped_student(read_api(name)),
}
