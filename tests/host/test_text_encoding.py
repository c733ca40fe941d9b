"""Batched text encoding and the identity of text encoders, against ComfyUI's own one-prompt encoding."""

import comfy.model_management
import comfy.ops
import comfy.sd1_clip
import comfy.utils
import pytest
import torch
from pix2pix_zero.editing.sentences import paired_sentences
from pix2pix_zero.host.text import text_encoding
from pix2pix_zero.host.text.text_encoding import chunk_length, encode_sentences, encoder_fingerprint, find_direction
from tiny_clip import tiny_clip

from nodes import CLIPTextEncode

SENTENCES = [f"a photo of {n} cats in the snow" for n in ("no", "two", "three", "many", "orange", "sleepy", "wet")]
LONG = "a small cat on a very long red carpet, " * 12 + "at night"
WEIGHTED = "a (fluffy:1.4) cat"


@pytest.fixture(params=["sd1", "sdxl"])
def clip(request):
    with torch.inference_mode():
        return tiny_clip(request.param)


def one_by_one(clip, sentences) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with torch.inference_mode():
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(s))[0] for s in sentences]
        return [(cond, options["pooled_output"]) for cond, options in encoded]


def in_batches(clip, sentences) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with torch.inference_mode():
        return [
            (batch["cond"][i : i + 1], batch["pooled_output"][i : i + 1])
            for batch in encode_sentences(clip, sentences)
            for i in range(batch["cond"].shape[0])
        ]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for pair, expected in zip(ours, theirs, strict=True):
        for a, b in zip(pair, expected, strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() <= 1e-5


def lora_on(clip):
    patched = clip.clone()
    weights = {k: v for k, v in patched.patcher.model_state_dict().items() if k.endswith("fc1.weight")}
    patched.add_patches({k: ("diff", (torch.ones_like(v) * 0.05,)) for k, v in weights.items()})
    return patched


def test_batches_equal_stock_encoding_sentence_by_sentence(clip, monkeypatch):
    assert_same(in_batches(clip, SENTENCES), one_by_one(clip, SENTENCES))
    monkeypatch.setattr(text_encoding, "ROWS_PER_BATCH", 3)
    assert_same(in_batches(clip, SENTENCES), one_by_one(clip, SENTENCES))


def test_clip_skip_is_respected(clip):
    plain = one_by_one(clip, SENTENCES)
    clip.clip_layer(-3)
    skipped = one_by_one(clip, SENTENCES)
    assert not torch.allclose(plain[0][0], skipped[0][0], atol=1e-2)
    assert_same(in_batches(clip, SENTENCES), skipped)


def test_lora_patches_are_respected_and_taken_off_again(clip):
    plain = one_by_one(clip, SENTENCES)
    patched = lora_on(clip)
    with_lora = one_by_one(patched, SENTENCES)
    assert not torch.allclose(plain[0][0], with_lora[0][0], atol=1e-2)
    assert_same(in_batches(patched, SENTENCES), with_lora)
    assert_same(in_batches(clip, SENTENCES), plain)


def test_sentences_longer_than_a_chunk_and_weighted_words(clip):
    assert one_by_one(clip, [LONG])[0][0].shape[1] == 2 * 77
    # Sentences of the same length come together, weighted ones last.
    ordered = [LONG, LONG + " in winter", *SENTENCES, WEIGHTED]
    shuffled = [WEIGHTED, LONG, *SENTENCES, LONG + " in winter"]
    assert_same(in_batches(clip, shuffled), one_by_one(clip, ordered))


def test_nothing_is_left_on_the_encoder(clip):
    in_batches(clip, SENTENCES)
    assert not any(m._forward_hooks for m in clip.cond_stage_model.modules())


def test_an_encoder_whose_sentences_influence_each_other_is_run_one_by_one(clip, monkeypatch):
    forward = comfy.sd1_clip.SDClipModel.forward
    calls = []

    def mixing(self, tokens):
        calls.append(len(tokens))
        out, pooled = forward(self, tokens)
        return out - out.mean(0, keepdim=True) * (len(tokens) > 1), pooled

    monkeypatch.setattr(comfy.sd1_clip.SDClipModel, "forward", mixing)
    assert_same(in_batches(clip, SENTENCES), one_by_one(clip, SENTENCES))
    assert 1 in calls and max(calls) == len(SENTENCES)


def test_a_batch_is_one_run_of_the_encoder(clip, monkeypatch):
    rows = []
    forward = comfy.sd1_clip.SDClipModel.forward
    monkeypatch.setattr(
        comfy.sd1_clip.SDClipModel, "forward", lambda self, tokens: rows.append(len(tokens)) or forward(self, tokens)
    )
    encoders = 2 if hasattr(clip.cond_stage_model, "clip_g") else 1
    in_batches(clip, paired_sentences("cat", "dog", 100, 0)[0])
    assert sorted(rows) == [1] * encoders + [4] * encoders + [32] * 3 * encoders


def test_it_can_be_cancelled_and_reports_progress(clip, monkeypatch):
    monkeypatch.setattr(text_encoding, "ROWS_PER_BATCH", 2)
    monkeypatch.setattr(comfy.ops, "run_every_op", lambda: None)  # not every encoder's layers poll
    seen = []
    progress = comfy.utils.ProgressBar(len(SENTENCES))
    progress.hook = lambda value, total, preview, **_: seen.append((value, total))
    with torch.inference_mode():
        batches = encode_sentences(clip, SENTENCES, progress)
        next(batches)
        next(batches)
        comfy.model_management.interrupt_current_processing(True)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            next(batches)
        list(encode_sentences(clip, SENTENCES[:3]))
    assert seen[0] == (2, len(SENTENCES))


def test_a_direction_is_the_difference_of_the_means_of_stock_encodings(clip):
    source, target = paired_sentences("cat", "dog wearing a hat", 40, seed=5)
    with torch.inference_mode():
        direction = find_direction(clip, source, target, "cat", "dog")
    sides = [one_by_one(clip, side) for side in (source, target)]
    for position, name in enumerate(("cond", "pooled_output")):
        a, b = (torch.cat([e[position] for e in side]).double().mean(0) for side in sides)
        assert (direction.tensors[name][0].double() - (b - a)).abs().max() < 1e-5
        assert direction.tensors[name].norm() > 0.01
    # A causal encoder: nothing before the first changed word moves, and the start token is the encoder's own.
    assert direction.tensors["cond"][0, 0].abs().max() < 1e-5
    with torch.inference_mode():
        (cond, _), *_ = CLIPTextEncode().encode(clip, "something else")[0]
    assert torch.allclose(direction.first_token, cond[0, 0].float(), atol=1e-4)


def test_directions_work_through_the_encoders_output_not_its_weights_dtype():
    with torch.inference_mode():
        clip = tiny_clip("sd1")
        clip.cond_stage_model.half()
        direction = find_direction(clip, ["a cat"], ["a dog"], "cat", "dog")
    assert direction.tensors["cond"].dtype == torch.float32


def test_chunk_length(clip):
    assert chunk_length(clip) == 77
    clip.set_tokenizer_option("l_min_length", 77)
    assert chunk_length(clip) == 77


def test_the_fingerprint_is_the_same_for_the_same_weights_only():
    with torch.inference_mode():
        prints = [encoder_fingerprint(tiny_clip(kind, seed)) for kind in ("sd1", "sdxl") for seed in (0, 1)]
        again = [encoder_fingerprint(tiny_clip(kind, seed)) for kind in ("sd1", "sdxl") for seed in (0, 1)]
        half = tiny_clip("sd1")
        half.cond_stage_model.half()
    assert prints == again
    assert len(set(prints)) == 4
    assert encoder_fingerprint(half) == prints[0]


def test_the_fingerprint_leaves_out_weights_that_checkpoints_lack(clip):
    default = encoder_fingerprint(clip)
    for name, weight in clip.cond_stage_model.named_parameters():
        if "text_projection" in name:
            weight.data.fill_(float("nan"))
    assert encoder_fingerprint(clip) == default


def test_a_slightly_changed_encoder_has_another_fingerprint(clip):
    default = encoder_fingerprint(clip)
    for _, weight in clip.cond_stage_model.named_parameters():
        weight.data.mul_(1.01)
    assert encoder_fingerprint(clip) != default


def test_the_fingerprint_tells_clip_skip_but_not_how_it_was_asked_for(clip):
    default = encoder_fingerprint(clip)
    clip.clip_layer({"SD1Model": -1, "SDXLModel": -2}[type(clip.cond_stage_model).__name__])
    assert encoder_fingerprint(clip) == default
    clip.clip_layer(-3)
    assert encoder_fingerprint(clip) != default


def test_the_fingerprint_is_that_of_the_encoder_below_its_loras(clip):
    default = encoder_fingerprint(clip)
    patched = lora_on(clip)
    assert encoder_fingerprint(patched) == default
    one_by_one(patched, ["patches the weights in place"])
    assert encoder_fingerprint(patched) == default
    assert encoder_fingerprint(clip) == default


def test_hooks_that_change_with_the_step_are_refused(clip):
    clip.patcher.forced_hooks = object()
    clip.use_clip_schedule = True
    with pytest.raises(ValueError, match="^clip: "):
        list(encode_sentences(clip, ["a cat"]))
