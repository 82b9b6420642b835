"""Our own text tokenizer: byte-level BPE that loses no character and gives a word one token wherever it stands; and what the
tokenizer of a pretrained language model lacks."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BOI_TOKEN, EOI_TOKEN, SEPARATOR_TOKEN, IMAGE_TOKEN = "<boi>", "<eoi>", "<sep>", "<image>"
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", BOI_TOKEN, EOI_TOKEN, SEPARATOR_TOKEN, IMAGE_TOKEN)
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
BOS_TOKENS = ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>")


def build_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains on `corpus`; ids 0..7 are `SPECIAL_TOKENS`, then 256 bytes, then merges: up to `vocab_size` in all.

    One space is put before every text and one taken off when decoding, so that "circle" is the same token at the start
    of a text and inside it, and `decode(encode(x)) == x` for all text. Deterministic in the corpus. Pads on the left.
    Raises `ValueError` for a `vocab_size` below 264 or an empty corpus.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size = {vocab_size} cannot hold {len(SPECIAL_TOKENS)} special tokens and 256 bytes; "
                         f"pass at least {MIN_VOCAB_SIZE}")  # fmt: skip
    texts = list(corpus)
    if not any(texts):
        raise ValueError("corpus holds no text; pass the captions and questions that the model will read")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Prepend(" ")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Gives the tokenizer of a language model what Orthus needs, in place; returns the ids that are new, none the second time.

    The four tokens of pictures and turns get ids of their own after all others, unless the vocabulary holds them. A tokenizer
    without begin-of-text (Qwen) takes the first of `BOS_TOKENS` that it holds, which stood between its texts, else its
    end-of-text, else a new `<s>`. Without padding it gets a new `<pad>`, without end-of-text the separator, which ends a turn.
    It pads on the left, and its chat template goes: `OrthusProcessor.render` is the template.
    """
    known = set(tokenizer.get_vocab().values())
    added: dict[str, Any] = {"additional_special_tokens": [BOI_TOKEN, EOI_TOKEN, SEPARATOR_TOKEN, IMAGE_TOKEN]}
    if tokenizer.bos_token is None:
        held = [token for token in (*BOS_TOKENS, tokenizer.eos_token) if token in tokenizer.get_vocab()]
        added["bos_token"] = held[0] if held else BOS_TOKENS[0]
    if tokenizer.pad_token is None:
        added["pad_token"] = "<pad>"
    if tokenizer.eos_token is None:
        added["eos_token"] = SEPARATOR_TOKEN
    tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
    tokenizer.padding_side, tokenizer.chat_template = "left", None
    return sorted(set(tokenizer.get_vocab().values()) - known)


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest id: what embeddings must hold, even if some ids below stand for nothing."""
    return max(tokenizer.get_vocab().values()) + 1


def split_up(text: str, names: list[str]) -> list[str]:
    """Cuts `text` so that every occurrence of a name falls apart into single characters."""
    pieces = [text]
    for name in names:
        pieces = [part for piece in pieces for part in _around(piece, name)]
    return pieces


def _around(text: str, name: str) -> list[str]:
    first, *others = text.split(name)
    return [part for part in [first, *(part for other in others for part in [*name, other])] if part]
