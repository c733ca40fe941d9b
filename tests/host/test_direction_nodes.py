"""The direction nodes as the executor runs them."""

import comfy.model_management
import pytest
import torch
from pix2pix_zero.demo_model.loader import load_demo_model
from pix2pix_zero.devtools.graphs import EDITS
from pix2pix_zero.host import running
from pix2pix_zero.nodes import NODES as ALL_NODES
from pix2pix_zero.nodes import direction_files as file_nodes
from pix2pix_zero.nodes import directions as nodes
from pix2pix_zero.nodes.sentences import Pix2PixZeroSentences
from tiny_clip import encode, tiny_clip

from nodes import CLIPSetLastLayer, ConditioningCombine, ConditioningConcat, ConditioningZeroOut

CAPTION = "a photo of an orange cat in summer"


class Unused:
    """A CLIP that must not be asked."""

    def tokenize(self, text):
        raise AssertionError("the encoder runs")


@pytest.fixture(params=["sd1", "sdxl"])
def clip(request):
    with torch.inference_mode():
        return tiny_clip(request.param)


@pytest.fixture
def direction(clip, run_node):
    lines = {"source_sentences": "a cat\na black cat", "target_sentences": "a dog\na black dog"}
    return run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=clip, **lines)[0]


def bits(conditioning):
    return [t.clone() for cond, options in conditioning for t in (cond, *options.values()) if torch.is_tensor(t)]


def test_the_public_contract():
    expected = {
        "Pix2PixZeroSentences": (["concept", "count", "seed"], ["STRING"]),
        "Pix2PixZeroEditDirection": (["clip", "source", "target", "alignment"], ["P2PZ_DIRECTION"]),
        "Pix2PixZeroEditDirectionFromSentences": (
            ["clip", "source_sentences", "target_sentences", "alignment"],
            ["P2PZ_DIRECTION"],
        ),
        "Pix2PixZeroCombineDirections": (["direction_a", "direction_b", "weight_a", "weight_b"], ["P2PZ_DIRECTION"]),
        "Pix2PixZeroSaveDirection": (["direction", "filename_prefix"], []),
        "Pix2PixZeroLoadDirection": (["direction_name"], ["P2PZ_DIRECTION"]),
        "Pix2PixZeroApplyDirection": (
            ["conditioning", "direction", "strength", "clip", "caption"],
            ["CONDITIONING"],
        ),
    }
    for node in [*nodes.NODES, *file_nodes.NODES, Pix2PixZeroSentences]:
        schema = node.GET_SCHEMA()
        inputs, outputs = expected.pop(schema.node_id)
        assert [i.id for i in schema.inputs] == inputs
        assert [o.io_type for o in schema.outputs] == outputs
        assert schema.category == "pix2pix-zero"
        assert all(i.tooltip for i in schema.inputs)
    assert not expected


def test_every_seed_stays_as_it_is_and_is_named_as_in_core():
    """A drawn seed would run all that follows at every queue. A generated picture is drawn anew, a folder's are counted."""
    seeds = {}
    for node in ALL_NODES:
        given = node.INPUT_TYPES()
        for name, (_, options) in {**given.get("required", {}), **given.get("optional", {})}.items():
            if name == "seed" or "control_after_generate" in options:
                seeds[node.__name__, name] = options.get("control_after_generate")
    assert len(seeds) >= 5
    others = {key for key, value in seeds.items() if value != "fixed"}
    assert others <= {("Pix2PixZeroReference", "seed"), ("Pix2PixZeroFolderPicture", "index")}, seeds


def test_sentences_are_one_per_line(run_node):
    (text,) = run_node(Pix2PixZeroSentences, concept="zebra", count=20, seed=3)
    assert len(text.split("\n")) == 20 and all("zebra" in line.lower() for line in text.split("\n"))
    assert (text,) == run_node(Pix2PixZeroSentences, concept="zebra", count=20, seed=3)
    assert (text,) != run_node(Pix2PixZeroSentences, concept="zebra", count=20, seed=4)


def test_two_concepts_give_a_direction_that_moves_the_caption_towards_the_target(clip, run_node):
    (direction,) = run_node(nodes.Pix2PixZeroEditDirection, clip=clip, source="cat", target="dog")
    (moved,) = run_node(nodes.Pix2PixZeroApplyDirection, conditioning=encode(clip, CAPTION), direction=direction)
    cat, dog = encode(clip, CAPTION), encode(clip, CAPTION.replace("cat", "dog"))
    (moved, options), (cat, cat_options), (dog, dog_options) = moved[0], cat[0], dog[0]
    assert (moved - dog).norm() < (cat - dog).norm()
    pooled = "pooled_output"
    assert (options[pooled] - dog_options[pooled]).norm() < (cat_options[pooled] - dog_options[pooled]).norm()
    assert direction.source == "cat" and direction.target == "dog" and direction.count >= 200


def test_applying_adds_the_direction_to_every_entry_and_output_and_leaves_the_input_alone(clip, direction, run_node):
    with torch.inference_mode():
        long = ConditioningConcat().concat(encode(clip, CAPTION), encode(clip, "in the snow"))[0]
        both = ConditioningCombine().combine(encode(clip, CAPTION), long)[0]
    both[1][1]["strength"] = 0.5
    before = bits(both)
    (moved,) = run_node(nodes.Pix2PixZeroApplyDirection, conditioning=both, direction=direction, strength=-1.5)
    assert all(torch.equal(a, b) for a, b in zip(bits(both), before, strict=True))
    assert [entry[0].shape[1] for entry in moved] == [77, 154]
    for (cond, options), (new_cond, new_options) in zip(both, moved, strict=True):
        chunks = cond.shape[1] // 77
        shift = torch.cat([direction.tensors["cond"].double()] * chunks, 1)
        assert torch.allclose(new_cond.double(), cond.double() - 1.5 * shift, atol=1e-5)
        pooled = options["pooled_output"].double() - 1.5 * direction.tensors["pooled_output"].double()
        assert torch.allclose(new_options["pooled_output"].double(), pooled, atol=1e-5)
    assert moved[1][1]["strength"] == 0.5 and "strength" not in moved[0][1]


def test_strength_zero_changes_no_bit(clip, direction, run_node):
    conditioning = encode(clip, CAPTION)
    (same,) = run_node(nodes.Pix2PixZeroApplyDirection, conditioning=conditioning, direction=direction, strength=0.0)
    assert all(torch.equal(a, b) for a, b in zip(bits(same), bits(conditioning), strict=True))


def test_a_conditioning_without_pooled_output_is_moved_too(clip, direction, run_node):
    cond = encode(clip, CAPTION)[0][0]
    for options in ({}, {"pooled_output": None}):
        (moved,) = run_node(nodes.Pix2PixZeroApplyDirection, conditioning=[[cond, options]], direction=direction)
        assert moved[0][1] == options and not torch.equal(moved[0][0], cond)


def test_a_zeroed_conditioning_is_accepted(clip, direction, run_node):
    with torch.inference_mode():
        zero = ConditioningZeroOut().zero_out(encode(clip, CAPTION))[0]
    (moved,) = run_node(nodes.Pix2PixZeroApplyDirection, conditioning=zero, direction=direction, strength=1.0)
    assert torch.allclose(moved[0][0], direction.tensors["cond"])


def test_a_caption_from_another_text_encoder_is_refused(clip, direction, run_node):
    kind = "sd1" if "SD1" in direction.encoder else "sdxl"
    with torch.inference_mode():
        others = [tiny_clip(kind, seed=1), tiny_clip({"sd1": "sdxl", "sdxl": "sd1"}[kind])]
        others.append(CLIPSetLastLayer().set_last_layer(clip, -3)[0])
    for other in others:
        with pytest.raises(ValueError, match="^conditioning: .*same CLIP|^conditioning: .*with the CLIP"):
            run_node(
                nodes.Pix2PixZeroApplyDirection, conditioning=encode(other, CAPTION), direction=direction, strength=1.0
            )


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_directions_of_one_encoder_in_two_precisions_combine(clip, direction, run_node, precision):
    """Its name is made of its weights, which a rougher precision rounds."""
    with torch.inference_mode():
        rounded = tiny_clip("sd1" if "SD1" in direction.encoder else "sdxl")
        for weight in rounded.cond_stage_model.parameters():
            weight.copy_(weight.to(precision))
    lines = {"source_sentences": "a cat", "target_sentences": "a dog"}
    (again,) = run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=rounded, **lines)
    assert again.encoder != direction.encoder
    (both,) = run_node(nodes.Pix2PixZeroCombineDirections, direction_a=direction, direction_b=again)
    assert torch.allclose(both.tensors["cond"], direction.tensors["cond"] + again.tensors["cond"])


def test_combining_two_encoders_is_refused(clip, direction, run_node):
    kind = "sd1" if "SD1" in direction.encoder else "sdxl"
    with torch.inference_mode():
        other = tiny_clip(kind, seed=1)
    lines = {"source_sentences": "a cat", "target_sentences": "a dog"}
    (foreign,) = run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=other, **lines)
    with pytest.raises(ValueError, match="direction_a and direction_b"):
        run_node(nodes.Pix2PixZeroCombineDirections, direction_a=direction, direction_b=foreign)
    (double,) = run_node(nodes.Pix2PixZeroCombineDirections, direction_a=direction, direction_b=direction, weight_b=1.0)
    assert torch.allclose(double.tensors["cond"], 2 * direction.tensors["cond"])


@pytest.mark.parametrize(
    ("source", "target", "socket"), [("", "dog", "source"), ("cat", " ", "target"), ("cat", "the cat", "target")]
)
def test_bad_concepts_are_refused_before_the_encoder_runs(source, target, socket, run_node):
    with pytest.raises(ValueError, match=f"^{socket}: "):
        run_node(nodes.Pix2PixZeroEditDirection, clip=Unused(), source=source, target=target)


@pytest.mark.parametrize("concept", ["cat " * 250_000, "\ud83d cat", None, 3])
def test_a_concept_is_a_text_of_bounded_length(concept, run_node):
    words = "at most|half a character|is not a text"
    with pytest.raises(ValueError, match=f"^source: .*({words})"):
        run_node(nodes.Pix2PixZeroEditDirection, clip=Unused(), source=concept, target="dog")
    with pytest.raises(ValueError, match=f"^concept: .*({words})"):
        run_node(Pix2PixZeroSentences, concept=concept, count=3, seed=0)


def test_sentences_have_a_bounded_length_and_number(clip, run_node):
    node = nodes.Pix2PixZeroEditDirectionFromSentences
    for lines, words in (
        ("cat " * 10_000, "sentence 1: it has .* letters"),
        ("a cat\n\udc00", "half a character"),
        ("a\n" * 30_000, "30000 sentences"),
    ):
        with pytest.raises(ValueError, match=f"^source_sentences: .*{words}"):
            run_node(node, clip=clip, source_sentences=lines, target_sentences="a dog")
    with pytest.raises(ValueError, match="^source_sentences: it has 3000 words, at most 2000"):
        run_node(node, clip=clip, source_sentences="a " * 3000, target_sentences="a dog", alignment="words")


@pytest.mark.parametrize("alignment", ["positions", "words"])
def test_a_file_without_a_text_encoder_is_named(alignment, run_node):
    words = "^clip: there is none.*checkpoint loader"
    with pytest.raises(ValueError, match=words):
        run_node(nodes.Pix2PixZeroEditDirection, clip=None, source="cat", target="dog", alignment=alignment)
    lines = {"source_sentences": "a cat", "target_sentences": "a dog"}
    with pytest.raises(ValueError, match=words):
        run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=None, alignment=alignment, **lines)


@pytest.mark.parametrize("alignment", ["positions", "words"])
def test_cancelling_ends_it_before_the_encoder_runs(clip, alignment, run_node, monkeypatch):
    lines = {"source_sentences": "a cat\n" * 5000, "target_sentences": "a dog\n" * 5000}
    counted, tokenize = [], clip.tokenize

    def press_cancel(text, **options):
        counted.append(text)
        if len(counted) == 10:
            comfy.model_management.interrupt_current_processing(True)
        return tokenize(text, **options)

    monkeypatch.setattr(clip, "tokenize", press_cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=clip, alignment=alignment, **lines)
    assert len(counted) <= 12


@pytest.mark.parametrize(
    ("conditioning", "words"),
    [
        ([], "it is empty"),
        ([[None, {}]], "no text .* but NoneType"),
        ([[torch.zeros(77, 32), {}]], r"no text .* but shape \[77, 32\]"),
        ([[torch.zeros(1, 0, 32), {}]], r"no text .* but shape \[1, 0, 32\]"),
        ([[torch.full((1, 77, 8), torch.nan), {}]], "NaN or infinite"),
    ],
)
def test_a_conditioning_without_text_is_refused_in_words(conditioning, words, plain_direction, run_node):
    with pytest.raises(ValueError, match=f"^conditioning: it (is|holds).*{words.removeprefix('it is ')}"):
        run_node(nodes.Pix2PixZeroApplyDirection, conditioning=conditioning, direction=plain_direction)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(number, plain_direction, run_node):
    both = {"direction_a": plain_direction, "direction_b": plain_direction}
    for name in ("weight_a", "weight_b"):
        with pytest.raises(ValueError, match=f"^{name}: .* is not a number"):
            run_node(nodes.Pix2PixZeroCombineDirections, **both, **{name: number})
    text = [[torch.zeros(1, 77, 8), {}]]
    with pytest.raises(ValueError, match="^strength: .* is not a number"):
        run_node(nodes.Pix2PixZeroApplyDirection, conditioning=text, direction=plain_direction, strength=number)


@pytest.mark.parametrize(
    ("source", "target", "socket"),
    [("\n", "a dog", "source_sentences"), ("a cat", "", "target_sentences"), ("a cat", "a cat", "target_sentences")],
)
def test_bad_sentence_lists_are_refused_before_the_encoder_runs(source, target, socket, run_node):
    with pytest.raises(ValueError, match=f"^{socket}: "):
        lines = {"source_sentences": source, "target_sentences": target}
        run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=Unused(), **lines)


def test_words_that_the_demo_has_not_learned_are_said_on_the_node(run_node, monkeypatch):
    with torch.inference_mode():
        _, demo, _ = load_demo_model()
    shown = []
    monkeypatch.setattr(running, "show", shown.append)
    monkeypatch.setattr(nodes, "PAIRS", 1)

    def said(clip, source, target):
        shown.clear()
        run_node(nodes.Pix2PixZeroEditDirection, clip=clip, source=source, target=target)
        return [text for text in shown if "not learned" in text]

    for edit in EDITS.values():
        assert said(demo, edit.source, edit.target) == []
    (text,) = said(demo, "cat", "wooden cat wearing a hat")
    assert "not learned wooden, hat." in text
    with torch.inference_mode():
        assert said(tiny_clip("sd1"), "cat", "cat wearing a hat") == [], "a checkpoint's encoder cannot tell"
