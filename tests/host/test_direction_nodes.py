"""The direction nodes as the executor runs them, and directions in files."""

import os
from dataclasses import replace

import comfy.model_management
import folder_paths
import pytest
import torch
from pix2pix_zero.devtools.graphs import Graph
from pix2pix_zero.devtools.server import GraphError
from pix2pix_zero.editing.directions import EditDirection
from pix2pix_zero.editing.sentences import paired_sentences
from pix2pix_zero.host.text import direction_files, text_encoding
from pix2pix_zero.nodes import direction_files as file_nodes
from pix2pix_zero.nodes import directions as nodes
from pix2pix_zero.nodes.sentences import Pix2PixZeroSentences
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_clip import tiny_clip

from nodes import CLIPSetLastLayer, CLIPTextEncode, ConditioningCombine, ConditioningConcat, ConditioningZeroOut

CAPTION = "a photo of an orange cat in summer"


@pytest.fixture(params=["sd1", "sdxl"])
def clip(request):
    with torch.inference_mode():
        return tiny_clip(request.param)


@pytest.fixture
def direction(clip, run_node):
    lines = {"source_sentences": "a cat\na black cat", "target_sentences": "a dog\na black dog"}
    return run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=clip, **lines)[0]


@pytest.fixture
def plain_direction():
    tensors = {"cond": torch.randn(1, 77, 8), "pooled_output": torch.randn(1, 4)}
    return EditDirection(tensors, "SD1Model-0123-layer-1", "cat", "dog", 256, torch.randn(8))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, direction_files.FOLDER, ([str(tmp_path / "directions")], {".safetensors"})
    )
    return tmp_path / "directions"


def encode(clip, text):
    with torch.inference_mode():
        return CLIPTextEncode().encode(clip, text)[0]


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
        "Pix2PixZeroApplyDirection": (["conditioning", "direction", "strength"], ["CONDITIONING"]),
    }
    for node in [*nodes.NODES, *file_nodes.NODES, Pix2PixZeroSentences]:
        schema = node.GET_SCHEMA()
        inputs, outputs = expected.pop(schema.node_id)
        assert [i.id for i in schema.inputs] == inputs
        assert [o.io_type for o in schema.outputs] == outputs
        assert schema.category == "pix2pix-zero"
        assert all(i.tooltip for i in schema.inputs)
    assert not expected


def test_the_seed_widget_is_named_as_in_core():
    seed = Pix2PixZeroSentences.INPUT_TYPES()["required"]["seed"][1]
    assert seed["control_after_generate"] == "fixed"  # a drawn seed would run everything that follows at every queue


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


def rows_of(clip, text):
    """[tokens, width] as the stock node encodes it, in double precision."""
    return encode(clip, text)[0][0][0].double()


def test_a_direction_by_words_moves_each_word_to_itself_and_adds_what_is_new(clip, run_node):
    """One pair, so that no mean is taken. Every word here is one token, so word i is row i + 1."""
    lines = {"source_sentences": "a cat in winter", "target_sentences": "a cat with glasses in winter"}
    node = nodes.Pix2PixZeroEditDirectionFromSentences
    (found,) = run_node(node, clip=clip, alignment="words", **lines)
    source, target = (rows_of(clip, text) for text in lines.values())
    rows = [
        0,
        1,
        2,
        5,
        6,
        7,
        8,
        8,
        *range(8, 77),
    ]  # start, a, cat, in, winter, end, two rows before the longer's padding
    shift = target[rows] - source
    assert torch.allclose(found.tensors["cond"][0].double(), shift, atol=1e-5)
    (moved,) = run_node(nodes.Pix2PixZeroApplyDirection, conditioning=encode(clip, "a cat in winter"), direction=found)
    expected = torch.cat([target[rows[:-2]], target[3:5]])
    assert torch.allclose(moved[0][0][0].double(), expected, atol=1e-5)
    assert torch.allclose(moved[0][1]["pooled_output"], encode(clip, lines["target_sentences"])[0][1]["pooled_output"])


def test_by_words_it_is_the_mean_over_sentences_in_any_order(clip, run_node):
    """Long and weighted sentences are encoded out of their order, and words count where half of the sentences add them."""
    long = ", ".join(["a small red cat on a long red carpet"] * 12)
    sources = ["a cat at night", long, "a (big:1.3) cat", "a cat"]
    targets = ["a cat with glasses at night", f"{long} with glasses", "a (big:1.3) cat with glasses", "a dog"]
    lines = {"source_sentences": "\n".join(sources), "target_sentences": "\n".join(targets)}
    (found,) = run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=clip, alignment="words", **lines)
    padding = [*range(6, 77)]
    rows = [
        [0, 1, 2, 5, 6, 7, *(max(p, 8) for p in padding)],
        [*range(77)],  # the first chunk of the long sentence is full and all alike
        [0, 1, 2, 3, 6, *(max(p, 7) for p in (5, *padding))],
        [*range(77)],
    ]
    a, b = ([rows_of(clip, text)[:77] for text in side] for side in (sources, targets))
    shifts = [after[places] - before for before, after, places in zip(a, b, rows)]
    assert torch.allclose(found.tensors["cond"][0].double(), sum(shifts) / 4, atol=1e-5)
    words = (b[0][3:5] + b[2][4:6]) / 2 - sum(after[places] for after, places in zip(b, rows))[-2:] / 4
    assert torch.allclose(found.added[0].double(), words, atol=1e-5)


def test_by_words_a_long_caption_gets_what_is_added_in_its_last_chunk(clip, run_node):
    lines = {
        "source_sentences": "a cat\na dog at night",
        "target_sentences": "a cat with glasses\na dog with glasses at night",
    }
    (found,) = run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=clip, alignment="words", **lines)
    assert found.added.shape[1] == 2
    plain = replace(found, added=None)
    for caption, chunks in ((CAPTION, 1), (", ".join([CAPTION] * 12), 2), ("a (cat:1.2), a ((dog))", 1), ("", 1)):
        cond = encode(clip, caption)
        assert cond[0][0].shape[1] == 77 * chunks
        moved, without = (
            run_node(nodes.Pix2PixZeroApplyDirection, conditioning=cond, direction=d, strength=0.7)[0][0]
            for d in (found, plain)
        )
        added = moved[0].double() - without[0].double()
        assert not added[:, :-2].any()
        assert torch.allclose(added[:, -2:], 0.7 * found.added.double(), atol=1e-5)
        assert torch.equal(moved[1]["pooled_output"], without[1]["pooled_output"])


def test_without_shifts_words_and_positions_are_the_same_bits(clip, run_node):
    source, target = paired_sentences("cat", "dog", 40, 0)
    lines = {"source_sentences": "\n".join(source), "target_sentences": "\n".join(target)}
    found = [
        run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=clip, **lines, **chosen)[0]
        for chosen in ({}, {"alignment": "positions"}, {"alignment": "words"})
    ]
    for other in found[1:]:
        assert all(torch.equal(other.tensors[k], found[0].tensors[k]) for k in found[0].tensors)
        assert other.added is None


def test_sentences_that_have_no_partner_cannot_be_aligned(clip, run_node):
    node = nodes.Pix2PixZeroEditDirectionFromSentences
    lines = {"source_sentences": "a cat\na black cat", "target_sentences": "a dog"}
    with pytest.raises(ValueError, match="^alignment: .*2 source_sentences and 1 target_sentences.*positions"):
        run_node(node, clip=clip, alignment="words", **lines)
    run_node(node, clip=clip, **lines)


def test_an_encoder_without_a_fixed_length_cannot_align_words(clip, run_node, monkeypatch):
    monkeypatch.setattr(text_encoding, "chunk_length", lambda _: None)
    lines = {"source_sentences": "a cat", "target_sentences": "a dog"}
    with pytest.raises(ValueError, match="^clip: .*positions"):
        run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=clip, alignment="words", **lines)


@pytest.mark.parametrize(
    ("source", "target", "socket"), [("", "dog", "source"), ("cat", " ", "target"), ("cat", "the cat", "target")]
)
def test_bad_concepts_are_refused_before_the_encoder_runs(source, target, socket, run_node):
    with pytest.raises(ValueError, match=f"^{socket}: "):
        run_node(nodes.Pix2PixZeroEditDirection, clip=None, source=source, target=target)


@pytest.mark.parametrize("concept", ["cat " * 250_000, "\ud83d cat", None, 3])
def test_a_concept_is_a_text_of_bounded_length(concept, run_node):
    words = "at most|half a character|is not a text"
    with pytest.raises(ValueError, match=f"^source: .*({words})"):
        run_node(nodes.Pix2PixZeroEditDirection, clip=None, source=concept, target="dog")
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
        run_node(nodes.Pix2PixZeroEditDirectionFromSentences, clip=None, **lines)


def save(direction, prefix, run_node):
    run_node(file_nodes.Pix2PixZeroSaveDirection, direction=direction, filename_prefix=prefix)


def test_a_saved_direction_comes_back_bit_for_bit(plain_direction, folder, run_node):
    save(plain_direction, "animals/cat2dog", run_node)
    assert direction_files.direction_names() == ["animals/cat2dog_00001_.safetensors"]
    (again,) = run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name="animals/cat2dog_00001_.safetensors")
    assert again.tensors.keys() == plain_direction.tensors.keys()
    assert all(torch.equal(again.tensors[k], plain_direction.tensors[k]) for k in plain_direction.tensors)
    assert torch.equal(again.first_token, plain_direction.first_token)
    described = ("encoder", "source", "target", "count")
    assert [getattr(again, k) for k in described] == [getattr(plain_direction, k) for k in described]


def test_words_that_an_edit_adds_are_saved_too_and_other_files_stay_as_they_were(plain_direction, folder, run_node):
    added = replace(plain_direction, added=torch.randn(1, 2, 8))
    save(plain_direction, "plain", run_node)
    save(added, "added", run_node)
    for name, version, kept in (("plain", "1", plain_direction), ("added", "2", added)):
        path = folder / f"{name}_00001_.safetensors"
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format_version"] == version
            assert ("added_words" in file.keys()) == (name == "added")
        (again,) = run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name=path.name)
        assert kept.added is again.added is None or torch.equal(kept.added, again.added)


def test_saving_again_counts_up_and_leaves_no_other_files(plain_direction, folder, run_node):
    for _ in range(3):
        save(plain_direction, "cat2dog", run_node)
    assert sorted(p.name for p in folder.iterdir()) == [f"cat2dog_0000{i}_.safetensors" for i in (1, 2, 3)]


def test_a_file_that_appears_meanwhile_is_not_overwritten(plain_direction, folder, run_node, monkeypatch):
    save(plain_direction, "cat2dog", run_node)
    first = (folder / "cat2dog_00001_.safetensors").read_bytes()
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda prefix, root: (str(folder), prefix, 1, "", prefix))
    save(plain_direction, "cat2dog", run_node)
    assert (folder / "cat2dog_00001_.safetensors").read_bytes() == first
    assert (folder / "cat2dog_00002_.safetensors").is_file()


def test_a_save_that_fails_leaves_nothing_behind(plain_direction, folder, run_node, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(direction_files.os, "replace", full_disk)
    with pytest.raises(ValueError, match="^filename_prefix: .*No space"):
        save(plain_direction, "animals/dogs/cat2dog", run_node)
    assert not folder.exists()


def test_the_file_system_speaks_in_the_users_words(plain_direction, folder, run_node):
    folder.mkdir()
    (folder / "taken").write_text("a file")
    for prefix, reason in (("a" * 300, "name too long"), (f"new/{'a' * 300}", "name too long"), ("taken/x", "")):
        with pytest.raises(ValueError, match=f"(?i)^filename_prefix: .*cannot be saved in .*{reason}") as error:
            save(plain_direction, prefix, run_node)
        assert str(folder) in str(error.value)
    assert [path.name for path in folder.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (UnicodeEncodeError("ascii", "고양이", 0, 3, "ordinal not in range(128)"), "'ascii' codec"),
    ],
)
def test_what_the_file_system_refuses_is_named(error, reason, plain_direction, folder, run_node, monkeypatch):
    """A folder that is only to be read, and a system whose names have no such letters."""

    def refuse(*_):
        raise error

    monkeypatch.setattr(direction_files.os, "replace", refuse)
    with pytest.raises(ValueError, match=f"^filename_prefix: .*{reason}") as told:
        save(plain_direction, "new/cat2dog", run_node)
    assert str(folder / "new") in str(told.value) and not folder.exists()


@pytest.mark.parametrize("prefix", ["aux/x", "con", "a/NUL.txt", "COM1", "a./x"])
def test_names_that_windows_cannot_make_are_refused_everywhere(prefix, plain_direction, folder, run_node):
    with pytest.raises(ValueError, match="^filename_prefix: Windows"):
        save(plain_direction, prefix, run_node)


def test_a_file_has_the_folders_usual_rights(plain_direction, folder, run_node):
    save(plain_direction, "cat2dog", run_node)
    (folder / "other").touch()
    assert (folder / "cat2dog_00001_.safetensors").stat().st_mode == (folder / "other").stat().st_mode


def test_what_a_killed_save_left_is_cleared_by_a_later_one(plain_direction, folder, run_node):
    folder.mkdir()
    old, new = folder / ".pix2pix_zero_old", folder / ".pix2pix_zero_new"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    save(plain_direction, "cat2dog", run_node)
    assert new.exists() and not old.exists()


@pytest.mark.parametrize("header", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickle_is_read(header, plain_direction, folder, run_node):
    """The first bytes of a safetensors file are the length of its header, and these are those of pickles' protocols."""
    for length in range(2000):
        named = replace(plain_direction, source="x" * length)
        if int.from_bytes(direction_files._as_bytes(named)[:8], "little") == header:
            break
    save(named, "cat2dog", run_node)
    content = (folder / "cat2dog_00001_.safetensors").read_bytes()
    assert content[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    (again,) = run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name="cat2dog_00001_.safetensors")
    assert again.source == named.source and torch.equal(again.tensors["cond"], named.tensors["cond"])


def test_every_flipped_bit_of_the_tensors_is_noticed(plain_direction, folder, run_node):
    save(plain_direction, "cat2dog", run_node)
    path = folder / "cat2dog_00001_.safetensors"
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for place in range(begin, len(content), 97):
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="^direction_name: .*damaged"):
            run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name=path.name)


def test_a_file_of_a_release_without_checksums_is_read(plain_direction, folder, run_node):
    save(plain_direction, "cat2dog", run_node)
    _rewrite(folder / "cat2dog_00001_.safetensors", lambda t, m: None)
    run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name="cat2dog_00001_.safetensors")


def test_a_name_of_a_workflow_from_windows_is_valid(plain_direction, folder, run_node):
    save(plain_direction, "animals/cat2dog", run_node)
    node = file_nodes.Pix2PixZeroLoadDirection
    for name in ("animals\\cat2dog_00001_.safetensors", "animals/cat2dog_00001_.safetensors", None):
        assert node.validate_inputs(direction_name=name) is True
    assert "there is no" in node.validate_inputs(direction_name="dog_00001_.safetensors")
    assert "leaves" in node.validate_inputs(direction_name="../x.safetensors")


@pytest.mark.parametrize("name", [None, 3, "missing.safetensors", "../x"])
def test_a_name_without_a_file_has_one_fingerprint_and_is_refused_in_words(name, folder, run_node):
    node = file_nodes.Pix2PixZeroLoadDirection
    assert node.fingerprint_inputs(name) == node.fingerprint_inputs(name)
    with pytest.raises(ValueError, match="^direction_name: "):
        run_node(node, direction_name=name)


BAD_NAMES = ["", "  ", "../evil", "a/../../evil", "/tmp/evil", "..", "..\\evil", "C:\\evil", "what?", "a\x00b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_empty_or_leave_the_folder_are_refused(name, plain_direction, folder, run_node):
    with pytest.raises(ValueError, match="^filename_prefix: "):
        save(plain_direction, name, run_node)
    (folder.parent / "evil.safetensors").write_bytes(b"outside")
    for suffix in ("", ".safetensors"):
        with pytest.raises(ValueError, match="^direction_name: "):
            run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name=name + suffix)
    assert sorted(p.name for p in folder.parent.rglob("*.safetensors")) == ["evil.safetensors"]


def _rewrite(path, change):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    metadata.pop("sha256")
    change(tensors, metadata)
    save_file(tensors, path, metadata)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "header only": lambda path: path.write_bytes(path.read_bytes()[:30]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a direction at all"),
    "zip pickle": lambda path: torch.save({"cond": torch.zeros(1, 77, 32)}, path),
    "bare pickle": lambda path: path.write_bytes(b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00}\x94."),
    "foreign": lambda path: save_file({"lora.weight": torch.zeros(2, 2)}, path),
    "foreign with metadata": lambda path: save_file({"w": torch.zeros(2)}, path, {"format": "pt"}),
    "newer version": lambda path: _rewrite(path, lambda t, m: m.update(format_version="3")),
    "no cond": lambda path: _rewrite(path, lambda t, m: t.pop("direction.cond")),
    "not a number": lambda path: _rewrite(path, lambda t, m: t["direction.cond"].fill_(float("nan"))),
    "wrong shape": lambda path: _rewrite(path, lambda t, m: t.update({"direction.cond": torch.zeros(3, 4)})),
    "integers": lambda path: _rewrite(path, lambda t, m: t.update({"direction.cond": torch.zeros(1, 3, 4).int()})),
    "no words": lambda path: _rewrite(path, lambda t, m: t.update(added_words=torch.zeros(1, 0, 8))),
    "words of another width": lambda path: _rewrite(path, lambda t, m: t.update(added_words=torch.zeros(1, 2, 7))),
    "words not numbers": lambda path: _rewrite(
        path, lambda t, m: t.update(added_words=torch.full((1, 2, 8), torch.inf))
    ),
    "no count": lambda path: _rewrite(path, lambda t, m: m.pop("count")),
    "a count in other digits": lambda path: _rewrite(path, lambda t, m: m.update(count="²")),
    "a count of 5000 digits": lambda path: _rewrite(path, lambda t, m: m.update(count="9" * 5000)),
    "a scalar": lambda path: _rewrite(path, lambda t, m: t.update({"direction.x": torch.tensor(1.0)})),
    "numbers of 8 bits": lambda path: _rewrite(
        path, lambda t, m: t.update({"direction.cond": torch.zeros(1, 77, 8).to(torch.float8_e4m3fn)})
    ),
    "nothing": lambda path: _rewrite(path, lambda t, m: t.update({"direction.cond": torch.zeros(1, 0, 8)})),
    "a first token not a number": lambda path: _rewrite(path, lambda t, m: t["first_token"].fill_(torch.nan)),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_are_no_directions_are_refused(damage, plain_direction, folder, run_node):
    save(plain_direction, "cat2dog", run_node)
    path = folder / "cat2dog_00001_.safetensors"
    DAMAGE[damage](path)
    with pytest.raises(ValueError, match='^direction_name: .*"cat2dog_00001_.safetensors"'):
        run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name=path.name)


def test_a_pickle_is_not_even_opened_as_one(folder, run_node):
    folder.mkdir()
    torch.save({"cond": torch.zeros(1, 77, 32)}, folder / "cat2dog.pt")
    torch.save({"cond": torch.zeros(1, 77, 32)}, folder / "cat2dog.safetensors")
    with pytest.raises(ValueError, match="^direction_name: .*not a .safetensors"):
        run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name="cat2dog.pt")
    with pytest.raises(ValueError, match="^direction_name: .*pickle"):
        run_node(file_nodes.Pix2PixZeroLoadDirection, direction_name="cat2dog.safetensors")
    assert direction_files.direction_names() == ["cat2dog.safetensors"]


def test_the_cache_notices_a_changed_file(plain_direction, folder, run_node):
    save(plain_direction, "cat2dog", run_node)
    name = "cat2dog_00001_.safetensors"
    before = file_nodes.Pix2PixZeroLoadDirection.fingerprint_inputs(direction_name=name)
    assert before == file_nodes.Pix2PixZeroLoadDirection.fingerprint_inputs(direction_name=name)
    _rewrite(folder / name, lambda t, m: t["direction.cond"].mul_(2))
    assert before != file_nodes.Pix2PixZeroLoadDirection.fingerprint_inputs(direction_name=name)


def test_the_folder_is_registered_for_safetensors_beside_folders_of_the_users(monkeypatch):
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {direction_files.FOLDER: (["/mine"], set())})
    direction_files.register_directions_folder()
    direction_files.register_directions_folder()
    paths, extensions = folder_paths.folder_names_and_paths[direction_files.FOLDER]
    assert paths[0] == "/mine" and len(paths) == 2
    assert paths[1].replace("\\", "/").endswith("models/pix2pix_zero/directions")
    assert extensions == {".safetensors"}


@pytest.mark.parametrize("foreign", [None, {}, torch.zeros(1), "a direction"])
def test_what_is_no_direction_is_refused_in_words(foreign, plain_direction, folder, run_node):
    words = "and nothing that Edit Direction made"
    with pytest.raises(ValueError, match=f"^direction: .*{words}"):
        run_node(nodes.Pix2PixZeroApplyDirection, conditioning=[[torch.zeros(1, 77, 8), {}]], direction=foreign)
    with pytest.raises(ValueError, match=f"^direction: .*{words}"):
        save(foreign, "x", run_node)
    with pytest.raises(ValueError, match=f"^direction_b: .*{words}"):
        run_node(nodes.Pix2PixZeroCombineDirections, direction_a=plain_direction, direction_b=foreign)


def test_the_server_takes_the_name_of_a_workflow_from_windows(server):
    graph = Graph()
    clip = graph.add("Pix2PixZeroDemoModel")[1]
    lines = {"source_sentences": "a cat", "target_sentences": "a dog"}
    made = graph.add("Pix2PixZeroEditDirectionFromSentences", clip=clip, **lines)
    graph.add("Pix2PixZeroSaveDirection", direction=made[0], filename_prefix="animals/cat2dog")
    info = server.object_info()
    server.run(graph.api(info))

    def load(name):
        graph = Graph()
        loaded = graph.add("Pix2PixZeroLoadDirection", direction_name=name)
        kept = graph.add("Pix2PixZeroSaveDirection", direction=loaded[0], filename_prefix="again")
        return server.run(graph.api(info))[kept.key]["text"]

    assert load("animals\\cat2dog_00001_.safetensors") == ["again_00001_.safetensors"]
    with pytest.raises(GraphError, match="there is no"):
        load("animals\\missing.safetensors")
