"""The help pages: there for every node, true to its schema, with pictures that the frontend finds."""

import copy
import re

import pytest
from PIL import Image
from pix2pix_zero.devtools import help_pages
from pix2pix_zero.devtools.help_pages import LANGUAGES, PAGES, ROOT, english, inputs_of, page_path, rewrite
from pix2pix_zero.nodes import NODES

INFOS = {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in NODES}
PICTURES = PAGES / "pictures"
HINT = "run: python dev.py docs"


def pages() -> list:
    return sorted(PAGES.rglob("*.md"))


def test_every_node_has_a_help_page():
    assert [name for name in INFOS if not page_path(name, "en").is_file()] == []


def test_no_page_is_of_a_node_that_does_not_exist():
    assert {path.stem for path in PAGES.glob("*.md")} | {path.parent.name for path in PAGES.glob("*/*.md")} <= set(
        INFOS
    )


def test_the_tables_and_the_english_texts_are_those_of_the_schemas():
    stale = [
        path.relative_to(ROOT).as_posix()
        for path, content in help_pages.written(list(INFOS.values())).items()
        if path.read_text(encoding="utf-8") != content
    ]
    assert not stale, HINT


def test_the_tables_follow_a_change_of_the_schema():
    page = "# Old name\n\n<!-- inputs -->\n<!-- /inputs -->\n\n<!-- outputs -->\nold\n<!-- /outputs -->\n\nKept.\n"
    info = copy.deepcopy(INFOS["Pix2PixZeroKSampler"])
    before = rewrite(page, info, english(info), "en")
    assert before.startswith(f"# {info['display_name']}\n") and before.endswith("\n\nKept.\n")
    assert rewrite(before, info, english(info), "en") == before
    settings = info["input"]["required"]["cfg"][1]
    settings["default"], settings["tooltip"] = 9.5, "Raise | lower it."
    after = rewrite(before, info, english(info), "en")
    assert "| `cfg`<br>FLOAT<br>9.5 (0 to 100) | Raise \\| lower it. |" in after and "9.5" not in before
    assert sum(line.startswith("| `") for line in after.splitlines()) == len(inputs_of(info)) + len(info["output_name"])


def test_a_page_without_its_marks_is_refused():
    info = INFOS["Pix2PixZeroKSampler"]
    with pytest.raises(ValueError, match="<!-- inputs -->"):
        rewrite("# Name\n", info, english(info), "en")
    with pytest.raises(ValueError, match="does not start"):
        rewrite("Name\n", info, english(info), "en")


def test_every_page_says_what_the_node_does_and_shows_a_worked_example():
    for path in pages():
        text = path.read_text(encoding="utf-8")
        intro = text.split("\n## ")[0]
        assert len(intro.encode()) > 120, path
        assert re.search(r"^!\[.{5,}\]\(pictures/", text, re.MULTILINE), f"{path} shows no picture"
        assert len(re.findall(r"^\d\. ", text, re.MULTILINE)) >= 2, f"{path} has no steps to follow"


def test_what_is_emphasized_is_shown_so():
    """Markdown does not end an emphasis between a bracket and a letter, which languages without spaces run into."""
    broken = re.compile(r"[)）」』”]\*{1,2}(?=\w)|(?<=\w)\*{1,2}[(（「『“]")
    assert {path: broken.search(path.read_text(encoding="utf-8")) for path in pages()} == dict.fromkeys(pages())


def test_the_pages_show_pictures_that_exist_and_every_picture_is_shown():
    shown = {name for path in pages() for name in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8"))}
    # the frontend looks for them beside the English pages, whatever the language
    assert shown == {f"pictures/{path.name}" for path in PICTURES.iterdir()}


def test_the_pictures_are_small():
    for path in PICTURES.iterdir():
        with Image.open(path) as picture:
            assert picture.format == "JPEG" and max(picture.size) <= 1000, path.name
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) < 600_000


def test_the_pages_name_only_inputs_and_outputs_that_exist():
    known = {name for info in INFOS.values() for name in (*inputs_of(info), *info["output_name"])}
    for path in pages():
        named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", path.read_text(encoding="utf-8")))
        assert named <= known, f"{path} names {named - known}"


def names_in(language: str) -> set[str]:
    """What the pack's nodes are called in a language (in English where it has no name), also without the brackets."""
    texts = help_pages.read_texts(language)
    names = {texts.get(name, {}).get("display_name", info["display_name"]) for name, info in INFOS.items()}
    return names | {re.sub(r"\s*[(（].*[)）]$", "", name) for name in names}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_pages_call_the_nodes_by_their_names(language):
    """Nodes of the pack are in italics, those of the host in bold."""
    known = names_in(language)
    for name in INFOS:
        path = page_path(name, language)
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            called = set(re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", text))
            assert called <= known, f"{path} names {called - known}"


def test_the_english_pages_name_nodes_of_the_host_that_exist(server):
    def plain(name: str) -> str:
        return re.sub(r"\s*\(.*\)$", "", name).replace(" ", "")  # some versions write CFGGuider, others CFG Guider

    titles = {plain(info["display_name"] or name) for name, info in server.object_info().items()}
    for path in PAGES.glob("*.md"):
        named = set(map(plain, re.findall(r"\*\*([^*\n]+)\*\*", path.read_text(encoding="utf-8"))))
        assert named <= titles, f"{path} names {named - titles}"


def test_the_server_serves_the_pages_where_the_frontend_asks_for_them(server):
    for name, info in server.object_info().items():
        if name in INFOS:
            _, pack = info["python_module"].split(".")
            assert server.get(f"/extensions/{pack}/docs/{name}.md").startswith(b"# ")
            assert server.get(f"/extensions/{pack}/docs/pictures/{next(PICTURES.iterdir()).name}")[:2] == b"\xff\xd8"
