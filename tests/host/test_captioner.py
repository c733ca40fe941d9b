"""The caption nodes on tiny BLIP folders made on the spot, against transformers alone."""

import importlib.util
import sys

import comfy.model_management
import comfy.utils
import numpy as np
import pytest
import torch
from pix2pix_zero.nodes.caption import Pix2PixZeroCaption
from tiny_blip import pictures


def reference_captions(folder, images, prefix=None):
    """The same captions by transformers alone, one picture at a time."""
    from transformers import BlipForConditionalGeneration, BlipProcessor

    blip = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    texts = []
    for image in images:
        picture = (image.numpy() * 255).round().astype(np.uint8)
        inputs = processor(images=picture, text=prefix, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        tokens = blip.generate(**inputs, max_new_tokens=12, num_beams=3, do_sample=False)
        texts.append(processor.decode(tokens[0][1:], skip_special_tokens=True).strip())
    return texts


def test_captions_each_picture_of_a_batch_as_transformers_does_alone(tiny_captioner, blip_folder, run_node):
    images = pictures(11)
    (captions,) = run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=images, max_new_tokens=12)
    assert captions == reference_captions(blip_folder, images)
    assert len(set(captions)) > 1


def test_prefix_conditions_the_caption_and_is_kept_once_as_typed(tiny_captioner, blip_folder, run_node):
    images = pictures(3)
    (captions,) = run_node(
        Pix2PixZeroCaption, captioner=tiny_captioner, image=images, prefix=" A photo  of ", max_new_tokens=12
    )
    expected = reference_captions(blip_folder, images, "a photo of")
    assert captions == ["A" + text.removeprefix("a") for text in expected]
    assert all(text.startswith("A photo of ") for text in captions)
    (unprefixed,) = run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=images, max_new_tokens=12)
    assert [text.removeprefix("A photo of ") for text in captions] != unprefixed


def test_alpha_is_left_out_and_one_channel_is_grey(tiny_captioner, run_node):
    images = pictures(2)
    (plain,) = run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=images)
    (with_alpha,) = run_node(
        Pix2PixZeroCaption, captioner=tiny_captioner, image=torch.cat([images, pictures(2, 1, 5)], dim=-1)
    )
    assert with_alpha == plain
    grey = images[..., :1]
    (one_channel,) = run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=grey)
    (three_channels,) = run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=grey.repeat(1, 1, 1, 3))
    assert one_channel == three_channels


@pytest.mark.parametrize("image", [torch.zeros(4, 4, 3), torch.zeros(1, 4, 4, 5), torch.full((1, 4, 4, 3), torch.nan)])
def test_refuses_what_is_no_picture(tiny_captioner, image, run_node):
    with pytest.raises(ValueError, match="^image: "):
        run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=image)


@pytest.mark.parametrize("prefix", ["a " * 5000, "a \ud83d", None])
def test_refuses_a_prefix_that_is_no_text_of_use(tiny_captioner, prefix, run_node):
    with pytest.raises(ValueError, match="^prefix: "):
        run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=pictures(1), prefix=prefix)


def test_refuses_what_is_no_captioner(run_node):
    with pytest.raises(ValueError, match="^captioner: .*Connect Load Captioner"):
        run_node(Pix2PixZeroCaption, captioner=object(), image=pictures(1))


def test_refuses_a_prefix_that_leaves_no_room(tiny_captioner, run_node):
    with pytest.raises(ValueError, match="^prefix: .*Shorten"):
        run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=pictures(1), prefix="cat " * 30)


def test_long_captions_end_where_the_model_ends(tiny_captioner, run_node):
    (captions,) = run_node(
        Pix2PixZeroCaption, captioner=tiny_captioner, image=pictures(3), prefix="cat " * 20, max_new_tokens=200
    )
    assert all(len(text.split()) <= 24 for text in captions)


def test_the_model_is_loaded_by_the_hosts_memory_management(tiny_captioner, run_node):
    comfy.model_management.unload_all_models()
    run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=pictures(1))
    assert any(loaded.model is tiny_captioner.patcher for loaded in comfy.model_management.current_loaded_models)
    assert tiny_captioner.patcher.load_device == comfy.model_management.text_encoder_device()
    assert tiny_captioner.patcher.model_size() > 0


def test_the_host_unloads_the_model_whole(tiny_captioner, run_node):
    run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=pictures(1))
    (loaded,) = [
        entry for entry in comfy.model_management.current_loaded_models if entry.model is tiny_captioner.patcher
    ]
    assert loaded.model_unload(memory_to_free=1) is True
    assert tiny_captioner.patcher.loaded_size() == 0
    comfy.model_management.current_loaded_models.remove(loaded)
    run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=pictures(1))


def test_cancel_stops_in_the_middle_of_a_caption_and_the_next_run_works(tiny_captioner, run_node, monkeypatch):
    images = pictures(2)
    (before,) = run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=images)
    steps = []

    def press_cancel(bar, value, *args, **kwargs):
        steps.append(value)
        if len(steps) == 2:
            comfy.model_management.interrupt_current_processing(True)

    with monkeypatch.context() as patch:
        patch.setattr(comfy.utils.ProgressBar, "update_absolute", press_cancel)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=images)
    assert len(steps) == 2
    (after,) = run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=images)
    assert after == before


def test_progress_ends_at_its_total(tiny_captioner, run_node, monkeypatch):
    seen = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "update_absolute", lambda bar, value, *args: seen.append((value, bar.total))
    )
    run_node(Pix2PixZeroCaption, captioner=tiny_captioner, image=pictures(10), max_new_tokens=7)
    assert seen[-1] == (14, 14)
    assert [value for value, _ in seen] == sorted(value for value, _ in seen)


@pytest.mark.parametrize("module", ["host.networks.model_kinds", "host.networks.captioner", "nodes.caption"])
def test_the_nodes_import_without_transformers_and_the_hub(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    spec = importlib.util.find_spec(f"pix2pix_zero.{module}")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
