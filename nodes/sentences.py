"""Sentences about a concept, to look at, edit and average into a direction."""

from comfy_api.latest import io

from ..editing.sentences import concept_sentences
from .sockets import CATEGORY, seed_input


class Pix2PixZeroSentences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Pix2PixZeroSentences",
            display_name="Sentences about a Concept",
            category=CATEGORY,
            description="Write sentences about a concept, one per line: from the bundled bank where there is one for the "
            "concept, from a grammar otherwise. Read or edit them and feed two of these nodes to Edit Direction from "
            "Sentences. Edit Direction needs none of this: it pairs its own sentences, which makes cleaner edits.",
            search_aliases=["prompts", "captions", "sentence bank", "concept"],
            inputs=[
                io.String.Input(
                    "concept",
                    default="cat",
                    tooltip="What the sentences are about: cat, wooden, winter, night, oil painting, dog wearing a hat."
                    " At most 300 letters.",
                ),
                io.Int.Input(
                    "count",
                    default=256,
                    min=1,
                    max=10000,
                    tooltip="How many sentences. More make the direction steadier and encoding slower; above 1000 "
                    "nothing is gained.",
                ),
                seed_input(tooltip="Picks the sentences. Use the same seed for source and target."),
            ],
            outputs=[io.String.Output(display_name="sentences", tooltip="One sentence per line.")],
        )

    @classmethod
    def execute(cls, concept: str, count: int, seed: int) -> io.NodeOutput:
        return io.NodeOutput("\n".join(concept_sentences(concept, count, seed)))


NODES: list[type[io.ComfyNode]] = [Pix2PixZeroSentences]
