"""Where a person finds the pack in ComfyUI's own frontend: templates, node library, help pages, translations."""

import json
import re
from pathlib import Path

import pytest
from browser_page import Frontend, speak
from pix2pix_zero.devtools.server import PACK_FOLDER

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
LANGUAGES = sorted(path.parent.name for path in (ROOT / "locales").glob("*/nodeDefs.json"))
NODE = "Pix2PixZeroKSampler"
TRANSLATED = "Pix2PixZeroInversion"
BLUEPRINT = "Edit picture by concept"

ADD_NODE = """kind => {
  const node = LiteGraph.createNode(kind);
  app.graph.add(node);
  node.pos = [600, 300];
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [0, 0];
  app.canvas.setDirty(true, true);
  const corner = app.canvas.canvas.getBoundingClientRect();
  return [corner.x + node.pos[0] + 100, corner.y + node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT / 2];
}"""
# The blueprint between the demo model, a demo scene and a preview.
WIRE = """() => {
  const [edit] = app.graph.nodes;
  const add = (kind, x, y) => {
    const node = LiteGraph.createNode(kind);
    app.graph.add(node);
    node.pos = [x, y];
    return node;
  };
  edit.pos = [1000, 200];
  const model = add('Pix2PixZeroDemoModel', 600, 200), scene = add('Pix2PixZeroDemoScene', 600, 400);
  const join = (from, output, name) => from.connect(output, edit, edit.inputs.findIndex(slot => slot.name === name));
  ['model', 'clip', 'vae'].forEach((name, output) => join(model, output, name));
  join(scene, 0, 'image');
  edit.connect(0, add('PreviewImage', 1400, 200), 0);
  for (const [name, value] of Object.entries({captioner: 'demo', cfg: 1.5, steps: 10, model_size: 128}))
    edit.widgets.find(widget => widget.name === name).value = value;
}"""
LOADED = "selector => [...document.querySelectorAll(selector)].every(image => image.complete && image.naturalWidth > 0)"


def test_the_template_browser_lists_every_example_with_its_thumbnail(frontend, request):
    page = frontend.page
    frontend.command("Comfy.BrowseTemplates")
    page.get_by_role("dialog").get_by_text(PACK_FOLDER, exact=True).first.click()
    cards = [page.get_by_test_id(f"template-workflow-{name}") for name in EXAMPLES]
    for card in cards:
        card.wait_for()
        card.scroll_into_view_if_needed()
    page.wait_for_function(LOADED, arg="[data-testid^=template-workflow-] img")
    texts = json.loads((ROOT / "web" / "examples.json").read_text(encoding="utf-8"))
    assert sorted(texts) == EXAMPLES
    # The newer one's cards show no descriptions.
    described = request.node.callspec.params["frontend_server"] == "pinned"
    for name, found in zip(EXAMPLES, cards):
        assert found.get_by_text(texts[name]["title"], exact=True).count() == 1, name
        if described:
            description = re.sub("[-_]", " ", texts[name]["description"])  # as it shows them
            assert found.get_by_text(description, exact=True).count() == 1, name
    frontend.snapshot("templates")
    cards[EXAMPLES.index("cat_to_dog_demo")].get_by_test_id("thumbnail-content").click()
    page.get_by_role("dialog").wait_for(state="hidden")
    assert frontend.nodes(NODE)
    page.wait_for_timeout(600)
    assert page.evaluate("() => app.canvas.ds.scale") >= 0.6, "too small to be read"
    assert frontend.complaints() == []


def test_the_templates_are_found_by_the_name_of_the_pack(frontend):
    page = frontend.page
    frontend.command("Comfy.BrowseTemplates")
    page.get_by_role("dialog").get_by_role("textbox").first.fill("pix2pix")
    page.get_by_test_id("template-workflow-cat_to_dog_demo").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="hidden")


def test_the_blueprint_is_in_the_node_library_and_edits_a_picture(frontend):
    page = frontend.page
    frontend.command("Workspace.ToggleSidebarTab.node-library")
    page.locator(".side-bar-panel input, [class*=sidebar] input[type=text]").first.fill("edit picture")
    page.get_by_role("treeitem", name=BLUEPRINT).last.click()
    page.mouse.move(1200, 500)  # the node hangs on the pointer until it is set down
    page.mouse.click(1200, 500)
    page.wait_for_function("() => app.graph.nodes.length === 1")
    frontend.command("Workspace.ToggleSidebarTab.node-library")
    assert page.evaluate("() => app.graph.nodes[0].title") == BLUEPRINT
    saved = frontend.serialize()
    inside = {str(node["id"]): node["type"] for node in saved["definitions"]["subgraphs"][0]["nodes"]}
    shown = saved["nodes"][0]["properties"]["previewExposures"]  # where a node of Vue shows its preview
    assert [inside[each["sourceNodeId"]] for each in shown] == [NODE]
    page.evaluate(WIRE)
    before = set(frontend.pictures())  # an earlier workflow's, whose nodes had the same ids
    seen = frontend.run()
    assert seen["ending"][0] == "execution_success", seen["ending"]
    assert len(set(frontend.pictures()) - before) == 1
    page.wait_for_timeout(500)  # the picture is loaded
    frontend.snapshot("blueprint")
    page.evaluate("() => app.canvas.openSubgraph(app.graph.nodes[0].subgraph, app.graph.nodes[0])")
    page.wait_for_timeout(300)
    frontend.screenshot("blueprint_inside")
    assert frontend.complaints() == []


def open_help(frontend: Frontend, kind: str) -> None:
    """Add a node, select it by its title, and press its info button."""
    title = frontend.page.evaluate(ADD_NODE, kind)
    button = frontend.page.get_by_test_id("info-button").first
    for _ in range(20):  # it cannot be hit before it is drawn
        frontend.page.mouse.click(*title)
        frontend.page.wait_for_timeout(300)
        if button.is_visible():
            break
    button.click(timeout=5000)


def test_every_node_has_a_help_page_on_the_server(server):
    ids = [name for name in server.object_info() if name.startswith("Pix2PixZero")]
    assert ids
    for name in ids:
        page = server.get(f"/extensions/{PACK_FOLDER}/docs/{name}.md").decode()
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)|<img[^>]*src=\"([^\"]+)\"", page):
            assert server.get(f"/extensions/{PACK_FOLDER}/docs/{''.join(picture)}")


def test_the_help_page_is_shown_beside_its_node(frontend, server):
    page = frontend.page
    open_help(frontend, NODE)
    served = server.get(f"/extensions/{PACK_FOLDER}/docs/{NODE}.md").decode()
    for heading in re.findall(r"^#+ (.+)$", served, re.MULTILINE):
        page.get_by_role("heading", name=heading, exact=True).first.wait_for(timeout=5000)
    page.wait_for_function(LOADED, arg=f"img[src*='{PACK_FOLDER}/docs']")
    frontend.snapshot("help")
    assert frontend.complaints() == []


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_nodes_inputs_and_help_are_shown_in_the_language_of_the_frontend(language, opened_frontend):
    frontend, page = opened_frontend, opened_frontend.page
    speak(frontend, language)
    page.evaluate("() => app.graph.clear()")
    open_help(frontend, TRANSLATED)
    texts = {
        name: json.loads((ROOT / "locales" / name / "nodeDefs.json").read_text(encoding="utf-8"))[TRANSLATED]
        for name in ("en", language)
    }
    expected = {**texts["en"], **texts[language]}
    expected["inputs"] = {**texts["en"]["inputs"], **texts[language]["inputs"]}
    assert page.evaluate("() => app.graph.nodes[0].title") == expected["display_name"]
    shown = dict(
        page.evaluate("() => app.graph.nodes[0].inputs.map(slot => [slot.name, slot.label ?? slot.localized_name])")
    )
    named = {name: entry["name"] for name, entry in expected["inputs"].items() if "name" in entry}
    assert shown == {name: named.get(name) for name in shown}
    page.get_by_role("heading", name=expected["display_name"], exact=True).first.wait_for(timeout=5000)
    assert set(shown) <= set(page.locator("td code").all_inner_texts()), "the help page leaves inputs out"
    frontend.snapshot(f"language_{language}")
    assert frontend.complaints() == []
