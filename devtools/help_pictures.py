"""The pictures of the help pages: what the nodes make of the demo scenes on a real server.

Every picture is one row of results with a label below each, `web/docs/pictures/NAME.jpg`. Labels name inputs and their
values, so that one picture serves all languages.
"""

import functools
import io
from collections.abc import Callable

from PIL import Image

from ..pictures.charts import as_image, as_pillow
from ..pictures.strips import picture_strip
from .demo_graph import Demo
from .environment import running
from .graphs import EDITS
from .hosts import ROOT
from .process import DevError, one_thread
from .server import GraphError, Server

PICTURES = ROOT / "web" / "docs" / "pictures"
QUALITY = 76
PATIENCE = 3600.0  # seconds: one of them trains a student
WIDEST = 900  # pixels, of a picture that brings its own labels, and of a row
TILE = 152  # pixels, of a picture in a row with what is around it


Picture = tuple[Demo, dict[str, list]]
"""A graph, and for each label in the picture the output that it stands under."""

RECIPES: dict[str, Callable[[], Picture]] = {}


def recipe(make: Callable[[], Picture]) -> Callable[[], Picture]:
    """Register the recipe of the picture that is named as the function."""
    RECIPES[make.__name__] = make
    return make


@recipe
def captions() -> Picture:
    demo, row, batch = Demo(), {}, None
    for subject, seed in (("cat", 5), ("horse", 12), ("zebra", 3), ("dog", 8)):
        scene = demo.copy(demo.scene, subject=subject, seed=seed)[0]
        batch = demo.add("ImageBatch", image1=batch, image2=scene)[0] if batch else scene
        row[str(len(row) + 1)] = scene
    demo.caption = demo.copy(demo.caption, image=batch)
    return demo, row


@recipe
def demo_model() -> Picture:
    demo = Demo()
    texts = {
        "orange cat, summer": "an orange cat in summer during the day",
        "gray dog, winter": "a gray dog in winter during the day",
        "zebra, summer": "a zebra in summer during the day",
        "brown horse, night": "a brown horse in summer at night",
    }
    row = {}
    for seed, (label, text) in enumerate(texts.items(), start=3):
        latent = demo.add("EmptyLatentImage", width=128, height=128, batch_size=1)
        sampled = demo.add(
            "KSampler",
            model=demo.model[0],
            seed=seed,
            steps=30,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            positive=demo.encode(text)[0],
            negative=demo.encode("")[0],
            latent_image=latent[0],
            denoise=1.0,
        )
        row[label] = demo.decode(sampled[0])
    return demo, row


@recipe
def demo_scene() -> Picture:
    demo = Demo()
    changes = {"subject": "dog", "glasses": "yes", "time_of_day": "night", "style": "oil pastel"}
    row = {"seed 114": demo.scene[0]}
    row |= {f"{key}: {value}": demo.copy(demo.scene, **{key: value})[0] for key, value in changes.items()}
    return demo, {**row, "mask": demo.mask_picture(demo.scene[1])}


@recipe
def inversion() -> Picture:
    demo = Demo()
    same = {"cfg": 1.0, "guidance_strength": 0.0}
    return demo, {
        "source": demo.scene[0],
        "noise": demo.decode(demo.inversion[1]),
        "redrawn": demo.edited(demo.source, **same),
        "cat to dog": demo.edited(),
    }


@recipe
def reference() -> Picture:
    demo = Demo()
    text = demo.encode("a photo of an orange cat in summer during the day")
    empty = demo.encode("")
    generated = demo.add(
        "Pix2PixZeroReference",
        model=demo.model[0],
        positive=text[0],
        negative=empty[0],
        latent_image=demo.add("EmptyLatentImage", width=128, height=128, batch_size=1)[0],
        seed=7,
        cfg=3.0,
    )
    demo.source = text
    row = {"generated": demo.decode(generated[1])}
    for source, target, local_blend in (("cat", "dog", 0.2), ("summer", "winter", 0.0)):
        positive = demo.apply(demo.direction(source, target)[0])
        sampler = demo.sample(positive, generated, cfg=3.0, local_blend=local_blend)
        demo.change(sampler, negative=empty[0])
        row[f"{source} to {target}"] = demo.decode(sampler[0])
    return demo, row


@recipe
def edit_direction() -> Picture:
    demo = Demo()
    row = {"source": demo.scene[0]}
    for source, target in (("cat", "dog"), ("summer", "winter")):
        row[f"{source} to {target}"] = demo.edited(demo.apply(demo.direction(source, target)[0]))
    glasses = demo.direction("cat", "cat wearing glasses")
    row["with glasses"] = demo.edited(
        demo.apply(glasses[0], EDITS["add_glasses"].strength), cfg=EDITS["add_glasses"].cfg
    )
    return demo, row


@recipe
def sentences() -> Picture:
    demo = Demo("horse2zebra", 4)
    written = {
        concept: demo.add("Pix2PixZeroSentences", concept=concept, count=256, seed=0) for concept in ("horse", "zebra")
    }
    direction = demo.add(
        "Pix2PixZeroEditDirectionFromSentences",
        clip=demo.model[1],
        source_sentences=written["horse"][0],
        target_sentences=written["zebra"][0],
    )
    return demo, {"source": demo.scene[0], "horse to zebra": demo.edited(demo.apply(direction[0]))}


@recipe
def combine_directions() -> Picture:
    demo = Demo(seed=8)
    dog, winter = demo.direction(), demo.direction("summer", "winter")
    both = demo.add("Pix2PixZeroCombineDirections", direction_a=dog[0], direction_b=winter[0])
    edits = {"a: cat to dog": dog, "b: summer to winter": winter, "a + b": both}
    return demo, {"source": demo.scene[0], **{key: demo.edited(demo.apply(edit[0])) for key, edit in edits.items()}}


@recipe
def saved_direction() -> Picture:
    row = {}
    demo = Demo(seed=8)
    for number, seed in enumerate((114, 8, 15), start=1):
        demo.work_on(demo.copy(demo.scene, seed=seed))
        row[f"{number}"] = demo.scene[0]
        row[f"{number}, cat to dog"] = demo.edited()
    return demo, row


@recipe
def apply_direction() -> Picture:
    demo = Demo()
    strengths = (0.0, 0.5, 1.0, 1.5)
    row = {f"strength {value:g}": demo.edited(demo.apply(strength=value)) for value in strengths}
    return demo, {"source": demo.scene[0], **row}


@recipe
def sampler() -> Picture:
    demo = Demo()
    edited = demo.sample()
    free = demo.edited(local_blend=0.0, feature_until=0.0)
    return demo, {
        "source": demo.scene[0],
        "both 0": free,
        "latent": demo.decode(edited[0]),
        "edited_area": demo.mask_picture(edited[1]),
    }


@recipe
def sampler_cfg() -> Picture:
    demo = Demo()
    return demo, {f"cfg {value:g}": demo.edited(cfg=value) for value in (1.0, 1.5, 3.0, 5.0)}


@recipe
def sampler_guidance() -> Picture:
    demo = Demo()
    row = {f"guidance {value:g}": demo.edited(guidance_strength=value) for value in (0.0, 0.05, 0.2, 1.0)}
    return demo, {"source": demo.scene[0], **row}


@recipe
def paste() -> Picture:
    demo = Demo()
    scene = demo.scene = demo.copy(demo.scene, side=512, distance=3.0)
    crop = demo.work_on_part(context=1.2)
    mask = demo.add("GrowMask", mask=crop[1], expand=14, tapered_corners=True)
    sampled = demo.sample(mask=mask[0])
    edited = demo.decode(sampled[0])
    pasted = demo.add(
        "Pix2PixZeroPasteEdit", source=scene[0], edited=edited, edited_area=sampled[1], crop_region=crop[2]
    )
    return demo, {"source 512x512": scene[0], "crop 128x128": crop[0], "edited": edited, "pasted": pasted[0]}


@recipe
def plug_and_play() -> Picture:
    demo = Demo()
    row = {"source": demo.scene[0]}
    texts = {
        "an orange dog": "an orange dog in summer during the day",
        "a dog at night": "a brown dog in summer at night",
        "an oil pastel drawing": "an oil pastel drawing of a brown cat in summer during the day",
    }
    for label, text in texts.items():
        model = demo.add("Pix2PixZeroPlugAndPlay", model=demo.model[0], inversion=demo.inversion[0])
        row[label] = demo.stock(model[0], demo.encode(text)[0], 3.0)
    return demo, row


@recipe
def prompt_to_prompt() -> Picture:
    demo = Demo(seed=8)
    caption = "a photo of an orange cat in summer during the day"
    demo.source = demo.encode(caption)
    demo.inversion = demo.invert()
    row = {"source": demo.scene[0]}
    edits = {
        "cat to dog": ("cat", "dog"),
        "cat to horse": ("cat", "horse"),
        "day to night": ("during the day", "at night"),
    }
    for label, swap in edits.items():
        patched = demo.add(
            "Pix2PixZeroPromptToPrompt",
            model=demo.model[0],
            inversion=demo.inversion[0],
            clip=demo.model[1],
            source=caption,
            target=caption.replace(*swap),
        )
        row[label] = demo.stock(patched[0], patched[1], 3.0 if label == "day to night" else 1.5)
    return demo, row


@recipe
def flow_edit() -> Picture:
    demo = Demo(seed=12)
    row = {"source": demo.scene[0]}
    texts = {"source": demo.source[0], "target": demo.apply()[0]}
    for skip in (0.0, 0.33, 0.6):
        edited = demo.add(
            "Pix2PixZeroFlowEdit",
            model=demo.model[0],
            latent_image=demo.latent[0],
            cfg=demo.edit.cfg,
            skip=skip,
            **texts,
        )
        row[f"skip {skip:g}"] = demo.decode(edited[0])
    return demo, row


@recipe
def distilled() -> Picture:
    demo = Demo("day2night")
    sources, edits = [], []
    for seed in range(100, 164):
        demo.work_on(demo.copy(demo.scene, seed=seed), steps=10)
        sources.append(demo.scene[0])
        edits.append(demo.edited(local_blend=0.0))
    source, edited = (functools.reduce(demo.batch, pictures) for pictures in (sources, edits))
    saved = demo.add("Pix2PixZeroSavePair", source=source, edited=edited, dataset="night")
    # The link says only that the pairs come first.
    student = demo.add("Pix2PixZeroDistill", dataset="night", name="night", steps=600, seed=saved[0])
    return demo, {"": student[1]}


@recipe
def demo_distilled() -> Picture:
    demo = Demo()
    row = {"source": demo.scene[0]}
    for edit in ("cat2dog", "day2night"):
        student = demo.add("Pix2PixZeroDemoDistilled", edit=edit)
        row[edit] = demo.add("ImageUpscaleWithModel", upscale_model=student[0], image=demo.scene[0])[0]
    return demo, row


@recipe
def feature_pca() -> Picture:
    demo = Demo()
    row = {"source": demo.scene[0]}
    for kind in ("residual features", "queries", "keys"):
        row[kind] = demo.add(
            "Pix2PixZeroFeaturePCA", model=demo.model[0], inversion=demo.inversion[0], features=kind, percent=0.6
        )[0]
    return demo, row


@recipe
def metrics() -> Picture:
    demo = Demo()
    return demo, {
        "source": demo.scene[0],
        "edited": demo.edited(),
        "mask": demo.mask_picture(demo.scene[1]),
    }


@recipe
def noise_report() -> Picture:
    demo = Demo()
    plain = demo.invert(regularization_steps=0)
    report = demo.add(
        "Pix2PixZeroNoiseReport",
        noise=demo.inversion[1],
        inversion=demo.inversion[0],
        compare_with=plain[1],
    )
    return demo, {"": report[0]}


@recipe
def attention_heatmap() -> Picture:
    demo = Demo()
    heat = demo.add(
        "Pix2PixZeroAttentionHeatmap",
        model=demo.model[0],
        inversion=demo.inversion[0],
        clip=demo.model[1],
        caption=demo.caption[0],
        words="cat, summer",
        image=demo.scene[0],
    )
    row = {
        word: demo.add("ImageFromBatch", image=heat[0], batch_index=index, length=1)[0]
        for index, word in enumerate(("cat", "summer"))
    }
    return demo, {"source": demo.scene[0], **row}


@recipe
def strengths() -> Picture:
    demo = Demo()
    numbers = demo.add("Pix2PixZeroStrengths")
    edited = demo.edited(demo.apply(strength=numbers[0]))
    return demo, {"": demo.add("Pix2PixZeroStrip", images=edited, labels=numbers[1], source=demo.scene[0])[0]}


def draw_pictures(names: list[str]) -> None:
    """Run the recipes, all or those named, and write their pictures.

    Raises DevError: there is no such recipe, or its graph failed.
    """
    if unknown := set(names) - set(RECIPES):
        raise DevError(f"There is no picture {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}.")
    PICTURES.mkdir(parents=True, exist_ok=True)
    with Server(running(), options=["--disable-api-nodes"], variables=one_thread()) as server:
        info = server.object_info()
        for name in names or RECIPES:
            demo, row = RECIPES[name]()
            shown = {label: demo.add("PreviewImage", images=output).key for label, output in row.items()}
            told = demo.add("PreviewAny", source=demo.caption[0]).key
            try:
                outputs = server.run(demo.api(info), patience=PATIENCE)
            except GraphError as error:
                raise DevError(f"{name}: {error}") from None
            pictures = {
                label if number == 0 else f"{label} {number + 1}": Image.open(io.BytesIO(server.view(entry)))
                for label, key in shown.items()
                for number, entry in enumerate(outputs[key]["images"])
            }
            sheet = pictures[""].convert("RGB") if "" in pictures else _in_a_row(pictures)
            width = WIDEST if "" in pictures else min(WIDEST, TILE * len(pictures))
            sheet.thumbnail((width, width), Image.Resampling.LANCZOS)
            path = PICTURES / f"{name}.jpg"
            sheet.save(path, quality=QUALITY, optimize=True)
            print(f"{name}: {path.stat().st_size / 1000:.0f} kB; caption: {outputs[told]['text']}", flush=True)


def _in_a_row(pictures: dict[str, Image.Image]) -> Image.Image:
    strip = picture_strip([as_image(picture)[None] for picture in pictures.values()], list(pictures))
    return as_pillow(strip[0])
