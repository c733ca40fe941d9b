"""The translations: of nothing that does not exist, and saying what the English text says; what they lack is English."""

import json
import re

import pytest
from pix2pix_zero.devtools import help_pages
from pix2pix_zero.devtools.help_pages import CONTROL, LANGUAGES, LOCALES, TRANSLATIONS, english, expected, paths
from pix2pix_zero.nodes import NODES

INFOS = [node.GET_NODE_INFO_V1() for node in NODES]
ENGLISH = paths({info["name"]: english(info) for info in INFOS})
SCRIPTS = {"ko": "[가-힣]", "zh": "[一-鿿]", "ja": "[ぁ-んァ-ヶ一-鿿]"}


def translated(language: str) -> dict[tuple[str, ...], str]:
    return paths(help_pages.read_texts(language))


def numbers(text: str) -> set[str]:
    """The numbers that a reader is told; digits inside a name, such as clip-vit-large-patch14, are part of it."""
    return set(re.findall(r"(?<![A-Za-z0-9_.-])\d+(?:\.\d+)?(?![\d.]*[A-Za-z_])", re.sub(r"(?<=\d)x(?=\d)", " ", text)))


def test_every_page_and_every_translation_is_of_something_that_exists():
    assert help_pages.faults(INFOS) == [], "python dev.py docs lists it too"


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """`locales` and `docs` in a folder of their own: complete translations (the English texts) and no page."""
    texts = {info["name"]: expected(info) for info in INFOS}
    for language in TRANSLATIONS:
        write_texts(tmp_path, language, texts)
    monkeypatch.setattr(help_pages, "LOCALES", tmp_path / "locales")
    monkeypatch.setattr(help_pages, "PAGES", tmp_path / "docs")
    monkeypatch.setattr(help_pages, "ROOT", tmp_path)
    return tmp_path


def write_texts(folder, language: str, texts: dict) -> None:
    path = folder / "locales" / language / "nodeDefs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(texts), encoding="utf-8")


def test_a_missing_translation_is_listed_and_is_no_fault(scratch):
    texts = {info["name"]: expected(info) for info in INFOS}
    del texts["Pix2PixZeroKSampler"]["inputs"]["cfg"]["tooltip"]
    write_texts(scratch, "ja", texts)
    listed = help_pages.untranslated(INFOS)
    tooltip = ENGLISH["Pix2PixZeroKSampler", "inputs", "cfg", "tooltip"]
    assert [line for line in listed if "nodeDefs" in line] == [
        f"locales/ja/nodeDefs.json lacks Pix2PixZeroKSampler.inputs.cfg.tooltip: {tooltip}"
    ]
    assert "docs/Pix2PixZeroKSampler/ko.md is missing" in listed
    assert help_pages.faults(INFOS) == [f"docs/{info['name']}.md is missing" for info in INFOS]


def test_a_text_of_nothing_and_a_page_of_nothing_are_faults(scratch):
    texts = {info["name"]: expected(info) for info in INFOS}
    texts["Pix2PixZeroKSampler"]["inputs"]["cgf"] = {"name": "cgf"}
    write_texts(scratch, "zh", texts)
    for name in ("NoNode.md", "NoNode/ko.md"):
        (scratch / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / "docs" / name).write_text("# No node\n", encoding="utf-8")
    found = help_pages.faults(INFOS)
    assert "locales/zh/nodeDefs.json has Pix2PixZeroKSampler.inputs.cgf.name, which does not exist" in found
    assert {"docs/NoNode.md is of no node", "docs/NoNode/ko.md is of no node"} <= set(found)


def test_the_page_of_a_node_with_a_new_input_has_its_row_in_english_until_it_is_translated(scratch):
    info = next(info for info in INFOS if info["name"] == "Pix2PixZeroKSampler")
    texts = {"Pix2PixZeroKSampler": expected(info)}
    texts["Pix2PixZeroKSampler"]["inputs"]["preset"] = {"name": "프리셋", "tooltip": "설정을 고릅니다."}
    del texts["Pix2PixZeroKSampler"]["inputs"]["cfg"]
    write_texts(scratch, "ko", texts)
    page = help_pages.page_path("Pix2PixZeroKSampler", "ko")
    page.parent.mkdir(parents=True)
    page.write_text("# 이름\n<!-- inputs --><!-- /inputs --><!-- outputs --><!-- /outputs -->", encoding="utf-8")
    table = help_pages.written(INFOS)[page]
    assert "| **프리셋**<br>`preset`" in table and "설정을 고릅니다." in table
    assert f"| `cfg`<br>FLOAT<br>5 (0~100) | {ENGLISH['Pix2PixZeroKSampler', 'inputs', 'cfg', 'tooltip']} |" in table


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_translation_is_in_its_language(language):
    texts = translated(language)
    long = {path: text for path, text in texts.items() if path[-1] in ("tooltip", "description")}
    assert len(long) > 150
    assert {path: text for path, text in long.items() if not re.search(SCRIPTS[language], text)} == {}


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_translation_gives_the_numbers_that_the_english_text_gives(language):
    """An advice that changes in English has to change in all languages."""
    texts = translated(language)
    differing = {
        path: numbers(text) - numbers(texts[path])
        for path, text in ENGLISH.items()
        if path in texts and path[-1] != "name"
    }
    assert {path: missing for path, missing in differing.items() if missing} == {}


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_translation_names_the_choices_that_the_english_text_names(language):
    """`ddim: ...` explains a choice of a list, which is shown as it is in every language."""
    texts = translated(language)
    for info in INFOS:
        for name, socket in help_pages.inputs_of(info).items():
            path = (info["name"], "inputs", name, "tooltip")
            for choice in map(str, socket.settings.get("options") or ()):
                if path in texts and f"{choice}: " in ENGLISH[path]:
                    assert re.search(re.escape(choice) + "[:：]", texts[path]), (path, choice)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_holds_what_the_frontend_takes_for_a_command(language):
    """The frontend's messages give { } @ and | a meaning in names and descriptions."""
    texts = translated(language)
    assert {path: text for path, text in texts.items() if path[-1] != "tooltip" and re.search(r"[{}@|]", text)} == {}


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_an_input_is_called_the_same_in_every_node(language):
    called: dict[str, set[str]] = {}
    for path, text in translated(language).items():
        if path[1] == "inputs" and path[-1] == "name":
            called.setdefault(path[2], set()).add(text)
    assert {name: names for name, names in called.items() if len(names) > 1} == {}


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_no_two_nodes_have_one_name(language):
    texts = translated(language)
    names = [texts.get(path, text) for path, text in ENGLISH.items() if path[-1] == "display_name"]
    assert len(names) == len(set(names)) == len(INFOS)


def test_the_widget_below_a_seed_is_named_as_the_host_names_it():
    for language in TRANSLATIONS:
        names = {text for path, text in translated(language).items() if CONTROL in path}
        assert names == {LANGUAGES[language].control}


def test_the_server_serves_every_language(server):
    served = json.loads(server.get("/i18n"))
    for language in LANGUAGES:
        own = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
        assert [name for name in own if own[name] != served[language]["nodeDefs"].get(name)] == []
