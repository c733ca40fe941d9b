"""The embedded demo model and the scenes it knows: a first run without any download."""

import torch
from comfy_api.latest import io

from ..demo_model.scene import FURS, POSES, SIZE, STYLES, SUBJECTS, further_away, sample_scene
from ..demo_model.scene_captions import caption
from ..demo_model.scene_renders import render, subject_mask
from ..editing.inputs import interruptible
from .sockets import CATEGORY, seed_input

RANDOM = "random"
MOST_PIXELS = 4096 * SIZE**2
OBJECTIVES = DIFFUSION, FLOW, TRANSFORMER = ("diffusion", "flow", "flow transformer")


class Pix2PixZeroDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroDemoModel",
            display_name="Load Demo Model (Pix2Pix-Zero)",
            category=CATEGORY,
            description="A tiny Stable Diffusion that ships with this pack: it draws 128x128 scenes with a cat, dog, horse or "
            "zebra. Use it to try edits without downloading a checkpoint; load a real checkpoint for photographs.",
            search_aliases=["demo checkpoint", "example model", "tiny stable diffusion"],
            inputs=[
                io.Combo.Input(
                    "objective",
                    options=list(OBJECTIVES),
                    default=DIFFUSION,
                    optional=True,
                    advanced=True,
                    tooltip="diffusion: as Stable Diffusion is trained. flow: the same network as a rectified flow, to try "
                    "edits of flow models. It draws the same pictures. flow transformer: another network, SD 3's in small, "
                    "to try what diffusion transformers do.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The UNet or transformer, as from any checkpoint."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder, for captions and directions."),
                io.Vae.Output(display_name="vae", tooltip="Takes pictures to latents and back."),
            ],
        )

    @classmethod
    def execute(cls, objective=DIFFUSION) -> io.NodeOutput:
        from ..demo_model.flow_view import as_flow
        from ..demo_model.loader import load_demo_model
        from ..demo_model.transformer import load_transformer

        model, clip, vae = load_demo_model()
        if objective == FLOW:
            model = as_flow(model)
        elif objective == TRANSFORMER:
            model = load_transformer()
        return io.NodeOutput(model, clip, vae)


class Pix2PixZeroDemoScene(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def combo(name: str, options: list[str], default: str, tooltip: str) -> io.Combo.Input:
            return io.Combo.Input(name, options=[RANDOM, *options], default=default, tooltip=tooltip)

        return io.Schema(
            node_id="Pix2PixZeroDemoScene",
            display_name="Demo Scene (Pix2Pix-Zero)",
            category=CATEGORY,
            description="Draws a captioned 128x128 scene for the demo model. The same seed with one setting changed is the exact "
            "result an edit should give.",
            search_aliases=["example picture", "test image", "cat picture"],
            inputs=[
                io.Combo.Input(
                    "subject",
                    options=list(SUBJECTS),
                    default="cat",
                    tooltip="The animal. Change only this to see what a perfect cat to dog edit looks like.",
                ),
                seed_input(tooltip="Picks the pose, place, background and everything set to random."),
                combo("fur", list(FURS), RANDOM, "Colour of the coat. Zebras are always striped."),
                combo("glasses", ["yes", "no"], "no", "Whether the animal wears glasses."),
                combo("time_of_day", ["day", "night"], "day", "Day is easier to look at, night the harder edit."),
                combo("season", ["summer", "winter"], RANDOM, "Green ground or snow."),
                combo("style", list(STYLES), "flat", "How it is drawn. Flat is what the model draws best."),
                combo("pose", list(POSES), RANDOM, "Sitting animals are the easier edit."),
                io.Int.Input(
                    "side",
                    default=SIZE,
                    min=SIZE,
                    max=8 * SIZE,
                    step=SIZE,
                    optional=True,
                    advanced=True,
                    tooltip="Side of the picture. The demo model draws 128: a larger one wants Crop to Edit.",
                ),
                io.Float.Input(
                    "distance",
                    default=1.0,
                    min=1.0,
                    max=8.0,
                    step=0.5,
                    round=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="How far away the animal is. At 3 it is a third as large: a small subject in a large picture, "
                    "for Crop to Edit and Paste Edit.",
                ),
                io.Int.Input(
                    "count",
                    default=1,
                    min=1,
                    max=4096,
                    optional=True,
                    force_input=True,
                    tooltip="How many scenes, of this seed and those after it; one if nothing is connected. For a batch, such as "
                    "pairs to distil an edit from."
                    " All scenes together may have at most 64 million pixels.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image", tooltip="The scene, 128x128 unless side says more; a batch of count scenes."
                ),
                io.Mask.Output(display_name="mask", tooltip="Where the animal is."),
                io.String.Output(
                    display_name="caption", tooltip="What the picture shows, in one sentence; a line for each scene."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, subject, seed, fur, glasses, time_of_day, season, style, pose, side=SIZE, distance=1.0, count=1
    ) -> io.NodeOutput:
        asked = {
            "fur": fur,
            "glasses": glasses if glasses == RANDOM else glasses == "yes",
            "night": time_of_day if time_of_day == RANDOM else time_of_day == "night",
            "winter": season if season == RANDOM else season == "winter",
            "style": style,
            "pose": pose,
        }
        if count * side**2 > MOST_PIXELS:
            raise ValueError(
                f"count: {count} scenes of {side}x{side} are more than {MOST_PIXELS // 2**20} million pixels. Take at most "
                f"{MOST_PIXELS // side**2} of them, or a smaller side."
            )
        fixed = {name: value for name, value in asked.items() if value != RANDOM}
        scenes = [
            further_away(sample_scene(seed + number, subject=subject, **fixed), distance) for number in range(count)
        ]
        image = torch.stack([torch.from_numpy(render(scene, side)) for scene in interruptible(scenes)]).float() / 255
        mask = torch.stack([torch.from_numpy(subject_mask(scene, side)) for scene in interruptible(scenes)]).float()
        return io.NodeOutput(image, mask, "\n".join(caption(scene) for scene in scenes))


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroDemoModel, Pix2PixZeroDemoScene]
