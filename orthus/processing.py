"""Segments <-> tensors. `OrthusProcessor.render` is the only home of the chat template, in training and in generation.

The template: `<s>`, then for each turn its segments and the separator. A picture is begin-of-image, `num_image_tokens`
image placeholders, end-of-image.
"""

import functools
import logging
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from orthus import remote_code
from orthus.configuration import IGNORE_INDEX, OrthusConfig
from orthus.data.schema import Segment, Turn
from orthus.image_processing import OrthusImageProcessor, latents_of, remember_latents
from orthus.prompts import as_batch, as_rows, chat_turns, interleave, user_turn
from orthus.tokenization import BOI_TOKEN, EOI_TOKEN, IMAGE_TOKEN, SEPARATOR_TOKEN, build_tokenizer, split_up

__all__ = ["OrthusProcessor", "Rendered", "build_processor", "build_tokenizer"]

CACHED_TEXTS = 1 << 13
CACHED_LENGTH = 256  # characters of a text that is cached
SMALL_GUIDANCE = 2.0  # of our own small models; the published weights want more
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rendered:
    """Token ids of some turns, labels for both losses (see docs/DESIGN.md), pictures in order of appearance."""

    input_ids: list[int]
    labels: list[int]
    images: list[Image.Image]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


@functools.lru_cache(maxsize=CACHED_TEXTS)
def _encode_known(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Keyed on the tokenizer object, which must not change afterwards."""
    return _encode(tokenizer, text)


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str | None, role: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token) if token else None
    if not isinstance(token_id, int) or (token_id == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise ValueError(f"{role} = {token!r} is not in the tokenizer's vocabulary; pass the name that it uses")
    return token_id


class OrthusProcessor(ProcessorMixin):
    """Text and pictures -> model inputs, and generated ids and pixels -> text and pictures.

    Token names default to the published ones; `build_processor` uses those of our own tokenizers. Guidance pushes away
    from `unconditional_prompt` with weight `guidance`, or from `interleaved_prompt` with `interleaved_guidance`. Raises
    `ValueError` for a token that the tokenizer lacks.
    """

    def __init__(
        self,
        image_processor: OrthusImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int = 1024,
        image_token: str = "<image>",
        boi_token: str = "<racm3:break>",
        eoi_token: str = "<eoss>",
        separator_token: str = "<reserved08706>",
        unconditional_prompt: str = "Generate an image.",
        interleaved_prompt: str = "generate images",
        guidance: float = 5.0,
        interleaved_guidance: float = 3.0,
    ) -> None:
        super().__init__(image_processor, tokenizer)
        if not isinstance(image_processor, OrthusImageProcessor):
            raise ValueError(f"image_processor is a {type(image_processor).__name__}; pass an OrthusImageProcessor")
        if not isinstance(num_image_tokens, int) or num_image_tokens < 1:
            raise ValueError(f"num_image_tokens = {num_image_tokens!r}; pass the latents per image, e.g. 1024")
        tokenizer.padding_side = "left"
        self._identity = uuid.uuid4().hex  # pictures of another model's processor bring no latents
        self.num_image_tokens = num_image_tokens
        self.image_token, self.boi_token, self.eoi_token = image_token, boi_token, eoi_token
        self.separator_token, self.unconditional_prompt = separator_token, unconditional_prompt
        self.interleaved_prompt, self.guidance, self.interleaved_guidance = interleaved_prompt, guidance, interleaved_guidance
        self.image_token_id = _token_id(tokenizer, image_token, "image_token")
        self.boi_token_id = _token_id(tokenizer, boi_token, "boi_token")
        self.eoi_token_id = _token_id(tokenizer, eoi_token, "eoi_token")
        self.separator_token_id = _token_id(tokenizer, separator_token, "separator_token")
        self.bos_token_id = _token_id(tokenizer, tokenizer.bos_token or "<s>", "bos_token")
        self.pad_token_id = _token_id(tokenizer, tokenizer.pad_token or "<pad>", "pad_token")
        # Runs of blanks, which Gemma adds as tokens and spells with U+2581, are text.
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.replace("\u2581", " ").strip()}
        named = {self.image_token_id, self.boi_token_id, self.eoi_token_id, self.separator_token_id}
        named |= {self.bos_token_id, self.pad_token_id, *tokenizer.all_special_ids}
        self._control_ids = frozenset(added | named)
        self._image_ids = [self.boi_token_id, *[self.image_token_id] * num_image_tokens, self.eoi_token_id]
        self._image_labels = [*self._image_ids[:-1], IGNORE_INDEX]  # end-of-image is forced, never learned

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "OrthusProcessor":
        """A folder or hub name of ours, or a published one with Chameleon's processor files (`image_seq_length`).

        Constructor arguments in `kwargs` win over the saved ones; the others (`revision`, ...) locate the files.
        """
        names = [name for name in _SETTINGS if name in kwargs]
        overrides = {name: kwargs.pop(name) for name in names}
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "image_seq_length" in saved:
            saved["num_image_tokens"] = saved["image_seq_length"]
        settings = {name: saved[name] for name in _SETTINGS if name in saved} | overrides
        image_processor = OrthusImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if tokenizer.decode(list(_encode(tokenizer, "a b"))) != "a b":  # a byte-level file read by a SentencePiece class
            raise ValueError(f"{type(tokenizer).__name__} loses spaces; set tokenizer_class in tokenizer_config.json")
        return cls(image_processor, tokenizer, **settings)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoProcessor") -> None:
        """From now on, what is saved holds our code too; see `remote_code.register`."""
        remote_code.register(cls, auto_class)

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """As in `transformers`, and next to `processor_config.json` the code if it is registered; see `remote_code.follow`."""
        super().to_json_file(json_file_path)
        remote_code.follow(json_file_path)

    # Segments -> tensors

    def encode_text(self, text: str, may_keep: bool = False) -> tuple[int, ...]:
        """Text -> ids. Text that spells a control token stays text. Raises `ValueError` for invalid Unicode.

        `may_keep`: a short text stays in memory, to be faster the next time; never for what users write.
        """
        encode = _encode_known if may_keep and len(text) <= CACHED_LENGTH else _encode
        try:
            ids = encode(self.tokenizer, text)
        except (UnicodeEncodeError, TypeError) as error:
            raise ValueError(f"cannot tokenise {text!r}: {error}") from error
        if self._control_ids.isdisjoint(ids):
            return ids
        # The tokenizer has a control token that it does not mark as special: spell it letter by letter.
        names = [self.tokenizer.convert_ids_to_tokens(token_id) for token_id in self._control_ids.intersection(ids)]
        ids = tuple(token_id for piece in split_up(text, names) for token_id in _encode(self.tokenizer, piece))
        if not self._control_ids.isdisjoint(ids):
            raise ValueError(f"text {text!r} contains characters that are control tokens: {names}; leave them out")
        return ids

    def render(self, turns: Iterable[Turn], add_generation_prompt: bool = False) -> Rendered:
        """Turns -> ids, labels and pictures. `add_generation_prompt` asserts that the last turn is the user's: its
        separator is what makes the model speak, so nothing is added. Without it the turns are training data, whose short
        texts repeat and are kept.

        Raises `ValueError` for no turns, a turn without text or picture, or a prompt that ends with an assistant turn.
        """
        ids: list[int] = [self.bos_token_id]
        labels: list[int] = [IGNORE_INDEX]
        images: list[Image.Image] = []
        role = ""
        for turn in turns:
            role, start = turn.role, len(ids)
            is_learned = role == "assistant"
            for segment in turn.segments:
                if isinstance(segment, str):
                    text_ids = self.encode_text(segment, not add_generation_prompt) if segment else ()
                    ids += text_ids
                    labels += text_ids if is_learned else [IGNORE_INDEX] * len(text_ids)
                else:
                    images.append(segment)
                    ids += self._image_ids
                    labels += self._image_labels if is_learned else [IGNORE_INDEX] * len(self._image_ids)
            if len(ids) == start:
                raise ValueError(f"empty prompt: the {role} turn has no text or picture; add some or drop it")
            ids.append(self.separator_token_id)
            labels.append(self.separator_token_id if is_learned else IGNORE_INDEX)
        if not role:
            raise ValueError("empty prompt: there are no turns; pass at least one user turn")
        if add_generation_prompt and role != "user":
            raise ValueError(f"the last turn is the {role}'s, so there is nothing to answer; end with a user turn")
        return Rendered(ids, labels, images)

    def _batch(self, rendered: Sequence[Rendered], padding: bool | str = True, return_tensors: str = "pt") -> BatchFeature:
        """-> `input_ids (B, T)`, `attention_mask (B, T)`, and `pixel_values (N, 3, H, W)` if there are pictures."""
        if return_tensors != "pt":
            raise ValueError(f"return_tensors = {return_tensors!r}; only 'pt' is supported")
        lengths = [len(row.input_ids) for row in rendered]
        if padding not in (True, "longest", False):
            raise ValueError(f"padding = {padding!r}; pass True (left, to the longest row) or False")
        if not padding and len(set(lengths)) > 1:
            raise ValueError(f"rows of {lengths} tokens do not form a tensor; pass padding=True")
        width = max(lengths)
        rows = [[self.pad_token_id] * (width - len(row.input_ids)) + row.input_ids for row in rendered]
        masks = [[0] * (width - length) + [1] * length for length in lengths]
        data = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
        return BatchFeature(data | self._pictures([image for row in rendered for image in row.images]))

    def _pictures(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """`pixel_values` of pictures from outside, `image_latents` of generated ones; NaN there marks those given as pixels."""
        known = [latents_of(image, self._identity) for image in images]
        outside = [image for image, latents in zip(images, known, strict=True) if latents is None]
        data = {"pixel_values": self.image_processor.pixel_values(outside)} if outside else {}
        example = next((latents for latents in known if latents is not None), None)
        if example is not None:
            unknown = torch.full_like(example, torch.nan)
            data["image_latents"] = torch.stack([unknown if latents is None else latents for latents in known])
        return data

    def is_control(self, token_id: int) -> bool:
        """Whether a token is not text: special tokens, image codes."""
        return token_id in self._control_ids

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        segments: Sequence[Any] | None = None,
        turns: Any = None,
        padding: bool | str = True,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prompts -> left-padded `input_ids (B, T)`, `attention_mask (B, T)`, `pixel_values (N, 3, H, W)` if any.

        Pass one of: `text` with an image token for each of `images`; `segments`, the user's turn as a list of text and
        pictures (or a list of such lists); `turns` (or a list of such lists). Strings in `segments` and `turns` are
        always plain text. Raises `ValueError` for an empty prompt, several styles at once, or a number of image tokens
        that is not the number of images.
        """
        if sum(value is not None for value in (text, segments, turns)) != 1:
            raise ValueError("pass exactly one of text (with images), segments or turns")
        if images is not None and text is None:
            raise ValueError("images goes with text; in segments and turns the pictures stand between the strings")
        if turns is not None:
            batch = as_batch(turns)
        elif segments is not None:
            batch = [[user_turn(row)] for row in as_rows(segments)]
        else:
            batch = [[user_turn(row)] for row in interleave(text, images, self.image_token)]
        return self._batch([self.render(row, add_generation_prompt=True) for row in batch], padding, return_tensors)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        *,
        tokenize: bool = True,
        return_dict: bool = True,
        add_generation_prompt: bool = True,
        padding: bool | str = True,
        return_tensors: str = "pt",
    ) -> BatchFeature | torch.Tensor:
        """Chat messages (or a batch of such lists) -> as `__call__`; with `return_dict=False` only the `input_ids`.

        A message is `{"role": ..., "content": text or parts}`, a part `{"type": "text", "text": ...}` or
        `{"type": "image", "image": picture or path}`. Raises `ValueError` for an unknown role or content, and for
        `tokenize=False`: a template string could not tell a control token from text that spells one.
        """
        if not tokenize:
            raise ValueError("tokenize=False is not supported: turns are rendered to ids directly; use render(turns)")
        batch = chat_turns(conversation, self.image_processor.max_pixels)
        features = self._batch([self.render(row, add_generation_prompt) for row in batch], padding, return_tensors)
        return features if return_dict else features["input_ids"]

    def unconditional(self, turns: Any, keep_images: bool = False, prompt: str | None = None) -> BatchFeature:
        """The prompts of a guidance stream, one per prompt in `turns`: as `__call__`, without what the user asked for.

        A user turn with `prompt` (default `unconditional_prompt`), or with `keep_images` the pictures of all turns, no text.
        Raises `ValueError` where `keep_images` finds no picture.
        """
        rows: list[list[Any]] = []
        for place, row in enumerate(as_batch(turns)):
            kept = [part for turn in row for part in turn.segments if not isinstance(part, str)]
            if keep_images and not kept:
                raise ValueError(f"prompt {place} has no picture to keep; use keep_images=False for it")
            rows.append(kept if keep_images else [self.unconditional_prompt if prompt is None else prompt])
        return self._batch([self.render([user_turn(row)], add_generation_prompt=True) for row in rows])

    def guidance_streams(
        self,
        turns: Any,
        guidance: float | None = None,
        image_guidance: float | None = None,
        text_guidance: float = 1.0,
        interleaved: bool = False,
    ) -> dict[str, Any]:
        """The arguments of `generate` for guidance: two streams, or three with `image_guidance` (every row has a picture).

        guidance: None for the processor's own, which is the published one unless the checkpoint says otherwise.
        interleaved: push away from `interleaved_prompt`, for text in which pictures appear.
        """
        default = self.interleaved_guidance if interleaved else self.guidance
        prompt = self.interleaved_prompt if interleaved else self.unconditional_prompt
        streams: dict[str, Any] = {"guidance": default if guidance is None else guidance}
        streams["negative_input_ids"] = self._batch([self.render([user_turn([prompt])], True)])["input_ids"]
        if text_guidance != 1.0:
            streams["text_guidance"] = text_guidance
        if image_guidance is not None:
            pictures = self.unconditional(turns, keep_images=True)
            streams["image_guidance"] = image_guidance
            streams["image_negative_input_ids"] = pictures["input_ids"]
            streams["image_negative_attention_mask"] = pictures["attention_mask"]
        return streams

    # Tensors -> segments

    def decode_segments(self, output: Any) -> list[list[Segment]]:
        """Generated `sequences (B, T)` and per row `pixel_values (num_images, 3, H, W)` or None -> segments.

        `sequences` are without the prompt. Pictures remember the latents that they were decoded from, and the processor passes
        these on where such a picture, unchanged, is part of a prompt: nothing is encoded again. Text is stripped, empty text
        dropped; a row ends at its separator. A picture that was cut short is dropped with a warning.
        Raises `ValueError` if a row has more or fewer pictures in one than in the other.
        """
        pixels = getattr(output, "pixel_values", None)
        latents = getattr(output, "image_latents", None) or [()] * len(output.sequences)
        pixels = [None] * len(output.sequences) if pixels is None else pixels
        if len(pixels) != len(output.sequences):
            raise ValueError(f"{len(output.sequences)} sequences but {len(pixels)} pixel_values; pass one each")
        rows = [[int(token_id) for token_id in row] for row in output.sequences]
        return [self._decode_row(*entries) for entries in zip(rows, pixels, latents, strict=True)]

    def _decode_row(
        self, ids: list[int], pixel_values: torch.Tensor | None, latents: torch.Tensor | Sequence[torch.Tensor]
    ) -> list[Segment]:
        has_pixels = pixel_values is not None and len(pixel_values) > 0
        pictures = self.image_processor.postprocess(pixel_values) if has_pixels else []
        for picture, latent in zip(pictures, latents, strict=False):
            remember_latents(picture, latent, self._identity)
        chunks, num_cut = self._chunks(ids)
        found = sum(chunk is None for chunk in chunks)
        if num_cut:
            logger.warning("dropped a picture that was cut short before its %d placeholders", self.num_image_tokens)
        if not found <= len(pictures) <= found + num_cut:
            raise ValueError(f"a row's sequences hold {found} whole pictures but its pixel_values {len(pictures)}")
        remaining = iter(pictures)
        segments: list[Segment] = []
        for chunk in chunks:
            if chunk is None:
                segments.append(next(remaining))
            elif text := self.tokenizer.decode(chunk, skip_special_tokens=True).strip():
                segments.append(text)
        return segments

    def _chunks(self, ids: list[int]) -> tuple[list[list[int] | None], int]:
        """Ids of one row -> runs of text ids with None for each whole picture, and how many pictures were cut short."""
        ends = {self.separator_token_id, self.tokenizer.eos_token_id, self.pad_token_id}
        chunks: list[list[int] | None] = [[]]
        num_cut, position = 0, 0
        while position < len(ids) and ids[position] not in ends:
            token_id = ids[position]
            position += 1
            if token_id == self.boi_token_id:
                found = ids[position : position + self.num_image_tokens]
                num_latents = next((k for k, other in enumerate(found) if other != self.image_token_id), len(found))
                position += num_latents
                is_whole = num_latents == self.num_image_tokens
                num_cut += not is_whole
                chunks += [None, []] if is_whole else [[]]
            elif token_id not in self._control_ids:
                chunks[-1].append(token_id)  # type: ignore[union-attr]  # the last chunk is always text
        return chunks, num_cut


_SETTINGS = ("num_image_tokens", "image_token", "boi_token", "eoi_token", "separator_token", "unconditional_prompt",
             "interleaved_prompt", "guidance", "interleaved_guidance")  # fmt: skip


def build_processor(
    corpus: Iterable[str], vocab_size: int, image_size: int, num_image_tokens: int, unconditional_prompt: str
) -> OrthusProcessor:
    """A processor with our own tokenizer trained on `corpus`, for square pictures of `image_size` pixels."""
    return OrthusProcessor(
        OrthusImageProcessor(size=image_size),
        build_tokenizer(corpus, vocab_size),
        num_image_tokens=num_image_tokens,
        image_token=IMAGE_TOKEN,
        boi_token=BOI_TOKEN,
        eoi_token=EOI_TOKEN,
        separator_token=SEPARATOR_TOKEN,
        unconditional_prompt=unconditional_prompt,
        interleaved_prompt=unconditional_prompt,
        guidance=SMALL_GUIDANCE,
        interleaved_guidance=SMALL_GUIDANCE,
    )


_backends: dict[str, type] = dict.fromkeys(("pil", "torchvision"), OrthusImageProcessor)  # whichever is asked for
AutoImageProcessor.register(OrthusConfig, image_processor_classes=_backends, exist_ok=True)
AutoProcessor.register(OrthusConfig, OrthusProcessor, exist_ok=True)
