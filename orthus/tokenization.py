"""Our own text tokenizer: byte-level BPE that loses no character and gives a word one token wherever it stands."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOI_TOKEN, EOI_TOKEN, SEPARATOR_TOKEN, IMAGE_TOKEN = "<boi>", "<eoi>", "<sep>", "<image>"
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", BOI_TOKEN, EOI_TOKEN, SEPARATOR_TOKEN, IMAGE_TOKEN)
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


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
