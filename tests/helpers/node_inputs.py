"""For each node of the pack inputs on which it works, on the demo model."""

import torch
from pix2pix_zero.demo_model.loader import WEIGHTS, load_demo_model
from pix2pix_zero.host.networks.captioner import load_demo_captioner
from pix2pix_zero.nodes import NODES
from pix2pix_zero.nodes.sockets import with_defaults

import nodes as core

SIDE = 32
NODE = {kind.__name__.removeprefix("Pix2PixZero"): kind for kind in NODES}


def usual_values() -> dict[str, object]:
    """For each type of socket something that a node can work on."""
    with torch.inference_mode():
        model, clip, vae = load_demo_model()
        text = core.CLIPTextEncode().encode(clip, "a photo of a cat")[0]
        picture = torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))
        latent = {"samples": vae.encode(picture)}
        found = {
            "MODEL": model,
            "CLIP": clip,
            "VAE": vae,
            "CONDITIONING": text,
            "LATENT": latent,
            "IMAGE": picture,
            "MASK": torch.ones(1, SIDE, SIDE),
            "P2PZ_CAPTIONER": load_demo_captioner(WEIGHTS),
            "STRING": "cat",
        }
        direction = NODE["EditDirection"].execute(clip, "cat", "dog").result[0]
        inverted = run(NODE["Inversion"], dict(model=model, positive=text, latent_image=latent, steps=2))
        return {**found, "P2PZ_DIRECTION": direction, "P2PZ_INVERSION": inverted.result[0][0]}


def run(node, inputs):
    """The node's output, with its defaults, and lists where it takes lists."""
    inputs = with_defaults(node, inputs)
    if node.GET_SCHEMA().is_input_list:
        inputs = {name: [value] for name, value in inputs.items()}
    return node.execute(**inputs)


def usual_inputs(node, usual):
    """Inputs on which a node works."""
    given = {}
    for item in node.GET_SCHEMA().inputs:
        kind = item.get_io_type()
        if getattr(item, "default", None) is None and kind in usual and not item.optional:
            given[item.id] = usual[kind]
    for name, value in (("steps", 2), ("target", "dog"), ("caption", "a photo of a cat"), ("words", "cat")):
        if name in {item.id for item in node.GET_SCHEMA().inputs if item.get_io_type() in ("INT", "STRING")}:
            given[name] = value
    return given
