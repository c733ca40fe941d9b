"""Nodes called from Python, outside a graph."""

from comfy_api.latest import io


def with_defaults(node: type[io.ComfyNode], inputs: dict[str, object]) -> dict[str, object]:
    """The inputs of a node, those that are not given at its own defaults."""
    defaults = {item.id: getattr(item, "default", None) for item in node.GET_SCHEMA().inputs}
    return {**{name: value for name, value in defaults.items() if value is not None}, **inputs}
