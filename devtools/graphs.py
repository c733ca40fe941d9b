"""ComfyUI graphs in API form, built in Python."""

import json
from dataclasses import dataclass, field

from .hosts import ROOT

EXAMPLE = ROOT / "tests" / "workflows" / "cat_to_dog_demo.json"


class Node:
    """A node of a `Graph`; `node[i]` is a link to its output `i`."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __getitem__(self, output: int) -> list:
        return [self.key, output]


class Graph:
    """Collects nodes, on top of a graph in API form; :meth:`api` is what the server's `/prompt` takes."""

    def __init__(self, api: dict | None = None) -> None:
        self._nodes: dict[str, dict] = dict(api or {})

    def add(self, class_type: str, **inputs: object) -> Node:
        """Add a node; inputs are values or links."""
        key = str(max(map(int, self._nodes), default=0) + 1)
        self._nodes[key] = {"class_type": class_type, "inputs": inputs}
        return Node(key)

    def copy(self, node: Node, **changes: object) -> Node:
        """Add a node that differs from another one in some inputs."""
        return self.add(self._nodes[node.key]["class_type"], **{**self.inputs(node), **changes})

    def change(self, node: Node, **changes: object) -> None:
        """Set some inputs of a node."""
        self.inputs(node).update(changes)

    def replace(self, node: Node, class_type: str, **inputs: object) -> None:
        """Put another node in the place of one, under the same links."""
        self._nodes[node.key] = {"class_type": class_type, "inputs": inputs}

    def inputs(self, node: Node) -> dict:
        """The inputs of a node."""
        return self._nodes[node.key]["inputs"]

    def only(self, class_type: str) -> Node:
        """The one node of a class. Raises ValueError when there is none, or more than one."""
        (key,) = (key for key, node in self._nodes.items() if node["class_type"] == class_type)
        return Node(key)

    def all(self, *prefixes: str) -> list[Node]:
        """The nodes of the classes whose names start so."""
        return [Node(key) for key, node in self._nodes.items() if node["class_type"].startswith(prefixes)]

    def keep(self, *nodes: Node) -> None:
        """Drop every node that these do not need."""
        needed: set[str] = set()
        to_visit = [node.key for node in nodes]
        while to_visit:
            key = to_visit.pop()
            if key not in needed:
                needed.add(key)
                to_visit += [value[0] for value in self._nodes[key]["inputs"].values() if isinstance(value, list)]
        self._nodes = {key: node for key, node in self._nodes.items() if key in needed}

    def api(self, object_info: dict) -> dict:
        """The API form, as the frontend sends it: with the nodes' own defaults where none was given.

        Raises KeyError: a node is not known to the server.
        """
        return {
            key: {**node, "inputs": {**_defaults(object_info[node["class_type"]]), **node["inputs"]}}
            for key, node in self._nodes.items()
        }


def _defaults(schema: dict) -> dict[str, object]:
    defaults = {}
    inputs = schema["input"]
    for name, (kind, *options) in (inputs.get("required", {}) | inputs.get("optional", {})).items():
        settings = options[0] if options else {}
        choices = kind if isinstance(kind, list) else settings.get("options") if kind == "COMBO" else None
        if "default" in settings:
            defaults[name] = settings["default"]
        elif choices:
            defaults[name] = choices[0]
    return defaults


@dataclass(frozen=True)
class Edit:
    """An edit of a demo scene: what changes in the scene, the two concepts that say so, and the knobs it wants."""

    source: str
    target: str
    scene: dict[str, object] = field(default_factory=dict)
    edited_scene: dict[str, object] = field(default_factory=dict)
    strength: float = 1.0
    cfg: float = 1.5


EDITS = {
    "cat2dog": Edit("cat", "dog", {"subject": "cat"}, {"subject": "dog"}),
    "dog2cat": Edit("dog", "cat", {"subject": "dog"}, {"subject": "cat"}, cfg=2.0),
    "horse2zebra": Edit("horse", "zebra", {"subject": "horse"}, {"subject": "zebra"}),
    "zebra2horse": Edit("zebra", "horse", {"subject": "zebra"}, {"subject": "horse"}),
    "add_glasses": Edit("cat", "cat wearing glasses", {"subject": "cat"}, {"glasses": "yes"}, strength=1.5),
    "day2night": Edit("day", "night", {"time_of_day": "day"}, {"time_of_day": "night"}, cfg=3.0),
    "summer2winter": Edit("summer", "winter", {"season": "summer"}, {"season": "winter"}),
    "photo2sketch": Edit("photo", "pencil sketch", {"style": "flat"}, {"style": "pencil sketch"}),
    "sketch2pastel": Edit("pencil sketch", "oil pastel", {"style": "pencil sketch"}, {"style": "oil pastel"}),
}

# label in the comparison and key of the result, in reading order
PICTURES = {
    "source": "source",
    "direction": "direction alone",
    "guided": "with guidance",
    "held": "with shapes, local blend",
    "edited": "pasted",
    "truth": "ground truth",
}


def example_graph() -> Graph:
    """The one edit of the first example, with its caption shown and without the strip over strengths."""
    graph = Graph(json.loads(EXAMPLE.read_text(encoding="utf-8")))
    graph.keep(graph.only("SaveImage"), graph.only("PreviewAny"))
    return graph


def demo_graph(edit: Edit, seed: int) -> tuple[Graph, dict[str, str], str]:
    """The first example with another edit and scene, and the pictures to compare its result with.

    They show what each part does: the direction alone; with the paper's guidance; with the picture's shapes and
    the local blend in its place, as the sampler is; that pasted back into the source; and the true result.

    Returns the graph; for each key of `PICTURES` the node that shows it; the node that shows the caption.
    """
    graph = example_graph()
    scene, direction, sampler, decoder, paste = (
        graph.only(name)
        for name in (
            "Pix2PixZeroDemoScene",
            "Pix2PixZeroEditDirection",
            "Pix2PixZeroKSampler",
            "VAEDecode",
            "Pix2PixZeroPasteEdit",
        )
    )
    graph.change(scene, seed=seed, **edit.scene)
    graph.change(direction, source=edit.source, target=edit.target)
    graph.change(graph.only("Pix2PixZeroApplyDirection"), strength=edit.strength)
    graph.change(sampler, cfg=edit.cfg)

    def redrawn(preset: str) -> Node:
        free = graph.copy(sampler, preset=preset, guidance_strength=0.0, local_blend=0.0, feature_until=0.0)
        return graph.copy(decoder, samples=free[0])

    results = {
        "source": scene,
        "direction": redrawn("default"),
        "guided": redrawn("paper"),
        "held": decoder,
        "edited": paste,
        "truth": graph.copy(scene, **edit.edited_scene),
    }
    shown = {name: graph.add("PreviewImage", images=picture[0]).key for name, picture in results.items()}
    return graph, shown, graph.only("PreviewAny").key
