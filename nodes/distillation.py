"""Distil an edit into a small network that runs in stock nodes."""

from comfy_api.latest import io

from ..host.distilled.demo_students import demo_student, demo_student_names
from .sockets import CATEGORY, seed_input

SIZES = ["small", "large"]


class Pix2PixZeroDistill(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroDistill",
            display_name="Distill Edit",
            category=CATEGORY,
            description="Trains a small network to make one edit in a single pass, from pairs of Save Edit Pair. It is "
            "written to models/upscale_models/pix2pix_zero, for Load Upscale Model and Upscale Image (using Model).",
            is_output_node=True,
            search_aliases=["train", "student", "pix2pix", "conditional gan", "fast edit", "real-time"],
            inputs=[
                io.String.Input(
                    "dataset", default="my_edit", tooltip="The name of a data set that Save Edit Pair made."
                ),
                io.String.Input(
                    "name",
                    default="my_edit",
                    tooltip="The file's name without its number. Earlier files are never overwritten."
                    " At most 100 letters.",
                ),
                io.Combo.Input(
                    "size",
                    options=SIZES,
                    default="small",
                    tooltip="small: a DRUNet of 1.5 MB, quick, for pictures of any size. large: a NAFNet of 34 MB for "
                    "photographs; it needs a GPU to train, and is right only at the size of its pairs.",
                ),
                io.Int.Input(
                    "steps",
                    default=3000,
                    min=1,
                    max=1000000,
                    tooltip="Training steps. Raise while the error on held-out pairs in the report still falls; 300 are "
                    "enough to see whether anything is learnt.",
                ),
                io.Int.Input(
                    "batch",
                    default=8,
                    min=1,
                    max=256,
                    tooltip="Pairs in a step. Raise on a GPU with room, to 16 or more; lower if memory runs out.",
                ),
                io.Int.Input(
                    "crop",
                    default=256,
                    min=32,
                    max=2048,
                    step=8,
                    tooltip="Side of the squares that are cut out of the pairs, in pixels; smaller pictures are taken "
                    "whole. Raise if the student must see a whole subject, lower if memory runs out.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.002,
                    min=0.00001,
                    max=0.1,
                    step=0.00001,
                    round=False,
                    tooltip="How far each step goes. Lower it if the loss jumps or the training stops with NaN.",
                ),
                seed_input(tooltip="The random start and order of the training. Another seed gives a similar student."),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    tooltip="On: goes on with a training of this name that was cancelled. Off: begins anew and drops it.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The VAE of the model that made the edits: then the error of its features counts as well. In short "
                    "trainings on the demo that made the picture no better, and a step 1.3 times as long. Leave it open at "
                    "first; connect it if textures come out wrong.",
                ),
                io.Float.Input(
                    "sharpness",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=False,
                    optional=True,
                    tooltip="Above 0 an adversary judges the pictures as well (a conditional GAN), from three tenths of the "
                    "steps on. Raise it to 0.2 if textures come out smooth; lower it if false details appear. On the demo, 0.2 "
                    "made details 4 % stronger, the error 2 % larger and a step 1.8 times as long; 0.5 made the error "
                    "9 % larger.",
                ),
                io.String.Input(
                    "description",
                    default="",
                    optional=True,
                    tooltip="What the edit does and which model made it, such as: cat to dog, SD 1.5. It is kept in the file "
                    "for whoever gets it.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that made the edits, with its VAE: then what the first blocks of its UNet see in the "
                    "picture counts too. Try it where the VAE alone leaves textures wrong; training gets slower again.",
                ),
            ],
            outputs=[
                io.UpscaleModel.Output(
                    display_name="upscale_model",
                    tooltip="The edit, for Upscale Image (using Model). It enlarges nothing.",
                ),
                io.Image.Output(
                    display_name="strip",
                    tooltip="Pairs that were not trained on: source, edit, student; the worst framed.",
                ),
                io.String.Output(display_name="report", tooltip="The error on those pairs, and what was trained."),
                io.Custom("LOSS_MAP").Output(display_name="loss", tooltip="For Plot Loss Graph."),
            ],
        )

    @classmethod
    def execute(
        cls,
        dataset,
        name,
        size,
        steps,
        batch,
        crop,
        learning_rate,
        seed,
        resume,
        vae=None,
        sharpness=0.0,
        description="",
        model=None,
    ) -> io.NodeOutput:
        from ..distillation.learning import Settings
        from ..host.distilled.run import Wish, distill

        length = {"steps": steps, "batch": batch, "crop": crop}
        settings = Settings(**length, learning_rate=learning_rate, seed=seed, sharpness=sharpness)
        made = distill(Wish(dataset, name, size, settings, resume, description), vae, model)
        return io.NodeOutput(made.model, made.strip, made.report, {"loss": made.losses}, ui={"text": [made.report]})


class Pix2PixZeroDemoDistilled(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroDemoDistilled",
            display_name="Load Demo Distilled Edit",
            category=CATEGORY,
            description="A student that ships with this pack: it makes one edit of the demo scenes in a single pass, about a "
            "hundred times faster than the edit it learnt.",
            search_aliases=["student", "distilled", "fast edit", "demo upscale model"],
            inputs=[
                io.Combo.Input(
                    "edit",
                    options=demo_student_names(),
                    tooltip="cat2dog changes the animal, day2night the whole picture. They know demo scenes only.",
                )
            ],
            outputs=[
                io.UpscaleModel.Output(
                    display_name="upscale_model",
                    tooltip="The edit, for Upscale Image (using Model). It enlarges nothing.",
                )
            ],
        )

    @classmethod
    def execute(cls, edit: str) -> io.NodeOutput:
        return io.NodeOutput(demo_student(edit))


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroDistill, Pix2PixZeroDemoDistilled]
