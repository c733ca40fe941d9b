// Offers a direction on Load Direction as soon as Save Direction has written it.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const SAVES = "Pix2PixZeroSaveDirection";
const LOADS = "Pix2PixZeroLoadDirection";

let directions = null;

function offer(node) {
  const widget = node.widgets?.find((one) => one.name === "direction_name");
  if (!widget || !directions) return;
  widget.options.values = directions;
  widget.value ??= directions[0]; // where there was nothing to choose before
}

function everyNode(graph, act) {
  for (const node of graph?.nodes ?? []) {
    act(node);
    everyNode(node.subgraph, act);
  }
}

// The files that Load Direction offers, asked for anew after one was saved.
async function refreshDirections() {
  const info = await (await api.fetchApi(`/object_info/${LOADS}`)).json();
  const [kind, options] = info[LOADS].input.required.direction_name;
  directions = Array.isArray(kind) ? kind : options.options;
  everyNode(app.rootGraph ?? app.graph, (node) => node.comfyClass === LOADS && offer(node));
}

app.registerExtension({
  name: "pix2pix-zero.directions",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== SAVES) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function () {
      before?.apply(this, arguments);
      refreshDirections();
    };
  },

  nodeCreated(node) {
    if (node.comfyClass === LOADS) offer(node);
  },
});
