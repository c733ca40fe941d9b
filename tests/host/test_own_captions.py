"""A caption that a person writes: no captioner is needed, and none is loaded."""

import pytest
import torch
from pix2pix_zero.devtools.graphs import Graph
from pix2pix_zero.devtools.server import GraphError
from pix2pix_zero.nodes.caption import Pix2PixZeroCaption


def captions(text: str, pictures: int) -> list[str]:
    return Pix2PixZeroCaption.execute(torch.rand(pictures, 16, 16, 3), caption=text).result[0]


def test_one_caption_is_for_all_pictures_and_a_line_each_for_its_own():
    assert captions(" a cat on a sofa ", 3) == ["a cat on a sofa"] * 3
    assert captions("a cat\n\na dog\n", 2) == ["a cat", "a dog"]
    assert captions("a cat\non a sofa", 1) == ["a cat on a sofa"]
    with pytest.raises(ValueError, match="^caption: it has 2 lines for 3 pictures"):
        captions("a cat\na dog", 3)


def test_the_captioner_is_asked_for_only_without_a_caption():
    assert Pix2PixZeroCaption.check_lazy_status(caption="  ") == ["captioner"]
    assert Pix2PixZeroCaption.check_lazy_status(caption="a cat") == []
    assert Pix2PixZeroCaption.check_lazy_status(captioner=object(), caption="") == []


def test_the_server_runs_without_the_captioner_that_is_missing(server):
    def run(caption: str) -> list[str]:
        graph = Graph()
        scene = graph.add("Pix2PixZeroDemoScene", seed=4)
        missing = graph.add("Pix2PixZeroLoadCaptioner", model_name="Salesforce/blip-image-captioning-base")
        described = graph.add("Pix2PixZeroCaption", captioner=missing[0], image=scene[0], caption=caption)
        shown = graph.add("PreviewAny", source=described[0])
        return server.run(graph.api(server.object_info()))[shown.key]["text"]

    assert "a photo of a cat" in str(run("a photo of a cat"))
    with pytest.raises(GraphError, match="large' and tick allow_download. Or write the caption yourself"):
        run("")
