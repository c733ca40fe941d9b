"""The workflow that every picture goes through, in ComfyUI's API form, and the key of a picture in it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

TITLE = "source"
SAVE_PAIR = "Pix2PixZeroSavePair"
SAVE_IMAGE = "SaveImage"
# What a save node calls its results; they are fetched and named anew here.
_NAMES = {SAVE_PAIR: "dataset", SAVE_IMAGE: "filename_prefix"}


class ClusterError(Exception):
    """Something the person has to know, told in one line."""


@dataclass(frozen=True)
class Workflow:
    """`graph`: the save node and all it needs, by id. `source`, `save`: the ids of the nodes that take and keep pictures."""

    graph: dict[str, dict]
    source: str
    save: str

    @property
    def makes_pairs(self) -> bool:
        """Whether it saves pairs; else it saves pictures."""
        return self.graph[self.save]["class_type"] == SAVE_PAIR

    @property
    def classes(self) -> list[str]:
        """The classes of its nodes, sorted."""
        return sorted({node["class_type"] for node in self.graph.values()})

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides a result: neither titles, nor the picture in the file, nor the names of results."""
        nodes = {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in self.graph.items()}
        nodes[self.source] = {**nodes[self.source], "inputs": {}}
        inputs = dict(nodes[self.save]["inputs"])
        inputs.pop(_NAMES[nodes[self.save]["class_type"]], None)
        nodes[self.save] = {**nodes[self.save], "inputs": inputs}
        return hashlib.sha256(json.dumps(nodes, sort_keys=True).encode()).hexdigest()

    def key(self, picture: bytes) -> str:
        """SHA-256 of a picture's file and this workflow, in hexadecimal."""
        return hashlib.sha256(hashlib.sha256(picture).digest() + bytes.fromhex(self.digest)).hexdigest()

    def prompt(self, image: str) -> dict[str, dict]:
        """What /prompt takes. `image`: the name of the uploaded picture, as *Load Image* takes it."""
        graph = {key: {**node, "inputs": dict(node["inputs"])} for key, node in self.graph.items()}
        graph[self.source]["inputs"]["image"] = image
        save = graph[self.save]
        if self.makes_pairs:
            save["inputs"]["dataset"] = f"cluster-{self.digest[:12]}"
        else:  # the same picture, but in the server's temporary folder
            save["class_type"] = "PreviewImage"
            save["inputs"] = {"images": save["inputs"]["images"]}
        return graph


def read_workflow(path: Path) -> Workflow:
    """The workflow in a file. Raises ClusterError if it is none, or lacks a node."""
    try:
        nodes = json.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise ClusterError(f"--workflow: {path} cannot be read ({failure.strerror or failure}).") from failure
    except ValueError as failure:
        raise ClusterError(f"--workflow: {path} is not JSON ({failure}).") from failure
    if isinstance(nodes, dict) and isinstance(nodes.get("nodes"), list):
        raise ClusterError(
            f"--workflow: {path} is a workflow as the browser saves it. Export it with Workflow > Export (API)."
        )
    if not isinstance(nodes, dict) or not nodes or not all(_is_node(node) for node in nodes.values()):
        raise ClusterError(f"--workflow: {path} is no workflow. Export one with Workflow > Export (API).")
    source = _only(path, nodes, "LoadImage", f"Load Image titled {TITLE!r}", TITLE)
    if any(node["class_type"] == SAVE_PAIR for node in nodes.values()):
        save = _only(path, nodes, SAVE_PAIR, "Save Edit Pair")
    else:
        save = _only(path, nodes, SAVE_IMAGE, "Save Edit Pair or Save Image")
    graph = _needed(path, nodes, save)
    if source not in graph:
        raise ClusterError(f"--workflow: in {path}, what is saved does not depend on the Load Image titled {TITLE!r}.")
    return Workflow(graph, source, save)


def _is_node(node: object) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _only(path: Path, nodes: dict, class_type: str, name: str, title: str | None = None) -> str:
    def titled(node: dict) -> bool:
        return title is None or str(node.get("_meta", {}).get("title", "")).strip().lower() == title

    found = [key for key, node in nodes.items() if node["class_type"] == class_type and titled(node)]
    if len(found) != 1:
        count = f"{len(found)} nodes" if found else "no node"
        raise ClusterError(f"--workflow: {path} has {count} of this kind: {name}. Exactly one is needed.")
    return found[0]


def _needed(path: Path, nodes: dict, last: str) -> dict:
    """The nodes that one node needs, and itself."""
    needed, to_visit = {}, [last]
    while to_visit:
        key = to_visit.pop()
        if key in needed:
            continue
        if key not in nodes:
            raise ClusterError(f"--workflow: {path} lacks node {key}, which another one needs. Export it again.")
        needed[key] = nodes[key]
        to_visit += [str(value[0]) for value in nodes[key]["inputs"].values() if _is_link(value)]
    return dict(sorted(needed.items()))


def _is_link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)
