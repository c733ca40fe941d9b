// The pack's examples in the template browser: with titles and descriptions, found by its name, and opened large enough to be read.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));
const NAME = "Pix2Pix-Zero";

function card(name, text) {
  const { title = name.replaceAll("_", " "), description = "" } = text ?? {};
  return { name, title, description, mediaType: "image", mediaSubtype: "jpg", tags: [NAME, "pix2pix", "edit"], models: [] };
}

// The frontend knows nothing but file names of a pack's examples. A category of its own may say more; so they are named there.
function describeExamples(texts) {
  const listed = api.getWorkflowTemplates;
  const described = api.getCoreWorkflowTemplates;
  let names = [];
  api.getWorkflowTemplates = async function () {
    const all = await listed.apply(this, arguments);
    names = all[FOLDER] ?? [];
    return { ...all, [FOLDER]: [] };
  };
  api.getCoreWorkflowTemplates = async function () {
    const core = await described.apply(this, arguments);
    const templates = [...names].sort().map((name) => card(name, texts[name]));
    return [...core, { moduleName: FOLDER, title: NAME, type: "image", templates }];
  };
}

app.registerExtension({
  name: "pix2pix-zero.examples",

  async init() {
    const answer = await fetch(new URL("examples.json", import.meta.url));
    describeExamples(answer.ok ? await answer.json() : {});
  },

  // The frontend shows a template as a whole, however small; the pack's examples are to be read, from their beginning on.
  afterConfigureGraph() {
    const { pix2pixZeroExample, ds } = app.rootGraph?.extra ?? app.graph?.extra ?? {};
    if (!pix2pixZeroExample || !ds) return;
    const view = () => {
      app.canvas.ds.scale = ds.scale;
      app.canvas.ds.offset = [...ds.offset];
      app.canvas.setDirty(true, true);
    };
    requestAnimationFrame(view);
    setTimeout(view, 300);
  },
});
