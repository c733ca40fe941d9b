"""The metrics node on tiny models made on the spot, against the same figures by transformers and torchvision alone."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judge_figures import TEXTS, box_mask, clip_similarity, dino_keys, lpips_distance, pictures
from pix2pix_zero.devtools.graphs import Graph
from pix2pix_zero.editing import metrics
from pix2pix_zero.host.networks import metric_models
from pix2pix_zero.host.networks.edit_figures import EditFigures
from pix2pix_zero.nodes.metrics import Pix2PixZeroEditMetrics
from tiny_judges import make_dino_folder

FIGURES = [field.name for field in fields(EditFigures)]


def test_measures_what_needs_no_model_and_says_what_is_missing(measure):
    source, edited = pictures(1), pictures(1, seed=1)
    report, figures = measure(source=source, edited=edited)
    mse = np.mean((source.double().numpy() - edited.double().numpy()) ** 2)
    assert figures["mse"] == pytest.approx(mse, rel=1e-5)
    assert figures["psnr"] == pytest.approx(-10 * math.log10(mse), rel=1e-5)
    assert 0 < figures["ssim"] < 1
    assert all(math.isnan(figures[name]) for name in FIGURES[3:])
    assert "over the whole picture" in report
    for name in ("lpips_model", "dino_model", "clip_model"):
        assert f"no {name} is chosen" in report


def test_with_a_mask_only_the_rest_counts_whatever_happens_inside(measure, judge_models):
    source, mask = pictures(1), box_mask()
    edited = (source + 0.05 * pictures(1, seed=1)).clamp(0, 1)
    wild = torch.where(mask[..., None].bool(), pictures(1, seed=2), edited)
    report, figures = measure(source=source, edited=edited, mask=mask, lpips_model="lpips.safetensors")
    _, wilder = measure(source=source, edited=wild, mask=mask, lpips_model="lpips.safetensors")
    for name in ("psnr", "ssim", "mse", "lpips"):
        assert figures[name] == wilder[name]
    square = (source.double() - edited.double()) ** 2
    outside = mask[0] == 0
    assert figures["mse"] == pytest.approx(square[0][outside].mean().item(), rel=1e-5)
    assert figures["mse_inside"] == pytest.approx(square[0][~outside].mean().item(), rel=1e-5)
    assert wilder["mse_inside"] > figures["mse_inside"]
    kept = torch.where(mask[..., None].bool(), source, edited)
    assert figures["lpips"] == pytest.approx(lpips_distance(source[0], kept[0]), rel=1e-4)
    assert "outside the mask" in report


def test_the_report_calls_the_pictures_by_their_labels(measure):
    edited = torch.cat([pictures(1, seed=1), pictures(1, seed=2)])
    numbered, _ = measure(source=pictures(1), edited=edited)
    for labels in (["one\n\ntwo\n"], ["one", "two"]):
        report, _ = measure(source=pictures(1), edited=edited, labels=labels)
        assert report == numbered.replace("Picture 1", "one").replace("Picture 2", "two")
    with pytest.raises(ValueError, match="^labels: it brings 3 lines for 2 pictures"):
        measure(source=pictures(1), edited=edited, labels="one\ntwo\nthree")


def test_a_mask_of_another_size_is_resized(measure):
    source, mask = pictures(1), box_mask()
    edited = source.clone()
    edited[:, 10:22, 12:28] = 0
    _, figures = measure(source=source, edited=edited, mask=mask[:, ::2, ::2])
    assert figures["mse"] == 0
    assert figures["mse_inside"] > 0.01


def test_a_mask_over_everything_leaves_nothing_to_measure(measure):
    report, figures = measure(source=pictures(1), edited=pictures(1, seed=1), mask=torch.ones(1, 40, 56))
    assert math.isnan(figures["psnr"]) and math.isnan(figures["ssim"])
    assert figures["mse_inside"] > 0
    assert "a mask covers the whole picture" in report

    masks = torch.cat([torch.ones(1, 40, 56), box_mask()])
    _, alone = measure(source=pictures(1), edited=pictures(1, seed=1), mask=box_mask())
    _, both = measure(source=pictures(2)[:1], edited=pictures(1, seed=1).repeat(2, 1, 1, 1), mask=masks)
    assert both["psnr"] == pytest.approx(alone["psnr"])


def test_clip_figures_are_those_of_transformers(measure, judge_models):
    source, edited, mask = pictures(1), pictures(1, seed=1), box_mask()
    kept = [clip_similarity(judge_models / "clip", edited[0], text) for text in TEXTS]
    first = kept.index(max(kept))
    for source_text, target_text, accuracy in (
        (TEXTS[1 - first], TEXTS[first], 1),
        (TEXTS[first], TEXTS[1 - first], 0),
    ):
        _, figures = measure(
            source=source, edited=edited, mask=mask, source_text=source_text, target_text=target_text, clip_model="clip"
        )
        expected = clip_similarity(judge_models / "clip", edited[0], target_text)
        assert figures["clip_similarity"] == pytest.approx(max(expected, 0), abs=1e-3)
        inside = clip_similarity(judge_models / "clip", (edited * mask[..., None])[0], target_text)
        assert figures["clip_similarity_inside"] == pytest.approx(max(inside, 0), abs=1e-3)
        assert figures["clip_accuracy"] == accuracy
        assert expected > 0 and inside > 0
    with torch.inference_mode():
        raw = metric_models.load_clip("clip").similarity(edited, TEXTS)[0].tolist()
    assert raw == pytest.approx(kept, abs=1e-3)


@pytest.mark.parametrize("size", [(48, 48), (40, 56), (96, 20), (250, 300)])
def test_structure_distance_is_that_of_the_last_layers_keys(measure, judge_models, size):
    generator = torch.Generator().manual_seed(0)
    source, edited = (torch.rand(1, *size, 3, generator=generator) for _ in range(2))
    similar = []
    for image in (source, edited):
        keys = F.normalize(dino_keys(judge_models / "dino", image[0])[0].double(), dim=-1)
        similar.append(keys @ keys.T)
    _, figures = measure(source=source, edited=edited, dino_model="dino")
    assert figures["structure_distance"] == pytest.approx(((similar[0] - similar[1]) ** 2).mean().item(), rel=1e-3)
    assert measure(source=source, edited=source, dino_model="dino")[1]["structure_distance"] == 0


def test_keys_on_the_scale_of_pie_bench_skip_the_division_by_255(judge_models):
    image = pictures(1)
    with torch.inference_mode():
        keys = metric_models.load_dino("dino").keys(image, value_range=255)
    torch.testing.assert_close(keys, dino_keys(judge_models / "dino", image[0], 255), atol=1e-3, rtol=1e-3)


def test_dino_weights_without_a_pooler_load(judge_models, measure):
    make_dino_folder(judge_models / "bare", pooler=False)
    _, with_pooler = measure(source=pictures(1), edited=pictures(1, seed=1), dino_model="dino")
    _, without = measure(source=pictures(1), edited=pictures(1, seed=1), dino_model="bare")
    assert without["structure_distance"] > 0 and with_pooler["structure_distance"] > 0


def test_a_batch_is_the_mean_of_its_pictures_and_the_report_lists_each(measure, judge_models):
    source, edited, mask = pictures(3), pictures(3, seed=1), box_mask()
    options = {"clip_model": "clip", "dino_model": "dino", "lpips_model": "lpips.safetensors"}
    targets = ["a red cat", "the dog", "a photo of a cat"]
    alone = [
        measure(source=source[i : i + 1], edited=edited[i : i + 1], mask=mask, source_text="a dog",
                target_text=targets[i], **options)[1]
        for i in range(3)
    ]  # fmt: skip
    report, together = measure(
        source=source, edited=edited, mask=mask, source_text="a dog", target_text="\n".join(targets), **options
    )
    for name in FIGURES:
        assert together[name] == pytest.approx(np.mean([figures[name] for figures in alone]), rel=1e-5), name
    for number, figures in enumerate(alone, 1):
        assert f"Picture {number}: PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.4f}" in report
    assert "Not measured" not in report

    as_lists = {"source": list(source.split(1)), "edited": list(edited.split(1)), "target_text": targets}
    assert measure(**as_lists, mask=mask, source_text="a dog", **options)[0] == report


def test_one_source_serves_several_edits_and_lists_may_hold_other_sizes(measure):
    source, edited = pictures(1), pictures(2, seed=1)
    _, shared = measure(source=source, edited=edited)
    _, repeated = measure(source=source.repeat(2, 1, 1, 1), edited=edited)
    assert shared["mse"] == pytest.approx(repeated["mse"], rel=1e-6)
    other = [pictures(1, 24, 24), pictures(1, 24, 24, seed=1)]
    _, mixed = measure(source=[source, other[0]], edited=[edited[:1], other[1]])
    expected = [((a - b) ** 2).mean().item() for a, b in ((source, edited[:1]), other)]
    assert mixed["mse"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_alpha_is_left_out_and_one_channel_is_grey(measure):
    source, edited = pictures(1), pictures(1, seed=1)
    alpha = torch.cat([edited, pictures(1, channels=1, seed=5)], dim=-1)
    assert measure(source=source, edited=alpha)[1]["mse"] == measure(source=source, edited=edited)[1]["mse"]
    grey = edited[..., :1]
    assert measure(source=source, edited=grey)[0] == measure(source=source, edited=grey.repeat(1, 1, 1, 3))[0]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"edited": pictures(1, 40, 48)}, "^edited: picture 1 is 48x40, its source 56x40. Resize"),
        ({"edited": pictures(3)}, "^source: it brings 2 pictures for 3 pictures"),
        ({"source": pictures(3)}, "^edited: it brings 2 pictures for 3 pictures"),
        ({"mask": torch.zeros(3, 40, 56)}, "^mask: it brings 3 masks for 2 pictures"),
        ({"target_text": "a\nb\nc"}, "^target_text: it brings 3 lines for 2 pictures"),
        ({"source_text": ["a", "b", "c"]}, "^source_text: it brings 3 lines for 2 pictures"),
        ({"edited": torch.full((2, 40, 56, 3), torch.nan)}, "^edited: it holds NaN"),
        ({"source": torch.zeros(2, 40, 56, 5)}, "^source: expected"),
        ({"mask": torch.full((1, 4, 4), torch.inf)}, "^mask: it holds NaN or infinite"),
        ({"mask": torch.zeros(1, 0, 4)}, "^mask: expected"),
        ({"source": torch.zeros(1, 0, 4, 3)}, "^source: expected"),
        ({"source": []}, "^source: the list is empty"),
        ({"edited": []}, "^edited: the list is empty"),
        ({"source": [], "edited": []}, "^source: the list is empty"),
        ({"clip_model": []}, "^clip_model: the list is empty"),
        ({"allow_download": []}, "^allow_download: the list is empty"),
        ({"target_text": "a \ud83d"}, "^target_text: .*half a character"),
        ({"source_text": [3]}, "^source_text: 3 is not a text"),
    ],
)
def test_errors_name_the_socket(measure, inputs, words):
    with pytest.raises(ValueError, match=words):
        measure(**{"source": pictures(2), "edited": pictures(2, seed=1), **inputs})


def test_a_mask_of_truth_values_is_one_of_numbers(measure):
    options = {"source": pictures(1), "edited": pictures(1, seed=1)}
    assert measure(**options, mask=box_mask().bool()) == measure(**options, mask=box_mask())
    small = torch.zeros(1, 8, 8, dtype=torch.bool)
    small[:, 2:5, 2:5] = True
    assert measure(**options, mask=small) == measure(**options, mask=small.float())


def test_lpips_refuses_pictures_that_its_network_cannot_take(measure, judge_models):
    with pytest.raises(ValueError, match="^source: LPIPS needs pictures of at least 32 by 32"):
        measure(source=pictures(1, 24, 40), edited=pictures(1, 24, 40), lpips_model="lpips.safetensors")


def test_the_first_sockets_are_those_of_shared_workflows():
    schema = Pix2PixZeroEditMetrics.define_schema()
    assert schema.node_id == "Pix2PixZeroEditMetrics"
    assert [item.id for item in schema.inputs][:3] == ["source", "edited", "mask"]
    assert [item.optional for item in schema.inputs] == [False, False, *[True] * (len(schema.inputs) - 2)]
    assert [item.display_name for item in schema.outputs] == ["report", *FIGURES]


def test_figures_of_the_plain_mathematics_are_the_nodes(measure):
    source, edited, mask = pictures(1), pictures(1, seed=1), box_mask()
    _, figures = measure(source=source, edited=edited, mask=mask)
    kept = torch.where(mask[..., None].bool(), source, edited)
    expected = metrics.structural_similarity(source.movedim(-1, 1), kept.movedim(-1, 1), 1 - mask[:, None])
    assert figures["ssim"] == pytest.approx(expected.item(), abs=1e-6)


def test_it_runs_on_the_server_with_a_list_of_edits_and_says_inf_and_nan(server):
    graph = Graph()
    scene = graph.add("Pix2PixZeroDemoScene", subject="cat", seed=3)
    edited = graph.add("ImageInvert", image=scene[0])
    both = graph.add("ImageBatch", image1=scene[0], image2=edited[0])
    texts = {"source_text": scene[2], "target_text": "a dog"}
    apart = graph.add("Pix2PixZeroEditMetrics", source=scene[0], edited=both[0], mask=scene[1], **texts)
    same = graph.add("Pix2PixZeroEditMetrics", source=scene[0], edited=scene[0])
    shown = [graph.add("PreviewAny", source=link) for link in (apart[0], same[0], same[1], same[5])]
    outputs = server.run(graph.api(server.object_info()))
    report, plain, psnr, lpips = (outputs[node.key]["text"][0] for node in shown)
    assert report.startswith("2 pictures. PSNR, SSIM, MSE and LPIPS outside the mask.")
    assert "Picture 1: PSNR inf dB, SSIM 1.0000, MSE 0.000000" in report
    assert "no clip_model is chosen" in report
    assert plain.startswith("1 picture. ")
    assert (psnr.lower(), lpips.lower()) in (("inf", "nan"), ("infinity", "nan"))
