// Shows what a node of the pack says on the node: whole, in the frontend's language, while it runs and when it has finished.
// Frontends forget the stock line of text when a run ends. The messages are those of host/messages.py; their translations are in
// locales/LANGUAGE/main.json.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const OWN = "Pix2PixZero";
const TEXTS = "pix2pixZero";
const WIDGET = "$$pix2pix-zero-text";
const FONT = "12px sans-serif";
const LINE = 16;
const PADDING = 4;
const MARGIN = 6;

let texts = {};
const measure = document.createElement("canvas").getContext("2d");

function patterns(language) {
  const english = texts.en?.[TEXTS] ?? {};
  const own = texts[language]?.[TEXTS] ?? {};
  return Object.entries(english)
    .filter(([key]) => own[key])
    .map(([key, text]) => {
      const names = [...text.matchAll(/\{(\w+)\}/g)].map((match) => match[1]);
      const parts = text.split(/\{\w+\}/).map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
      return { expression: new RegExp(`^${parts.join("(.+?)")}$`, "i"), names, text: own[key] };
    });
}

function translated(line, known) {
  for (const { expression, names, text } of known) {
    const found = line.match(expression);
    if (!found) continue;
    const said = Object.fromEntries(names.map((name, index) => [name, found[index + 1]]));
    if (said.text) said.text = translated(said.text, known);
    return text.replace(/\{(\w+)\}/g, (_, name) => said[name] ?? "");
  }
  return line;
}

function inLanguage(text) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  const known = language === "en" ? [] : patterns(language);
  return text.split("\n").map((line) => translated(line, known)).join("\n");
}

// A node by its id in the run: those of subgraphs come with the ids of the nodes around them, 12:3.
function find(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node?.comfyClass?.startsWith(OWN) ? node : null;
}

function height(text, width) {
  measure.font = FONT;
  const lines = text.split("\n").map((line) => Math.ceil((measure.measureText(line).width * 1.1) / Math.max(80, width)) || 1);
  return LINE * lines.reduce((sum, count) => sum + count, 0) + 2 * (PADDING + MARGIN);
}

function addWidget(node) {
  const element = document.createElement("div");
  Object.assign(element.style, {
    font: FONT,
    lineHeight: `${LINE}px`,
    whiteSpace: "pre-wrap",
    overflow: "auto",
    overflowWrap: "anywhere",
    userSelect: "text",
    padding: `${PADDING}px`,
    boxSizing: "border-box",
    color: "var(--input-text, #ddd)",
  });
  const size = () => height(element.textContent, node.size[0] - 2 * (PADDING + MARGIN));
  const options = { serialize: false, hideOnZoom: false, margin: MARGIN, getMinHeight: size, getMaxHeight: size };
  const widget = node.addDOMWidget(WIDGET, "pix2pix_zero_text", element, options);
  widget.serialize = false;
  return widget;
}

function show(node, text) {
  const widget = node.widgets?.find((one) => one.name === WIDGET) ?? addWidget(node);
  widget.element.textContent = inLanguage(text);
  const least = node.computeSize()[1];
  if (node.size[1] < least) node.setSize([node.size[0], least]);
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "pix2pix-zero.node-texts",

  async setup() {
    texts = await (await api.fetchApi("/i18n")).json();
    // In place of the frontend's own line, which cuts the text off and is lost.
    const dispatch = api.dispatchCustomEvent;
    api.dispatchCustomEvent = function (type, detail) {
      const node = type === "progress_text" ? find(detail?.nodeId) : null;
      if (!node) return dispatch.apply(this, arguments);
      show(node, detail.text);
      return true;
    };
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith(OWN)) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      before?.apply(this, arguments);
      if (output?.text?.length) show(this, output.text.join("\n"));
    };
  },

  // When the results of an earlier run are shown again.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = output?.text?.length ? find(id) : null;
      if (node) show(node, output.text.join("\n"));
    }
  },
});
