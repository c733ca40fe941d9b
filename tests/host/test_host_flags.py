"""The host's flags on real servers: what takes another way to the same numbers draws the same pictures, rougher numbers
draw nearly the same.

Flags that exclude each other are spread over the servers, with several on each. Those of a GPU's memory exclude --cpu.
"""

import io

import numpy as np
import pytest
from comfy.cli_args import parser
from PIL import Image
from pix2pix_zero.devtools.graphs import Graph

STEPS = 4
# By what is tried: flags, and how far a picture may be from the plain server's on average, of 255. Whole steps of the last
# bit where only the order of sums differs.
FLAGS = {
    "split attention, nothing cached": ("--use-split-cross-attention --cache-none --force-fp32 --deterministic", 0.01),
    "quadratic attention, few results cached": (
        "--use-quad-cross-attention --cache-lru 3 --disable-smart-memory --force-channels-last",
        0.02,
    ),
    "pytorch attention, everything cached": (
        "--use-pytorch-cross-attention --cache-classic --force-upcast-attention --fp64-unet --fp32-text-enc",
        0.02,
    ),
    "cache under pressure, fp16 between nodes": (
        "--cache-ram 0.1 --fp16-intermediates --fast --disable-dynamic-vram --disable-mmap",
        0.2,
    ),
    "fp16": ("--fp16-unet --fp16-vae --fp16-text-enc", 0.5),
    "bf16": ("--bf16-unet --bf16-vae --bf16-text-enc --dont-upcast-attention", 1.0),
    "fp8": ("--fp8_e4m3fn-unet --fp8_e4m3fn-text-enc --cpu-vae", 10.0),
}


def graph() -> tuple[Graph, dict[str, str]]:
    """Most nodes of the pack on one picture; the node that shows each result."""
    graph = Graph()
    add = graph.add
    model, scene = add("Pix2PixZeroDemoModel"), add("Pix2PixZeroDemoScene", subject="cat", seed=3)
    caption = add("Pix2PixZeroCaption", captioner=add("Pix2PixZeroLoadCaptioner", model_name="demo")[0], image=scene[0])
    text, plain = ("a photo of a cat", "a photo of a dog")
    source, target = (add("CLIPTextEncode", clip=model[1], text=text) for text in (text, plain))
    latent = add("VAEEncode", pixels=scene[0], vae=model[2])
    inverted = add(
        "Pix2PixZeroInversion", model=model[0], positive=source[0], latent_image=latent[0], steps=STEPS, seed=0
    )
    direction = add(
        "Pix2PixZeroEditDirectionFromSentences",
        clip=model[1],
        source_sentences="a cat\na photo of a cat",
        target_sentences="a dog\na photo of a dog",
    )
    moved = add("Pix2PixZeroApplyDirection", conditioning=source[0], direction=direction[0], strength=1.0)
    edited = add("Pix2PixZeroKSampler", model=model[0], inversion=inverted[0], positive=moved[0], negative=source[0])
    prompted = add(
        "Pix2PixZeroPromptToPrompt", model=model[0], inversion=inverted[0], clip=model[1], source=text, target=plain
    )
    plugged = add("Pix2PixZeroPlugAndPlay", model=model[0], inversion=inverted[0])
    flow = add(
        "Pix2PixZeroFlowEdit",
        model=model[0],
        source=source[0],
        target=target[0],
        latent_image=latent[0],
        steps=STEPS,
    )
    nothing, sampler = add("DisableNoise"), add("KSamplerSelect", sampler_name="euler")

    def stock(model, positive):
        guider = add("CFGGuider", model=model, positive=positive, negative=source[0], cfg=1.5)
        inputs = {"noise": nothing[0], "guider": guider[0], "sampler": sampler[0]}
        return add("SamplerCustomAdvanced", **inputs, sigmas=inverted[2], latent_image=inverted[1])[0]

    latents = {
        "KSampler": edited[0],
        "Prompt-to-Prompt": stock(prompted[0], prompted[1]),
        "Plug-and-Play": stock(plugged[0], target[0]),
        "FlowEdit": flow[0],
    }
    pictures = {name: add("VAEDecode", samples=latent, vae=model[2])[0] for name, latent in latents.items()}
    inputs = {"model": model[0], "inversion": inverted[0]}
    pictures["heat"] = add("Pix2PixZeroAttentionHeatmap", **inputs, clip=model[1], caption=text, words="cat")[0]
    pictures["source"] = scene[0]
    shown = {name: add("PreviewImage", images=picture).key for name, picture in pictures.items()}
    shown["caption"] = add("PreviewAny", source=caption[0]).key
    return graph, shown


def results(start_server, flags: list[str]) -> dict:
    """By name, the pictures [H, W, 3] in 0..255, and the caption, of a run after one that leaves its inversion behind."""
    workflow, shown = graph()
    with start_server(*flags) as server:
        api = workflow.api(server.object_info())
        sampler = workflow.only("Pix2PixZeroKSampler").key
        other = {**api, sampler: {**api[sampler], "inputs": {**api[sampler]["inputs"], "cfg": 3.0}}}
        left_out = set(shown.values()) - {shown["KSampler"]}
        server.run({key: node for key, node in other.items() if key not in left_out})
        outputs = server.run(api)

        def picture(name: str) -> np.ndarray:
            png = server.view(outputs[shown[name]]["images"][0])
            return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(float)

        found = {name: picture(name) for name in shown if name != "caption"}
        return {**found, "caption": "".join(outputs[shown["caption"]]["text"])}


@pytest.fixture(scope="module")
def plain(start_server) -> dict:
    return results(start_server, [])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def test_without_flags_every_method_edits(plain):
    methods = plain.keys() - {"source", "caption", "heat"}
    unlike = {name: distance(plain[name], plain["source"]) for name in methods}
    assert min(unlike.values()) > 2.0, unlike
    assert "cat" in plain["caption"]


@pytest.mark.parametrize("tried", FLAGS)
def test_flags_leave_every_result_as_it_is(start_server, plain, tried):
    flags, tolerance = FLAGS[tried]
    found = results(start_server, known(flags))
    assert found["caption"] == plain["caption"]
    off = {name: distance(found[name], plain[name]) for name in found if name not in ("caption", "heat")}
    assert max(off.values()) <= tolerance, off
    # a heatmap spreads its values over all colours
    assert distance(found["heat"], plain["heat"]) <= max(2 * tolerance, 0.02)


def known(flags: str) -> list[str]:
    """Those flags, with their values, that this version of the host has."""
    found, keep = [], False
    for word in flags.split():
        keep = word in parser._option_string_actions if word.startswith("--") else keep
        found += [word] if keep else []
    return found
