"""README's table of what works on which family of models, written from the tests that prove it.

A test says so by `@pytest.mark.works(NODE, ...)`, with names of `NODES`, or none for all of them. Its families are the
values of its parameter `family`, or those of `works(..., family=...)`: a name, or a collection of names. Such a collection may
be a constant of the file or of one in `tests/helpers`; of a dict its keys count. The files are read and not run.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from .hosts import ROOT

README = ROOT / "README.md"
TESTS = ROOT / "tests"
MARK = "works"
NODES = (
    "Invert Picture",
    "Generate Reference",
    "KSampler",
    "FlowEdit",
    "Prompt-to-Prompt",
    "Plug-and-Play",
    "Attention Heatmap",
    "Feature PCA",
)
FLOW_UNETS = "UNets that flow (SDXL behind *ModelSamplingSD3*)"
# What the families of the tests are called; the table begins with these, in this order.
LABELS = {
    "sd15": "SD 1.x",
    "sd20": "SD 2.x",
    "sd21-v": "SD 2.x",
    "sdxl": "SDXL",
    "sdxl-v": "SDXL",
    "sdxl-refiner": "SDXL refiner",
    "ssd-1b": "SSD-1B, Vega, KOALA",
    "vega": "SSD-1B, Vega, KOALA",
    "koala-700m": "SSD-1B, Vega, KOALA",
    "koala-1b": "SSD-1B, Vega, KOALA",
    "sdxs": "SDXS",
    "sdxs-09": "SDXS",
    "sd15-inpaint": "inpainting checkpoints",
    "sd20-inpaint": "inpainting checkpoints",
    "sdxl-inpaint": "inpainting checkpoints",
    "sd15-pix2pix": "InstructPix2Pix checkpoints",
    "sdxl-pix2pix": "InstructPix2Pix checkpoints",
    "unclip-h": "unCLIP checkpoints",
    "lcm": "LCM and others that draw in few steps",
    "flow": FLOW_UNETS,
}


def proven(tests: Path = TESTS) -> dict[str, set[str]]:
    """The nodes that tests prove for each family, in the order of the table's rows.

    Raises ValueError, naming the file, for a node that is not in `NODES` and for families that cannot be read.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(tests.glob("*/test_*.py")):
        text = path.read_text(encoding="utf-8")
        if f"mark.{MARK}(" in text:
            for families, nodes in _claims(path, ast.parse(text)):
                for family in families:
                    found[LABELS.get(family, family)].update(nodes)
    known = [label for label in dict.fromkeys(LABELS.values()) if label in found]
    return {label: found[label] for label in [*known, *sorted(found.keys() - set(known))]}


def table(rows: dict[str, set[str]]) -> str:
    """A Markdown table of families and nodes."""
    lines = [("", *NODES), ("---", *(":---:" for _ in NODES))]
    lines += [(family, *("✓" if node in nodes else "" for node in NODES)) for family, nodes in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rewritten(page: str, rows: dict[str, set[str]]) -> str:
    """README with the table brought up to date. Raises ValueError if it lacks the marks around it."""
    between = f"<!-- families -->\n\n{table(rows)}\n\n<!-- /families -->"
    page, found = re.subn(r"<!-- families -->.*?<!-- /families -->", lambda _: between, page, flags=re.DOTALL)
    if found != 1:
        raise ValueError("README.md needs one <!-- families --> and one <!-- /families -->.")
    return page


def write() -> bool:
    """Bring README up to date. Whether it was not."""
    before = README.read_text(encoding="utf-8")
    after = rewritten(before, proven())
    if after != before:
        README.write_text(after, encoding="utf-8")
    return after != before


def is_up_to_date() -> bool:
    page = README.read_text(encoding="utf-8")
    return rewritten(page, proven()) == page


def _claims(path: Path, module: ast.Module) -> Iterator[tuple[list[str], list[str]]]:
    """(families, nodes) of each mark of a file."""
    for test in ast.walk(module):
        marks = [mark for mark in getattr(test, "decorator_list", ()) if isinstance(mark, ast.Call)]
        for mark in marks:
            if not _is(mark, MARK):
                continue
            nodes = [ast.literal_eval(node) for node in mark.args] or list(NODES)
            unknown = set(nodes) - set(NODES)
            named = next((keyword.value for keyword in mark.keywords if keyword.arg == "family"), None)
            families = _names(named, path, module) if named is not None else _parameters(marks, path, module)
            if unknown or not families:
                raise ValueError(f"{path.name}, {test.name}: {sorted(unknown) or 'its families'} cannot be read.")
            yield families, nodes


def _is(mark: ast.Call, name: str) -> bool:
    return isinstance(mark.func, ast.Attribute) and mark.func.attr == name


def _parameters(marks: list[ast.Call], path: Path, module: ast.Module) -> list[str]:
    """The values of a test's parameter `family`, alone or the first of several."""
    for mark in marks:
        if not _is(mark, "parametrize"):
            continue
        parameters = ast.literal_eval(mark.args[0])
        if parameters == "family":
            return _names(mark.args[1], path, module)
        if parameters[0] == "family":
            return [ast.literal_eval(values.elts[0]) for values in mark.args[1].elts]
    return []


def _names(value: ast.expr, path: Path, module: ast.Module) -> list[str]:
    """The names that an expression stands for, see above; none if it is of another form."""
    if isinstance(value, ast.Constant):
        return [value.value]
    if isinstance(value, (ast.List, ast.Tuple)):
        return [name for item in value.elts for name in _names(item, path, module)]
    if isinstance(value, ast.Dict):
        return [name for key in value.keys if key is not None for name in _names(key, path, module)]
    if isinstance(value, ast.Name):
        return _constant(value.id, path, module)
    return []


def _constant(name: str, path: Path, module: ast.Module) -> list[str]:
    for statement in module.body:
        if isinstance(statement, ast.Assign) and any(getattr(t, "id", None) == name for t in statement.targets):
            return _names(statement.value, path, module)
        if isinstance(statement, ast.ImportFrom) and any(alias.name == name for alias in statement.names):
            helper = TESTS / "helpers" / f"{statement.module}.py"
            if helper.is_file():
                return _constant(name, helper, ast.parse(helper.read_text(encoding="utf-8")))
    return []
