"""Pictures side by side, and a list of strengths that draws one edit for each."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from pix2pix_zero.devtools.graphs import example_graph
from pix2pix_zero.nodes.strip import Pix2PixZeroStrengths, Pix2PixZeroStrip
from pix2pix_zero.pictures import charts


def pictures(count, height=256, width=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator).float() / 255


def strip(run_node, images, labels=("",), columns=0, **inputs):
    (image,) = run_node(Pix2PixZeroStrip, images=list(images), labels=list(labels), columns=[columns], **inputs)
    assert len(image) == 1
    return image[0]


def find(picture, whole):
    """(row, column) of a picture in a larger one that holds it unchanged."""
    corner = (whole == picture[0, 0]).all(-1).nonzero().tolist()
    height, width = picture.shape[:2]
    (place,) = [(y, x) for y, x in corner if torch.equal(whole[y : y + height, x : x + width], picture)]
    return place


def test_lists_and_batches_are_laid_in_a_row_unchanged(run_node):
    batch, single = pictures(2), pictures(1, seed=1)
    whole = strip(run_node, [batch, single])
    places = [find(picture, whole) for picture in (*batch, *single)]
    assert len({row for row, _ in places}) == 1
    assert [column for _, column in places] == sorted(column for _, column in places)


def test_the_source_comes_first_and_columns_wrap(run_node):
    images, source = pictures(3), pictures(1, seed=1)
    whole = strip(run_node, [images], columns=2, source=[source])
    rows, columns = zip(*(find(picture, whole) for picture in (*source, *images)))
    assert rows[0] == rows[1] < rows[2] == rows[3]
    assert columns[0] == columns[2] < columns[1] == columns[3]


@pytest.mark.parametrize(
    "labels", [["one", "two"], ["one\ntwo"], ["one", "a label much longer than its picture is wide " * 3]]
)
def test_labels_stand_under_their_pictures(run_node, labels):
    images = pictures(2)
    whole = strip(run_node, [images], labels)
    for picture in images:
        top, left = find(picture, whole)
        under = whole[top + 256 :, left : left + 300]
        assert under.min() < 0.3
        assert under[-8:].min() == 1.0
    gap = whole[:, find(images[0], whole)[1] + 300 : find(images[1], whole)[1]]
    assert gap.min() == 1.0


def test_without_labels_there_is_no_room_for_them(run_node):
    assert strip(run_node, [pictures(2)]).shape[0] < strip(run_node, [pictures(2)], ["one", "two"]).shape[0]


def test_small_pictures_are_enlarged_and_others_take_the_size_of_the_first(run_node):
    small, large = pictures(1, 64, 64), pictures(1, 512, 512)
    whole = strip(run_node, [small, large])
    assert whole.shape[0] >= 256
    assert whole.shape[1] < 2 * 256 + 100


def test_grey_and_transparent_pictures_are_shown(run_node):
    whole = strip(run_node, [pictures(1)[..., :1], torch.cat([pictures(1), pictures(1)[..., :1]], -1)])
    assert whole.shape[-1] == 3


def test_more_labels_than_pictures_are_refused(run_node):
    with pytest.raises(ValueError, match="labels: there are 3 for 2 pictures"):
        strip(run_node, [pictures(2)], ["a", "b", "c"])


def test_numbers_become_a_list_with_labels(run_node):
    assert run_node(Pix2PixZeroStrengths, values=" 0, 0.5;1\n-2e-1 ,", name="cfg ") == (
        [0.0, 0.5, 1.0, -0.2],
        ["cfg 0", "cfg 0.5", "cfg 1", "cfg -0.2"],
    )
    assert run_node(Pix2PixZeroStrengths, values="3", name="") == ([3.0], ["3"])


@pytest.mark.parametrize("values", ["", " , ", "0, half", "1 nan", "inf"])
def test_other_words_than_numbers_are_refused(run_node, values):
    with pytest.raises(ValueError, match="values: .*not a list of numbers"):
        run_node(Pix2PixZeroStrengths, values=values, name="strength")


def test_a_list_of_strengths_draws_one_edit_each_and_the_nodes_say_what_they_do(server):
    """On the real server: the labelled strip, the line of text on each node, previews, and one bar for all edits."""
    graph = example_graph()
    sampler, source = graph.only("Pix2PixZeroKSampler"), graph.only("Pix2PixZeroDemoScene")
    inversion = graph.only("Pix2PixZeroInversion")
    graph.change(inversion, steps=3)
    graph.change(sampler, guidance_strength=0.1, local_blend=0.0)
    strengths = graph.add("Pix2PixZeroStrengths", values="0, 2")
    graph.change(graph.only("Pix2PixZeroApplyDirection"), strength=strengths[0])
    edits = graph.only("VAEDecode")
    strip_ = graph.add("Pix2PixZeroStrip", images=edits[0], labels=strengths[1], source=source[0])
    shown = graph.add("PreviewImage", images=strip_[0])
    messages = []
    outputs = server.run(graph.api(server.object_info()), messages.append)

    picture = np.asarray(Image.open(io.BytesIO(server.view(outputs[shown.key]["images"][0]))).convert("RGB"))
    assert picture.shape[1] > 3 * 256
    source_, unedited, edited = (picture[16:272, 16 + i * 272 :][:, :256].astype(float) for i in range(3))
    assert abs(unedited - source_).mean() < 0.7 * abs(edited - source_).mean()

    texts = {node: [m.text for m in messages if m.text and m.node == node] for node in (inversion.key, sampler.key)}
    assert texts[inversion.key][:3] == [f"Inverting {step}/3" for step in (1, 2, 3)]
    steps = [text.split(",")[0] for text in texts[sampler.key]]
    assert steps == [f"Picture {run}/2: guided step {step}/3" for run in (1, 2) for step in (1, 2, 3)]
    assert all(0 <= float(text.split("layout off by ")[1]) < 2 for text in texts[sampler.key])
    bar = [(m.value, m.maximum) for m in messages if m.node == sampler.key and m.maximum]
    assert bar == sorted(bar)
    assert {maximum for _, maximum in bar} == {6}
    assert sum(bool(m.preview) for m in messages) >= 3 + 6


def test_letters_that_the_own_typeface_lacks_come_from_one_that_has_them():
    own = charts.font(32)
    assert charts.has_letters(own, "strength 0.5")
    assert not charts.has_letters(own, "\u5f3a\u5ea6")
    assert charts.font_for("strength 0.5", 32).getname() == own.getname()
    others = [charts.font(32, name) for name in charts.TYPEFACES]
    having = [letters for letters in others if letters is not None and charts.has_letters(letters, "St\u00e4rke")]
    assert charts.font_for("St\u00e4rke", 32).getname() == (having[0] if having else own).getname()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"images": []}, "images: the list is empty"),
        ({"images": [torch.zeros(1, 0, 4, 3)]}, "images: expected"),
        ({"images": [torch.full((1, 4, 4, 3), torch.nan)]}, "images: it holds NaN"),
        ({"images": [torch.zeros(1, 4, 4, 3)], "source": [torch.zeros(4, 4, 3)]}, "source: expected"),
        ({"images": [torch.zeros(1200, 8, 8, 3)]}, "images: the strip would have .* fewer or smaller"),
        ({"images": [pictures(1)], "columns": []}, "columns: the list is empty"),
        ({"images": [pictures(1)], "labels": ["x" * 1_000_000]}, "labels: it has 1000000 letters"),
        ({"images": [pictures(1)], "labels": ["\ud83d"]}, "labels: .*half a character"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_in_words(inputs, words, run_node):
    with pytest.raises(ValueError, match=f"^{words}"):
        run_node(Pix2PixZeroStrip, **{"labels": [""], "columns": [0], **inputs})


@pytest.mark.parametrize("size", [(1, 8192), (8192, 1), (1, 1)])
def test_a_picture_of_one_line_stays_small(size, run_node):
    whole = strip(run_node, [torch.zeros(1, *size, 3)])
    assert whole.numel() < 3 * 2200 * 8300 / min(8, max(size))


def test_a_long_label_is_cut_off_in_time(run_node):
    strip(run_node, [pictures(1)], ["wide " * 1900])


@pytest.mark.parametrize(
    ("values", "words"), [("1 " * 100_000, "letters"), ("1 " * 101, "101 numbers"), (None, "not a text")]
)
def test_strengths_are_a_bounded_list(values, words, run_node):
    with pytest.raises(ValueError, match=f"^values: .*{words}"):
        run_node(Pix2PixZeroStrengths, values=values, name="strength")
