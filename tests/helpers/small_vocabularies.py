"""Small vocabularies for encoders whose own lie in their checkpoints: SentencePiece, and Mistral's BPE."""

import io

import sentencepiece
import tokenizers
import torch

SENTENCES = [
    f"a photo of a {which} {animal} on a {thing}, with the words old {which} {animal} in town"
    for which in ("fluffy", "orange", "small", "old")
    for animal in ("cat", "dog", "bird", "horse")
    for thing in ("bench", "sofa", "table")
]
# As in Mistral's the start is number 1, the padding number 11.
MISTRAL_SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"[{i}]" for i in range(5, 11)), "<pad>")
MISTRAL_TEMPLATE = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")


def sentencepiece_model(**special: int) -> torch.Tensor:
    """A model as it lies in a checkpoint. `special`: the numbers of its special tokens, such as `pad_id`, -1 for none."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=written,
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
        **special,
    )
    return torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)


def mistral_tokenizer(_: object) -> dict:
    """In the place of the host's `load_mistral_tokenizer`, which fails with newer versions of transformers: BPE over bytes."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*MISTRAL_SPECIAL, *MISTRAL_TEMPLATE],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return {"tokenizer_object": tokenizer, "legacy": False}
