"""The API form of a workflow file, derived from the file and the server's node schemas.

The frontend's `graphToPrompt` makes the same thing in the browser; this is an independent reading of the file format.

After an example was changed in the browser, `python tests/helpers/workflow_forms.py URL` writes the API copies in
tests/workflows anew. URL is that of a running server with the pack, such as `python dev.py serve` prints.
"""

import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

NOTES = {"MarkdownNote", "Note"}
CHOICE_OF_INPUTS = "COMFY_DYNAMICCOMBO_V3"  # a choice that has further inputs, by which one is chosen
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def api_form(workflow: dict, object_info: dict) -> dict:
    """`{node id: {class_type, inputs, _meta}}` of a UI graph without subgraphs, muted or bypassed nodes.

    Raises ValueError: the file does not fit the schemas: an unknown node, or not one value per widget.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    api = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        if node["type"] not in object_info:
            raise ValueError(f"node {node['id']}: the server has no {node['type']}")
        schema = object_info[node["type"]]
        inputs = _widget_values(node, schema)
        for socket in node["inputs"]:
            if socket["link"] is not None:
                inputs[socket["name"]] = links[socket["link"]]
        title = node.get("title") or schema["display_name"] or node["type"]
        api[str(node["id"])] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    return api


def schema_inputs(schema: dict) -> dict[str, tuple[str, dict]]:
    """`{input name: (type, settings)}` in the order of the schema; an old-style list of choices is a COMBO."""
    found = {}
    for group in ("required", "optional"):
        for name in schema["input_order"].get(group, []):
            kind, *settings = schema["input"][group][name]
            found[name] = ("COMBO" if isinstance(kind, list) else kind, settings[0] if settings else {})
    return found


def _widget_values(node: dict, schema: dict) -> dict[str, object]:
    values = iter(node.get("widgets_values") or [])
    inputs = {}
    try:
        for name, (kind, settings) in schema_inputs(schema).items():
            if kind == CHOICE_OF_INPUTS:
                inputs.update(_chosen(name, settings, values))
                continue
            if kind not in WIDGET_TYPES or settings.get("forceInput"):
                continue
            inputs[name] = next(values)
            if settings.get("control_after_generate"):
                next(values)  # fixed, increment, ...: for the frontend alone
            if settings.get("image_upload") or settings.get("video_upload"):
                next(values)  # the upload button
    except StopIteration:
        raise ValueError(f"node {node['id']} ({node['type']}): too few values") from None
    if left := list(values):
        raise ValueError(f"node {node['id']} ({node['type']}): values without a widget: {left}")
    return inputs


def _chosen(name: str, settings: dict, values: Iterator) -> dict[str, object]:
    choice = next(values)
    (option,) = (option for option in settings["options"] if option["key"] == choice)
    further = [each for group in ("required", "optional") for each in option["inputs"].get(group, {})]
    return {name: choice, **{f"{name}.{each}": next(values) for each in further}}


def main(url: str) -> None:
    """Write the API copy of every example."""
    with urllib.request.urlopen(f"{url.rstrip('/')}/object_info") as answer:  # noqa: S310 (one's own server)
        object_info = json.load(answer)
    root = Path(__file__).resolve().parents[2]
    for path in sorted((root / "example_workflows").glob("*.json")):
        api = api_form(json.loads(path.read_text(encoding="utf-8")), object_info)
        text = json.dumps(api, indent=2, ensure_ascii=False) + "\n"
        (root / "tests" / "workflows" / path.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
