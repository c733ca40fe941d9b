"""ComfyUI graphs in API form, built in Python."""

from __future__ import annotations

from dataclasses import dataclass, field


class Node:
    """A node of a :class:`Graph`; ``node[i]`` is a link to its output ``i``."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __getitem__(self, output: int) -> list:
        return [self.key, output]


class Graph:
    """Collects nodes; :meth:`api` is what the server's ``/prompt`` takes."""

    def __init__(self) -> None:
        self._nodes: dict[str, dict] = {}

    def add(self, class_type: str, **inputs: object) -> Node:
        """Add a node; inputs are values or links."""
        key = str(len(self._nodes) + 1)
        self._nodes[key] = {"class_type": class_type, "inputs": inputs}
        return Node(key)

    def api(self, object_info: dict) -> dict:
        """The API form, with the nodes' own defaults wherever no value was given.

        Raises:
            KeyError: A node is not known to the server.
        """
        return {
            key: {**node, "inputs": {**_defaults(object_info[node["class_type"]]), **node["inputs"]}}
            for key, node in self._nodes.items()
        }


def _defaults(schema: dict) -> dict[str, object]:
    defaults = {}
    for name, (kind, *options) in schema["input"].get("required", {}).items():
        settings = options[0] if options else {}
        choices = kind if isinstance(kind, list) else settings.get("options") if kind == "COMBO" else None
        if "default" in settings:
            defaults[name] = settings["default"]
        elif choices:
            defaults[name] = choices[0]
    return defaults


@dataclass(frozen=True)
class Edit:
    """An edit of a demo scene: what changes in the scene, and the two concepts that say so."""

    source: str
    target: str
    scene: dict[str, object] = field(default_factory=dict)
    edited_scene: dict[str, object] = field(default_factory=dict)


EDITS = {
    "cat2dog": Edit("cat", "dog", {"subject": "cat"}, {"subject": "dog"}),
    "dog2cat": Edit("dog", "cat", {"subject": "dog"}, {"subject": "cat"}),
    "horse2zebra": Edit("horse", "zebra", {"subject": "horse"}, {"subject": "zebra"}),
    "zebra2horse": Edit("zebra", "horse", {"subject": "zebra"}, {"subject": "horse"}),
    "add_glasses": Edit("cat", "cat wearing glasses", {"subject": "cat"}, {"glasses": "yes"}),
    "day2night": Edit("day", "night", {"time_of_day": "day"}, {"time_of_day": "night"}),
    "summer2winter": Edit("summer", "winter", {"season": "summer"}, {"season": "winter"}),
    "photo2sketch": Edit("photo", "pencil sketch", {"style": "flat"}, {"style": "pencil sketch"}),
    "sketch2pastel": Edit("pencil sketch", "oil pastel", {"style": "pencil sketch"}, {"style": "oil pastel"}),
}

# label in the comparison and key of the result, in reading order
PICTURES = {
    "source": "source",
    "reconstruction": "reconstruction",
    "unguided": "edit without guidance",
    "edited": "edit with guidance",
    "truth": "ground truth",
}


def demo_graph(edit: Edit, seed: int) -> tuple[Graph, dict[str, str], str]:
    """The whole method on a demo scene.

    Returns:
        The graph; for each key of :data:`PICTURES` the node that shows it; the node that shows the caption.
    """
    graph = Graph()
    model = graph.add("Pix2PixZeroDemoModel")
    scene = graph.add("Pix2PixZeroDemoScene", seed=seed, **edit.scene)
    truth = graph.add("Pix2PixZeroDemoScene", seed=seed, **{**edit.scene, **edit.edited_scene})
    captioner = graph.add("Pix2PixZeroLoadCaptioner")
    caption = graph.add("Pix2PixZeroCaption", captioner=captioner[0], image=scene[0])
    described = graph.add("CLIPTextEncode", clip=model[1], text=caption[0])
    latent = graph.add("VAEEncode", pixels=scene[0], vae=model[2])
    inversion = graph.add("Pix2PixZeroInversion", model=model[0], positive=described[0], latent_image=latent[0])
    direction = graph.add("Pix2PixZeroEditDirection", clip=model[1], source=edit.source, target=edit.target)
    moved = graph.add("Pix2PixZeroApplyDirection", conditioning=described[0], direction=direction[0])

    def redrawn(positive: Node, **knobs: object) -> Node:
        sampled = graph.add(
            "Pix2PixZeroKSampler",
            model=model[0],
            inversion=inversion[0],
            positive=positive[0],
            negative=described[0],
            **knobs,
        )
        return graph.add("VAEDecode", samples=sampled[0], vae=model[2])

    results = {
        "source": scene,
        "reconstruction": redrawn(described, cfg=1.0, guidance_strength=0.0),
        "unguided": redrawn(moved, guidance_strength=0.0),
        "edited": redrawn(moved),
        "truth": truth,
    }
    shown = {name: graph.add("PreviewImage", images=picture[0]).key for name, picture in results.items()}
    return graph, shown, graph.add("PreviewAny", source=caption[0]).key
