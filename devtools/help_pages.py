"""The tables of the help pages and the English texts of the interface, both written from the nodes' schemas.

A help page is `web/docs/NODE.md`, in another language `web/docs/NODE/LANGUAGE.md`. Its title and the two tables
between `<!-- inputs -->`, `<!-- outputs -->` and their ends belong to this program, all else to its author.
`locales/en` belongs to it too, with what nodes say while they run (`host/messages.py`) in `main.json`; the other languages'
files are written by hand and only put in order.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..host.messages import messages
from . import family_table
from .hosts import ROOT

LOCALES = ROOT / "locales"
PAGES = ROOT / "web" / "docs"
CONTROL = "control_after_generate"
MESSAGES = "pix2pixZero"  # where `main.json` has what nodes say


@dataclass(frozen=True)
class Words:
    """What a language calls the parts of a table."""

    input: str
    output: str
    meaning: str
    optional: str
    advanced: str
    between: str  # two numbers
    control: str | None = None  # the host's own name for the widget below a seed
    none: str = ""


LANGUAGES = {
    "en": Words(
        "Input, type, default", "Output, type", "What it does", "optional", "advanced", "{} to {}", none="No inputs."
    ),
    "ko": Words(
        "입력, 유형, 기본값", "출력, 유형", "설명", "선택", "고급", "{}~{}", "생성 후 제어", "입력이 없습니다."
    ),
    "zh": Words("输入、类型、默认值", "输出、类型", "说明", "可选", "高级", "{}～{}", "生成后的控制", "没有输入。"),
    "ja": Words(
        "入力、型、デフォルト", "出力、型", "説明", "任意", "高度", "{}～{}", "生成後の制御", "入力はありません。"
    ),
}
TRANSLATIONS = tuple(language for language in LANGUAGES if language != "en")


@dataclass(frozen=True)
class Socket:
    """An input of a node: its type, the settings of its widget, and whether it may be left open."""

    kind: str
    settings: dict
    optional: bool


def inputs_of(info: dict) -> dict[str, Socket]:
    """The inputs of a node, in the order of its schema. `info`: the node as `/object_info` describes it."""
    return {
        name: Socket(spec[0], spec[1] if len(spec) > 1 else {}, group == "optional")
        for group in ("required", "optional")
        for name, spec in info["input"].get(group, {}).items()
    }


def english(info: dict) -> dict:
    """The node's texts as its schema has them, in the form of `nodeDefs.json`."""
    inputs = {name: _text(name, socket.settings.get("tooltip")) for name, socket in inputs_of(info).items()}
    outputs = {
        str(index): _text(name, tooltip)
        for index, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
    }
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def _text(name: str, tooltip: str | None) -> dict:
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


def expected(info: dict) -> dict:
    """`english` with all that a translation names, also the widgets that the host adds."""
    texts = english(info)
    if any(socket.settings.get(CONTROL) for socket in inputs_of(info).values()):
        texts["inputs"][CONTROL] = {"name": CONTROL}
    return texts


def paths(texts: dict, *above: str) -> dict[tuple[str, ...], str]:
    """Each text by the keys that lead to it: `("inputs", "cfg", "tooltip")`."""
    found: dict[tuple[str, ...], str] = {}
    for key, value in texts.items():
        found.update(paths(value, *above, key) if isinstance(value, dict) else {(*above, key): value})
    return found


def read_texts(language: str) -> dict[str, dict]:
    """The texts of all nodes in a language; `{}` when there are none yet."""
    path = LOCALES / language / "nodeDefs.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_messages(language: str) -> dict[str, str]:
    """What nodes say while they run, in a language; `{}` when there are none yet."""
    path = LOCALES / language / "main.json"
    return json.loads(path.read_text(encoding="utf-8"))[MESSAGES] if path.is_file() else {}


def in_order(texts: dict, model: dict) -> dict:
    """The same texts in the order of `model`; what the model does not know comes last."""
    keys = [*(key for key in model if key in texts), *(key for key in texts if key not in model)]
    return {
        key: in_order(texts[key], model.get(key, {})) if isinstance(texts[key], dict) else texts[key] for key in keys
    }


def input_table(info: dict, texts: dict, words: Words) -> str:
    """The table of a node's inputs. `texts`: the node's entry in `nodeDefs.json`."""
    rows = []
    for name, socket in inputs_of(info).items():
        text = texts["inputs"][name]
        marks = [
            word for word, set in ((words.optional, _widgetless(socket)), (words.advanced, _hidden(socket))) if set
        ]
        kind = " ".join([socket.kind, *(f"({mark})" for mark in marks)])
        default = _default(socket, words)
        rows.append((_cell(_name(name, text["name"]), kind, default), text.get("tooltip", "")))
    return _table((words.input, words.meaning), rows) if rows else words.none


def output_table(info: dict, texts: dict, words: Words) -> str:
    """The table of a node's outputs."""
    rows = []
    for index, (name, kind) in enumerate(zip(info["output_name"], info["output"], strict=True)):
        text = texts["outputs"][str(index)]
        rows.append((_cell(_name(name, text["name"]), kind), text.get("tooltip", "")))
    return _table((words.output, words.meaning), rows)


def _cell(*lines: str) -> str:
    """One cell above the other: the frontend's panel is narrow."""
    return "<br>".join(line for line in lines if line)


def _widgetless(socket: Socket) -> bool:
    """Whether it is a socket that may stay open; a widget always has a value."""
    return socket.optional and "default" not in socket.settings


def _hidden(socket: Socket) -> bool:
    return bool(socket.settings.get("advanced"))


def _name(key: str, name: str) -> str:
    return f"`{key}`" if name == key else f"**{name}**<br>`{key}`"


def _default(socket: Socket, words: Words) -> str:
    default = socket.settings.get("default")
    if default is None or default == "":
        return ""
    shown = (
        str(default).lower() if isinstance(default, bool) else f"{default:g}" if isinstance(default, float) else default
    )
    low, high = socket.settings.get("min"), socket.settings.get("max")
    wide = low is None or high is None or high > 2**31
    return f"{shown}" if wide else f"{shown} ({words.between.format(f'{low:g}', f'{high:g}')})"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), line(("---",) * len(head)), *map(line, rows)])


def rewrite(page: str, info: dict, texts: dict, language: str) -> str:
    """A help page with its title and tables brought up to date.

    Raises ValueError: the page lacks a title or the marks around a table.
    """
    words = LANGUAGES[language]
    page, titles = re.subn(r"\A# .*$", lambda _: f"# {texts['display_name']}", page, flags=re.MULTILINE)
    if not titles:
        raise ValueError("the page does not start with '# '")
    for part, table in (("inputs", input_table(info, texts, words)), ("outputs", output_table(info, texts, words))):
        if part == "outputs" and not info["output_name"]:
            continue
        between = f"<!-- {part} -->\n\n{table}\n\n<!-- /{part} -->"
        page, found = re.subn(rf"<!-- {part} -->.*?<!-- /{part} -->", lambda _: between, page, flags=re.DOTALL)  # noqa: B023
        if found != 1:
            raise ValueError(f"the page needs one <!-- {part} --> and one <!-- /{part} -->")
    return page


def page_path(node_id: str, language: str) -> Path:
    """Where the frontend looks for a help page."""
    return PAGES / f"{node_id}.md" if language == "en" else PAGES / node_id / f"{language}.md"


def with_english(texts: dict, model: dict) -> dict:
    """`texts`, and the text of `model` (the English one) wherever they lack one, as the frontend shows them."""
    shown = {key: texts.get(key, value) for key, value in model.items()}
    return {
        key: with_english(shown[key], value) if isinstance(value, dict) else shown[key] for key, value in model.items()
    }


def written(infos: list[dict]) -> dict[Path, str]:
    """The content that each generated file should have, for the pages and translations that exist.

    `infos`: all nodes of the pack as `/object_info` describes them.
    """
    files = {}
    models = {info["name"]: expected(info) for info in infos}
    for language, words in LANGUAGES.items():
        texts = {info["name"]: english(info) for info in infos}
        if language != "en":
            texts = in_order(read_texts(language), models)
            for name in texts.keys() & models.keys():
                if CONTROL in models[name]["inputs"]:
                    texts[name].setdefault("inputs", {})[CONTROL] = {"name": words.control}
            texts = in_order(texts, models)
        if texts:
            files[LOCALES / language / "nodeDefs.json"] = json.dumps(texts, ensure_ascii=False, indent=2) + "\n"
        said = messages() if language == "en" else in_order(read_messages(language), messages())
        if said:
            files[LOCALES / language / "main.json"] = json.dumps({MESSAGES: said}, ensure_ascii=False, indent=2) + "\n"
        shown = with_english(texts, models)
        for info in infos:
            path = page_path(info["name"], language)
            if path.is_file():
                files[path] = rewrite(path.read_text(encoding="utf-8"), info, shown[info["name"]], language)
    return files


def _named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _placeholders(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


def faults(infos: list[dict]) -> list[str]:
    """What is wrong, in words: a node without an English page, a page of no node, a translation of no text."""
    models = {info["name"]: expected(info) for info in infos}
    found = [f"{_named(path)} is missing" for name in models if not (path := page_path(name, "en")).is_file()]
    for language in LANGUAGES:
        pages = {page_path(name, language) for name in models}
        present = PAGES.glob("*.md" if language == "en" else f"*/{language}.md")
        found += [f"{_named(path)} is of no node" for path in sorted(set(present) - pages)]
    for language in TRANSLATIONS:
        file, wanted = _named(LOCALES / language / "nodeDefs.json"), paths(models)
        superfluous = paths(read_texts(language)).keys() - wanted.keys()
        found += [f"{file} has {'.'.join(path)}, which does not exist" for path in sorted(superfluous)]
        file, said = _named(LOCALES / language / "main.json"), read_messages(language)
        for name, text in said.items():
            if _placeholders(text) != _placeholders(messages().get(name, "")):
                found.append(f"{file} has {name} with other braces than the English message, or it does not exist")
    return found


def untranslated(infos: list[dict]) -> list[str]:
    """The texts and pages that a language lacks, in words. The frontend shows the English ones in their place."""
    found = []
    models = {info["name"]: expected(info) for info in infos}
    for language in TRANSLATIONS:
        file, translated = _named(LOCALES / language / "nodeDefs.json"), paths(read_texts(language))
        lacking = {path: text for path, text in paths(models).items() if path not in translated}
        found += [f"{file} lacks {'.'.join(path)}: {text}" for path, text in lacking.items()]
        found += [f"{_named(path)} is missing" for name in models if not (path := page_path(name, language)).is_file()]
        file, said = _named(LOCALES / language / "main.json"), read_messages(language)
        found += [f"{file} lacks {name}: {text}" for name, text in messages().items() if name not in said]
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dev.py docs")
    for option, what in (("--pictures", "help pages"), ("--thumbnails", "examples")):
        parser.add_argument(option, nargs="*", metavar="NAME", help=f"draw those of the {what}, all or those named")
    return parser


def main(arguments: list[str]) -> int:
    """`python dev.py docs`: write what is generated, list what is not translated, then what is wrong.

    Returns 1 if anything is wrong; a missing translation is not.
    """
    from comfy.cli_args import args

    args.cpu = True
    from ..nodes import NODES

    asked = _parser().parse_args(arguments)
    if asked.pictures is not None:
        from .help_pictures import draw_pictures

        draw_pictures(asked.pictures)
    if asked.thumbnails is not None:
        from .thumbnails import draw_thumbnails

        draw_thumbnails(asked.thumbnails)
    infos = [node.GET_NODE_INFO_V1() for node in NODES]
    before, now = paths(read_texts("en")), paths({info["name"]: english(info) for info in infos})
    for path, text in now.items():
        if before.get(path, text) != text:
            print(f"translate again: {'.'.join(path)}: {text}")
    for path, content in written(infos).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            print(f"wrote {_named(path)}")
    if family_table.write():
        print(f"wrote {_named(family_table.README)}")
    lacking, wrong = untranslated(infos), faults(infos)
    if lacking:
        print("Not translated, shown in English:", *lacking, sep="\n  ")
    if wrong:
        print("To mend:", *wrong, sep="\n  ")
    elif not lacking:
        print("All pages and translations are complete.")
    return int(bool(wrong))


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
