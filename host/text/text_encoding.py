"""Encode many sentences through a ComfyUI CLIP, know which text encoder it is, and move a conditioning."""

import hashlib
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

import comfy.model_management
import comfy.utils
import torch
from comfy.sd import CLIP
from comfy.sd1_clip import ClipTokenWeightEncoder

from ...editing.directions import (
    EditDirection,
    Encoding,
    NumberedEncoding,
    aligned_direction,
    apply_direction,
    edit_direction,
    same_encoder,
)
from ...editing.token_alignment import Partners, partner_rows
from ...editing.word_exchange import differing_words
from ..messages import SENTENCES, WORDS_ONLY
from ..running import show
from .conditionings import remember_base
from .prompt_words import tokenize

# By the names that the host's tokenizers have: those of CLIP.
CLIPS = ("l", "g")
ROWS_PER_BATCH = 32
Tokens = dict[str, list]
Numbered = tuple[int, Tokens]  # the sentence's place in its list


def require_clip(clip: CLIP | None) -> None:
    """Raise ValueError if a socket of type CLIP brings nothing, as checkpoint loaders do for files without one."""
    if clip is None:
        raise ValueError("clip: there is none. If it comes from a checkpoint loader, the file has no text encoder.")


def find_direction(
    clip: CLIP,
    source_sentences: Sequence[str],
    target_sentences: Sequence[str],
    source: str,
    target: str,
    alignment: str = "positions",
) -> EditDirection:
    """The edit direction from one list of sentences to the other through a CLIP, with a progress bar.

    `source` and `target` are names for people to read. `alignment` is one of `editing.directions.ALIGNMENTS`; "words"
    compares sentence i with sentence i. Texts without a fixed length have no mean: the direction holds the words then, see
    `host.text.exchange`. Raises ValueError where words cannot be compared.
    """
    require_clip(clip)
    progress = comfy.utils.ProgressBar(len(source_sentences) + len(target_sentences))
    length = chunk_length(clip)
    names = encoder_fingerprint(clip), source, target
    if length is None:
        show(WORDS_ONLY)
        pairs = zip(source_sentences, target_sentences)
        # A sentence as the name of an edit names more than what it exchanges.
        words = differing_words(source, target) if (source, target) in pairs else (source, target)
        return EditDirection({}, *names, count=0, parts=((*words, 1.0),))
    if alignment == "words":
        partners = _partners(clip, source_sentences, target_sentences, length)
        sides = (_encode_numbered(clip, side, progress) for side in (source_sentences, target_sentences))
        return aligned_direction(*sides, partners, length, tuple(names))
    sides = (encode_sentences(clip, side, progress) for side in (source_sentences, target_sentences))
    return edit_direction(*sides, length, *names)


def _partners(clip: CLIP, sources: Sequence[str], targets: Sequence[str], length: int) -> list[Partners]:
    if len(sources) != len(targets):
        raise ValueError(
            f"alignment: words are compared line by line, but there are {len(sources)} source_sentences and "
            f"{len(targets)} target_sentences. Write as many, each the partner of the other, or choose positions."
        )
    partners = []
    for before, after in zip(sources, targets):
        comfy.model_management.throw_exception_if_processing_interrupted()
        prompts = tokenize(clip, before, "source_sentences"), tokenize(clip, after, "target_sentences")
        partners.append(partner_rows(*prompts, length))
    return partners


def encode_sentences(
    clip: CLIP, sentences: Sequence[str], progress: comfy.utils.ProgressBar | None = None
) -> Iterator[Encoding]:
    """Encode sentences as CLIPTextEncode would, many at a time; yields dicts of float tensors with n rows each.

    "cond" [n, tokens, width] and, where the encoder has one, "pooled_output" [n, width]. Sentences of one batch have
    the same number of chunks; order between batches is not kept. Respects CLIP skip, LoRA patches and offloading. Can
    be cancelled between batches.
    """
    for _, encodings in _encode_numbered(clip, sentences, progress):
        yield encodings


def _encode_numbered(
    clip: CLIP, sentences: Sequence[str], progress: comfy.utils.ProgressBar | None
) -> Iterator[NumberedEncoding]:
    _refuse_scheduled_hooks(clip)
    batched, alone = _group_by_layout(_tokens(clip, sentences))
    for layout, group in batched.items():
        rows = max(count for _, count, _ in layout)
        step = max(1, ROWS_PER_BATCH // rows)
        for start in range(0, len(group), step):
            comfy.model_management.throw_exception_if_processing_interrupted()
            numbers, batch = zip(*group[start : start + step])
            encodings = _encode_together(clip, batch) if len(batch) > 1 else _encode_alone(clip, batch[0])
            # Encoders of other shapes may mix rows: the first batch proves that together equals one by one.
            proven = start > 0 or len(batch) == 1
            if encodings is None or not (proven or _agrees(encodings, _encode_alone(clip, batch[-1]))):
                logging.info("pix2pix-zero: this text encoder takes one sentence at a time")
                alone += group[start:]
                break
            yield numbers, encodings
            _advance(progress, len(batch))
    for number, tokens in alone:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield (number,), _encode_alone(clip, tokens)
        _advance(progress, 1)


def _tokens(clip: CLIP, sentences: Sequence[str]) -> Iterator[Tokens]:
    for sentence in sentences:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield clip.tokenize(sentence)


def _advance(progress: comfy.utils.ProgressBar | None, sentences: int) -> None:
    if progress is not None:
        progress.update(sentences)
        show(SENTENCES.format(step=progress.current, steps=progress.total))


def chunk_length(clip: CLIP) -> int | None:
    """Tokens per chunk (77 for CLIP), or None for an encoder whose length follows the text."""
    lengths = set()
    for text in ("", "a photo", "a photo " * 300):
        tokens = clip.tokenize(text)
        if not _is_plain(tokens):
            return None
        lengths |= {len(row) for rows in tokens.values() for row in rows}
    return lengths.pop() if len(lengths) == 1 else None


def encoder_fingerprint(clip: CLIP) -> str:
    """Identity of a text encoder, the same in every session: classes, shapes, a sample of the weights, CLIP skip.

    LoRA patches are left out: the encoder below them counts. The sample is hashed in half precision, in which ComfyUI
    keeps text encoders.
    """
    model = clip.cond_stage_model
    digest = hashlib.sha256()
    for module in [model, *_sub_encoders(model)]:
        digest.update(type(module).__name__.encode())
    shapes = {k: tuple(v.shape) for k, v in clip.patcher.model_state_dict().items()}
    for key in sorted(shapes):
        digest.update(f"{key}{shapes[key]}".encode())
    # SD 1.x checkpoints have no text_projection, and ComfyUI then leaves it uninitialized.
    weights = sorted(k for k, shape in shapes.items() if shape and "text_projection" not in k)
    sampled = tuple(weights[:: max(1, len(weights) // 16)])
    below = clip.patcher.get_key_patches(sampled)  # once: each call lists all weights of the encoder
    for key in sampled:
        weight = below[key][0][0]
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 512)].to("cpu", torch.float16)
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return f"{type(model).__name__}-{digest.hexdigest()[:16]}-layer{_layers(clip)}"


def unlearned_words(clip: CLIP, text: str) -> list[str]:
    """The words of a text that say nothing to a text encoder. None for encoders other than the demo's, which cannot tell."""
    knows = getattr(clip.cond_stage_model, "knows", None)
    if knows is None:
        return []
    words = dict.fromkeys(re.findall(r"\w+", text))
    return [word for word in words if not knows([token for token, *_ in clip.tokenize(word)["l"][0]])]


def move_conditioning(conditioning: list, direction: EditDirection, strength: float) -> list:
    """A copy of a CONDITIONING with `strength` times the direction added to every entry; the input stays as it is.

    Raises ValueError naming the socket when the conditioning holds no text or comes from another text encoder.
    """
    check_conditioning(conditioning, "conditioning")
    if direction.words_only:
        raise ValueError(
            "clip: texts of this model have no fixed length, so the direction holds the words to exchange. Connect the CLIP and "
            "the text of the caption to clip and caption of Apply Direction."
        )
    if not math.isfinite(strength):
        raise ValueError(f"strength: {strength} is not a number. Give one between -10 and 10.")
    moved = []
    if not conditioning:
        raise ValueError("conditioning: it is empty. Connect an encoded text.")
    for cond, options in conditioning:
        if cond is None:
            raise ValueError("conditioning: one of its entries has no text to move. Encode each with CLIP Text Encode.")
        new_cond = apply_direction(cond, direction.tensors["cond"], strength, direction.added)
        if not same_encoder(cond, direction):
            raise ValueError(
                "conditioning: it was encoded by another text encoder than the direction. Make the direction with the "
                "same CLIP, in the same precision and with the same CLIP skip and LoRAs, that encoded the caption."
            )
        new_options = options.copy()
        for name, tensor in direction.tensors.items():
            if name != "cond" and torch.is_tensor(options.get(name)):
                new_options[name] = apply_direction(options[name], tensor, strength)
        moved.append([remember_base(new_cond, cond), new_options])
    return moved


def check_conditioning(conditioning: list, socket: str) -> None:
    """Raise ValueError unless every entry of a CONDITIONING is a text [B, tokens, width] of finite values."""
    if not conditioning:
        raise ValueError(f"{socket}: it is empty. Connect a text that CLIP Text Encode has encoded.")
    for text, _ in conditioning:
        if not torch.is_tensor(text) or text.ndim != 3 or not text.numel():
            found = f"shape {list(text.shape)}" if torch.is_tensor(text) else type(text).__name__
            raise ValueError(
                f"{socket}: it holds no text of [batch, tokens, width], but {found}. Connect CLIP Text Encode."
            )
        if not text.isfinite().all():
            raise ValueError(f"{socket}: it holds NaN or infinite values. Run the text encoder in fp32.")


def _sub_encoders(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if isinstance(m, ClipTokenWeightEncoder)]


def _layers(clip: CLIP) -> str:
    """The layer each encoder's output is taken from, counted from the end, whichever way it was asked for."""
    model = clip.cond_stage_model
    model.reset_clip_options()
    if clip.layer_idx is not None:
        model.set_clip_options({"layer": clip.layer_idx})
    layers = [-1 if getattr(m, "layer", "last") == "last" else m.layer_idx or m.layer for m in _sub_encoders(model)]
    model.reset_clip_options()
    return ",".join(str(layer) for layer in layers)


def _refuse_scheduled_hooks(clip: CLIP) -> None:
    if clip.patcher.forced_hooks is not None and clip.use_clip_schedule:
        raise ValueError(
            "clip: its hooks change with the sampling step, so it has no single edit direction. "
            "Connect the CLIP from before Set CLIP Hooks."
        )


def _is_plain(tokens: object) -> bool:
    """Integer tokens of weight 1 in one list of rows per encoder: what can be encoded together."""
    return isinstance(tokens, dict) and all(
        isinstance(rows, list)
        and all(isinstance(token, int) and weight == 1.0 for row in rows for token, weight in (t[:2] for t in row))
        for rows in tokens.values()
    )


def _group_by_layout(tokens: Iterable[Tokens]) -> tuple[dict[tuple, list[Numbered]], list[Numbered]]:
    """Sentences with the same number and length of rows for each encoder, and those that must be encoded alone."""
    batched: dict[tuple, list[Numbered]] = {}
    alone = []
    for numbered in enumerate(tokens):
        t = numbered[1]
        if _is_plain(t) and len({len(rows) for rows in t.values()}) == 1:
            layout = tuple((name, len(rows), tuple(len(row) for row in rows)) for name, rows in t.items())
            batched.setdefault(layout, []).append(numbered)
        else:
            alone.append(numbered)
    return batched, alone


def _encode_alone(clip: CLIP, tokens: Tokens) -> Encoding:
    encoded = clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
    return {k: v for k, v in encoded.items() if torch.is_tensor(v) and v.is_floating_point()}


def _encode_together(clip: CLIP, batch: Sequence[Tokens]) -> Encoding | None:
    """Encode sentences as the chunks of one long prompt, which ComfyUI runs through the encoder as a batch.

    The long prompt's cond is the sentences' conds end to end. Only its first pooled vector is returned by ComfyUI, so
    the others are taken from the encoders' own outputs. None when those cannot be told apart.
    """
    chunks = len(next(iter(batch[0].values())))
    pooled_rows: list[torch.Tensor] = []

    def keep_pooled(_module: torch.nn.Module, _args: tuple, output: tuple) -> None:
        if output[1] is not None:
            pooled_rows.append(output[1])

    with ExitStack() as stack:
        for encoder in _sub_encoders(clip.cond_stage_model):
            stack.callback(encoder.register_forward_hook(keep_pooled).remove)
        together = {name: [row for t in batch for row in t[name]] for name in batch[0]}
        encoded = _encode_alone(clip, together)

    cond = encoded["cond"]
    if cond.shape[0] != 1 or cond.shape[1] % len(batch):
        return None
    result = {"cond": cond.reshape(len(batch), -1, cond.shape[-1])}
    if "pooled_output" in encoded:
        pooled = _pooled_like(encoded["pooled_output"], [p[::chunks].to(cond.device) for p in pooled_rows])
        if pooled is None or pooled.shape[0] != len(batch):
            return None
        result["pooled_output"] = pooled
    return result if result.keys() == encoded.keys() else None


def _pooled_like(first: torch.Tensor, candidates: list[torch.Tensor]) -> torch.Tensor | None:
    """The encoder output, or all of them side by side, whose first row is the pooled vector ComfyUI returned."""
    if len(candidates) > 1:
        candidates = [*candidates, torch.cat(candidates, dim=-1)]
    return next((c for c in candidates if c[:1].shape == first.shape and torch.equal(c[:1], first)), None)


def _agrees(together: Encoding, alone: Encoding) -> bool:
    """Whether the last row encoded together is the one encoded alone, up to rounding."""
    return together.keys() == alone.keys() and all(
        together[k][-1:].shape == v.shape and (together[k][-1:] - v).norm() <= 1e-2 * v.norm() for k, v in alone.items()
    )
