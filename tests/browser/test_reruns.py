"""What runs again when one setting of a graph that was built by hand changes."""

DRAWING_AT_RANDOM = (
    "Pix2PixZeroInversion",
    "Pix2PixZeroDemoScene",
    "Pix2PixZeroReference",
    "Pix2PixZeroSentences",
    "Pix2PixZeroFlowEdit",
)
CONTROL = """kind => {
  const node = LiteGraph.createNode(kind);
  app.graph.add(node);
  const widgets = new Set(node.widgets.flatMap(widget => [widget, ...(widget.linkedWidgets ?? [])]));
  return [...widgets].map(widget => widget.value)
    .filter(value => ['fixed', 'increment', 'decrement', 'randomize'].includes(value));
}"""
# Nodes as they come out of the node library, joined by the names of their sockets.
BUILD = """() => {
  const add = (kind, joined = {}, values = {}) => {
    const node = LiteGraph.createNode(kind);
    app.graph.add(node);
    node.pos = [350 * app.graph.nodes.length, 200];
    for (const [name, [from, output]] of Object.entries(joined))
      from.connect(output, node, node.inputs.findIndex(slot => slot.name === name));
    for (const [name, value] of Object.entries(values)) node.widgets.find(widget => widget.name === name).value = value;
    return node;
  };
  const model = add('Pix2PixZeroDemoModel'), scene = add('Pix2PixZeroDemoScene');
  const latent = add('VAEEncode', {pixels: [scene, 0], vae: [model, 2]});
  const text = add('CLIPTextEncode', {clip: [model, 1]}, {text: 'a photo of a cat'});
  const inversion = add(
    'Pix2PixZeroInversion', {model: [model, 0], positive: [text, 0], latent_image: [latent, 0]}, {steps: 3});
  const direction = add('Pix2PixZeroEditDirection', {clip: [model, 1]});
  const moved = add('Pix2PixZeroApplyDirection', {conditioning: [text, 0], direction: [direction, 0]});
  const sampler = add('Pix2PixZeroKSampler',
    {model: [model, 0], inversion: [inversion, 0], positive: [moved, 0], negative: [text, 0]});
  const picture = add('VAEDecode', {samples: [sampler, 0], vae: [model, 2]});
  add('PreviewImage', {images: [picture, 0]});
}"""


def test_a_fresh_nodes_seed_stays_as_it_is_from_run_to_run(frontend):
    found = {kind: frontend.page.evaluate(CONTROL, kind) for kind in DRAWING_AT_RANDOM}
    assert found == dict.fromkeys(DRAWING_AT_RANDOM, ["fixed"])


def test_changing_cfg_alone_draws_the_edit_alone_again(frontend):
    frontend.page.evaluate(BUILD)
    first = frontend.run()
    assert first["ending"][0] == "execution_success", first["ending"]
    assert frontend.nodes("Pix2PixZeroInversion")[0] in first["started"]
    assert frontend.set_widgets("cfg", 2.5) == 1
    again = frontend.run()
    assert again["ending"][0] == "execution_success", again["ending"]
    redrawn = ("Pix2PixZeroKSampler", "VAEDecode", "PreviewImage")
    assert sorted(again["started"]) == sorted(key for kind in redrawn for key in frontend.nodes(kind))
    assert frontend.complaints() == []
