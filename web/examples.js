// Opens the pack's examples large enough to be read, at their beginning.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "pix2pix-zero.examples",

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
