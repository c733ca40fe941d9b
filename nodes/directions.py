"""Step 3 of the workflow: find the edit direction between two concepts and add it to the caption's conditioning."""

from comfy_api.latest import io

from ..editing.directions import ALIGNMENTS, combine
from ..editing.sentences import PAIRS, natural_pairs, read_sentence_lists
from ..host.messages import UNLEARNED
from ..host.running import warn
from ..host.text.exchange import exchange_conditioning
from ..host.text.text_encoding import find_direction, move_conditioning, unlearned_words
from .sockets import CATEGORY, Direction


def _alignment_input(advice: str) -> io.Combo.Input:
    return io.Combo.Input(
        "alignment",
        options=list(ALIGNMENTS),
        default=ALIGNMENTS[0],
        optional=True,
        tooltip="positions: compares two sentences token by token, as the paper does. words: compares each word with "
        "itself. On the demo model, adding something (cat to cat wearing glasses) is then complete at strength 1, where "
        "positions takes 1.25 to 1.5; with the right strength both are equally good, and other edits are alike. "
        f"{advice}",
    )


class Pix2PixZeroEditDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroEditDirection",
            display_name="Edit Direction",
            category=CATEGORY,
            description="Find what has to change in a caption's encoding to turn the source concept into the target "
            "concept, by encoding hundreds of sentences about both.",
            search_aliases=["concept direction", "text direction", "embedding direction", "cat to dog"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP that also encodes the caption."),
                io.String.Input(
                    "source",
                    default="cat",
                    tooltip="What the picture shows now. Name only what changes: cat, summer, photo, wooden. "
                    "To add something, name what it is added to: cat."
                    " At most 300 letters.",
                ),
                io.String.Input(
                    "target",
                    default="dog",
                    tooltip="What it should become: dog, winter, oil painting, golden, cat wearing glasses. The closer "
                    "in meaning to the source, the cleaner the edit."
                    " At most 300 letters.",
                ),
                _alignment_input("Choose words if something added does not show."),
            ],
            outputs=[Direction.Output(display_name="direction", tooltip="From source to target, for Apply Direction.")],
        )

    @classmethod
    def execute(cls, clip, source: str, target: str, alignment: str = ALIGNMENTS[0]) -> io.NodeOutput:
        source_sentences, target_sentences = natural_pairs(source, target, PAIRS, seed=0)
        direction = find_direction(clip, source_sentences, target_sentences, source, target, alignment)
        if unlearned := unlearned_words(clip, f"{source} {target}"):
            warn(UNLEARNED.format(words=", ".join(unlearned)))
        return io.NodeOutput(direction)


class Pix2PixZeroEditDirectionFromSentences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroEditDirectionFromSentences",
            display_name="Edit Direction from Sentences",
            category=CATEGORY,
            description="Find the edit direction between two lists of sentences of your own, or from any node that "
            "writes text.",
            search_aliases=["custom direction", "prompt direction", "sentences"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP that also encodes the caption."),
                io.String.Input(
                    "source_sentences",
                    multiline=True,
                    tooltip="One sentence per line about what the picture shows now. Blank lines, bullets and numbering "
                    "are ignored. Add more if the edit changes things it should not."
                    " At most 20000 lines.",
                ),
                io.String.Input(
                    "target_sentences",
                    multiline=True,
                    tooltip="One sentence per line about what it should become. The same sentences with only the "
                    "concept exchanged work best."
                    " At most 20000 lines.",
                ),
                _alignment_input("words compares line by line, so write as many of both."),
            ],
            outputs=[Direction.Output(display_name="direction", tooltip="From source to target, for Apply Direction.")],
        )

    @classmethod
    def execute(
        cls, clip, source_sentences: str, target_sentences: str, alignment: str = ALIGNMENTS[0]
    ) -> io.NodeOutput:
        source, target = read_sentence_lists(source_sentences, target_sentences)
        return io.NodeOutput(find_direction(clip, source, target, source[0], target[0], alignment))


class Pix2PixZeroCombineDirections(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroCombineDirections",
            display_name="Combine Directions",
            category=CATEGORY,
            description="Add two edit directions to make both edits at once, for example cat to dog and day to night.",
            search_aliases=["merge directions", "add directions", "mix directions"],
            inputs=[
                Direction.Input("direction_a", tooltip="The first edit."),
                Direction.Input("direction_b", tooltip="The second edit, found with the same CLIP."),
                io.Float.Input(
                    "weight_a",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Raise it if the first edit is too weak beside the other. Below 0 it is reversed.",
                ),
                io.Float.Input(
                    "weight_b",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Raise it if the second edit is too weak beside the other. Below 0 it is reversed.",
                ),
            ],
            outputs=[Direction.Output(display_name="direction", tooltip="Both edits in one.")],
        )

    @classmethod
    def execute(cls, direction_a, direction_b, weight_a: float = 1.0, weight_b: float = 1.0) -> io.NodeOutput:
        return io.NodeOutput(combine(direction_a, direction_b, weight_a, weight_b))


class Pix2PixZeroApplyDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroApplyDirection",
            display_name="Apply Direction",
            category=CATEGORY,
            description="Add an edit direction to the encoded caption. Use the result as the positive of the sampler and "
            "the unchanged caption as its negative.",
            search_aliases=["edit conditioning", "add direction", "move conditioning"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The encoded caption of the picture."),
                Direction.Input(
                    "direction", tooltip="From Edit Direction, made with the CLIP that encoded the caption."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of the edit. Raise it in steps of 0.25 if the picture does not change enough; "
                    "lower it if more changes than should. 0 edits nothing, below 0 edits the other way.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Connect it, with caption, for models with T5 or a language model as their text encoder (SD 3.5, "
                    "Flux, Qwen-Image): the caption is encoded again with the direction's words exchanged. At strength 1 "
                    "that is the exchanged caption itself; lower strength if the edit is too strong.",
                ),
                io.String.Input(
                    "caption",
                    optional=True,
                    force_input=True,
                    tooltip="The text of the caption that conditioning holds. It has to name the direction's source.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The edited caption: the sampler's positive."
                )
            ],
        )

    @classmethod
    def execute(cls, conditioning, direction, strength: float = 1.0, clip=None, caption=None) -> io.NodeOutput:
        if (clip is None) != (caption is None):
            missing, given = ("clip", "caption") if clip is None else ("caption", "clip")
            raise ValueError(f"{missing}: connect it together with {given}, or neither.")
        if clip is None:
            return io.NodeOutput(move_conditioning(conditioning, direction, strength))
        return io.NodeOutput(exchange_conditioning(conditioning, direction, strength, clip, caption))


NODES: list[type[io.ComfyNode]] = [
    Pix2PixZeroEditDirection,
    Pix2PixZeroEditDirectionFromSentences,
    Pix2PixZeroCombineDirections,
    Pix2PixZeroApplyDirection,
]
