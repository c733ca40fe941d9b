"""ComfyUI's frontend in a browser: what a person does there and sees there."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

READY = "() => window.app?.vueAppReady && app.graph && app.extensionManager && document.querySelector('canvas')"

# Counts what the server says while a graph runs; window.seen is read by Frontend.run.
LISTEN = """() => {
  window.seen = {ending: null, previews: {}, started: []};
  if (window.listening) return;
  window.listening = true;
  for (const ending of ['execution_success', 'execution_error', 'execution_interrupted'])
    app.api.addEventListener(ending, event => { window.seen.ending = [ending, event.detail]; });
  app.api.addEventListener('executing', event => event.detail && window.seen.started.push(String(event.detail)));
  app.api.addEventListener('b_preview_with_metadata', event => {
    const node = String(event.detail.displayNodeId ?? event.detail.nodeId);
    window.seen.previews[node] = (window.seen.previews[node] ?? 0) + 1;
  });
}"""
OPEN = """async workflow => {
  await app.loadGraphData(workflow);
  await new Promise(done => setTimeout(done, 300));
}"""
WAIT_FOR_MESSAGE = """async () => {
  for (let i = 0; i < 30 && !document.querySelector('[data-testid=error-overlay]'); i++)
    await new Promise(done => setTimeout(done, 100));
}"""
EMPTY = {"version": 0.4, "last_node_id": 0, "last_link_id": 0, "nodes": [], "links": []}
SHOW_ALL = """async () => {
  const boxes = app.canvas.graph.groups.map(group => group.boundingRect ?? group._bounding);
  if (!boxes.length) return;
  const left = Math.min(...boxes.map(box => box[0])), top = Math.min(...boxes.map(box => box[1]));
  const right = Math.max(...boxes.map(box => box[0] + box[2])), bottom = Math.max(...boxes.map(box => box[1] + box[3]));
  const canvas = app.canvas.canvas.getBoundingClientRect();
  const scale = Math.min((canvas.width - 140) / (right - left), (canvas.height - 140) / (bottom - top));
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [-left + 80 / scale, -top + 90 / scale];
  app.canvas.setDirty(true, true);
  await new Promise(done => setTimeout(done, 300));
}"""


class Frontend:
    """One page with the frontend.

    `page`: a page of playwright's. `url`: the server. `folder`: where `screenshot` leaves its files.
    """

    def __init__(self, page: "Page", url: str, folder: Path) -> None:
        self.page, self.url, self.folder = page, url, folder
        self.failures: list[str] = []
        page.on("pageerror", lambda error: self.failures.append(str(error)))

    def start(self) -> None:
        """Open the frontend, or open it anew."""
        self.page.goto(self.url)
        self.page.wait_for_function(READY, timeout=240_000)  # on a busy machine
        self.set("Comfy.Workflow.Persist", False)  # so that it always opens the stock workflow, as its last act
        self.page.wait_for_function("() => app.graph.nodes.length > 0")
        self.page.evaluate(WAIT_FOR_MESSAGE)  # it lacks its models, and is left only after it has said so
        self.open(EMPTY)
        self.failures.clear()

    def set(self, setting: str, value: object) -> None:
        """Change one of the frontend's settings."""
        self.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [setting, value])

    def command(self, name: str) -> None:
        """Do what the menu entry or key of this command does."""
        self.page.evaluate("name => { app.extensionManager.command.execute(name) }", name)

    def open(self, workflow: dict) -> None:
        """Open a workflow file."""
        self.page.evaluate(OPEN, workflow)

    def serialize(self) -> dict:
        """The open workflow, as the frontend would save it."""
        return json.loads(self.page.evaluate("() => JSON.stringify(app.rootGraph.serialize())"))

    def api_form(self) -> dict:
        """What the frontend would send to the server."""
        return json.loads(self.page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))

    def complaints(self) -> list[str]:
        """Whatever the frontend complains about: nodes that it marks red, messages, dialogs, errors in its own code."""
        red = self.page.evaluate(
            "() => app.graph.nodes.filter(node => node.has_errors || !LiteGraph.registered_node_types[node.type])"
            ".map(node => `red: ${node.type}`)"
        )
        messages = "[role=dialog]:visible, .p-toast-message-error:visible, [data-testid=error-overlay]:visible"
        shown = self.page.locator(messages).all_inner_texts()
        return [*red, *shown, *self.failures]

    def set_widgets(self, name: str, value: object) -> int:
        """Set every widget of this name; how many there are."""
        return self.page.evaluate(
            """([name, value]) => {
              const widgets = app.graph.nodes.flatMap(node => node.widgets ?? []).filter(widget => widget.name === name);
              for (const widget of widgets) widget.value = value;
              return widgets.length;
            }""",
            [name, value],
        )

    def nodes(self, kind: str) -> list[str]:
        """The ids of the open workflow's nodes of a type."""
        return self.page.evaluate("kind => app.graph.nodes.filter(n => n.type === kind).map(n => String(n.id))", kind)

    def queue(self) -> None:
        """Press Run."""
        self.page.evaluate(LISTEN)
        self.page.get_by_test_id("queue-button").first.click()

    def wait_until(self, condition: str, seconds: float = 180.0) -> None:
        """Wait for an expression on `window.seen` to hold."""
        self.page.wait_for_function(f"() => {condition}", timeout=1000 * seconds)

    def run(self, seconds: float = 180.0) -> dict:
        """Press Run and wait for the end: `{ending: [event, details], previews: {node: count}, started: [node]}`."""
        self.queue()
        self.wait_until("window.seen.ending", seconds)
        return self.page.evaluate("() => window.seen")

    def pictures(self) -> list[str]:
        """The addresses of the pictures that nodes show, once all of them are drawn."""
        return self.page.evaluate(
            """async () => {
              const shown = app.graph.nodes.flatMap(node => (app.nodeOutputs[node.id]?.images ?? []));
              return shown.map(image => image.filename);
            }"""
        )

    def screenshot(self, name: str) -> Path:
        """Leave a picture of the whole workflow in the folder of artefacts."""
        self.page.evaluate(SHOW_ALL)
        return self.snapshot(name)

    def snapshot(self, name: str) -> Path:
        """Leave a picture of the page as it is in the folder of artefacts."""
        path = self.folder / f"{name}.png"
        self.page.screenshot(path=path)
        return path


def speak(frontend: Frontend, language: str) -> None:
    """Show the frontend in a language. It is opened anew: until then node titles lag behind by one change."""
    if frontend.page.evaluate("() => app.extensionManager.setting.get('Comfy.Locale')") != language:
        frontend.set("Comfy.Locale", language)
        frontend.start()
