"""An edit of a demo scene wired by hand: nodes with the values that they have when a person adds them."""

from browser_page import Frontend

CAPTION = "a photo of a cat"
WIRE = """([swapped, other, side]) => {
  const add = (kind, values = {}) => {
    const node = LiteGraph.createNode(kind);
    app.graph.add(node);
    node.pos = [300 * app.graph.nodes.length, 200];
    for (const [name, value] of Object.entries(values)) node.widgets.find(one => one.name === name).value = value;
    return node;
  };
  const join = (from, output, to, name) => from.connect(output, to, to.inputs.findIndex(slot => slot.name === name));
  const model = add('Pix2PixZeroDemoModel'), scene = add('Pix2PixZeroDemoScene', {side});
  const text = add('CLIPTextEncode', {text: 'a photo of a cat'}), second = add('CLIPTextEncode', {text: other});
  const encode = add('VAEEncode'), invert = add('Pix2PixZeroInversion', {steps: 2});
  const direction = add('Pix2PixZeroEditDirection'), apply = add('Pix2PixZeroApplyDirection');
  const sampler = add('Pix2PixZeroKSampler', {cfg: 1.5, guidance_strength: 0}), decode = add('VAEDecode');
  const show = add('PreviewImage');
  join(model, 1, text, 'clip'); join(model, 1, second, 'clip'); join(model, 2, encode, 'vae'); join(scene, 0, encode, 'pixels');
  join(model, 0, invert, 'model'); join(text, 0, invert, 'positive'); join(encode, 0, invert, 'latent_image');
  join(model, 1, direction, 'clip'); join(direction, 0, apply, 'direction'); join(text, 0, apply, 'conditioning');
  join(model, 0, sampler, 'model'); join(invert, 0, sampler, 'inversion');
  join(swapped ? text : apply, 0, sampler, 'positive');
  join(swapped ? apply : second, 0, sampler, 'negative');
  join(sampler, 0, decode, 'samples'); join(model, 2, decode, 'vae'); join(decode, 0, show, 'images');
}"""


def wire_by_hand(frontend: Frontend, swapped: bool = False, negative: str = CAPTION, side: int = 128) -> None:
    """Wire the edit in the open, empty graph.

    `swapped`: the edited text goes to the sampler's negative. `negative`: the text that goes there otherwise. `side`: of the
    scene, in pixels.
    """
    frontend.page.evaluate(WIRE, [swapped, negative, side])
