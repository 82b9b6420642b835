"""Text and pictures while they form: `for event in stream(model, processor, **inputs): ...`."""

import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from orthus.generation import OrthusGenerateOutput
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor

UNFINISHED_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class TextPiece:
    """The next characters of a row's text; all pieces of a segment joined and stripped are that segment."""

    row: int
    text: str


@dataclass(frozen=True)
class ImagePreview:
    """Picture `index` of a row with `num_drawn` of its latents, the rest grey; `is_final` when it is whole."""

    row: int
    index: int
    num_drawn: int
    is_final: bool
    picture: Image.Image


@dataclass(frozen=True)
class Finished:
    """The last event: what `generate` returned."""

    output: OrthusGenerateOutput


Event = TextPiece | ImagePreview | Finished


class Cancelled(Exception):
    """Raised inside `generate` when nobody listens any more."""


@dataclass
class _Row:
    ids: list[int] = field(default_factory=list)
    num_shown: int = 0  # characters
    num_images: int = 0
    latents: list[Tensor] = field(default_factory=list)
    has_ended: bool = False


class SegmentStreamer:
    """A `streamer` for `generate` that turns ids and latents into events.

    Args:
        emit: called with every event, in the thread of `generate`.
        check: called before every position; may raise to stop the generation.
        preview_every: a preview after every so many latents, 0 for the whole picture only.
    """

    def __init__(
        self,
        model: OrthusForConditionalGeneration,
        processor: OrthusProcessor,
        emit: Callable[[TextPiece | ImagePreview], None],
        preview_every: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        if preview_every < 0:
            raise ValueError(f"preview_every={preview_every} is negative; use 0 for whole pictures only")
        self.model, self.processor, self.emit, self.check = model, processor, emit, check
        self.preview_every = preview_every
        self.rows: list[_Row] | None = None
        self.pictures: list[list[Tensor]] = []  # of each row, the whole ones: (3, H, W), about [-1, 1]

    def put(self, value: Tensor) -> None:
        """The prompt `(B, P)` first, then ids `(B,)`: one of every row."""
        self.check()
        if self.rows is None:
            self.rows, self.pictures = [_Row() for _ in range(len(value))], [[] for _ in range(len(value))]
            return
        for index, token in enumerate(value.tolist()):
            self._hear(index, self.rows[index], token)

    def put_latents(self, rows: list[int], latents: Tensor) -> None:
        """The next latents `(len(rows), C)` of the pictures that these rows draw."""
        config = self.model.config
        for index, latent in zip(rows, latents, strict=True):
            row = (self.rows or [])[index]
            row.latents.append(latent)
            is_final = len(row.latents) == config.num_latents
            if is_final or (self.preview_every and len(row.latents) % self.preview_every == 0):
                pixels = self._pixels(row.latents)
                picture = self.processor.image_processor.postprocess(pixels)[0]
                self.emit(ImagePreview(index, row.num_images, len(row.latents), is_final, picture))
            if is_final:
                self.pictures[index].append(pixels[0])
                row.num_images, row.latents = row.num_images + 1, []

    def end(self) -> None:
        for index, row in enumerate(self.rows or []):
            self._show(index, row, is_whole=True)
        self.rows = None

    def _hear(self, index: int, row: _Row, token: int) -> None:
        config, processor = self.model.config, self.processor
        if row.has_ended or token == config.image_token_id:
            return
        row.has_ended = token in config.end_token_ids
        if row.has_ended or token == config.boi_token_id:
            self._show(index, row, is_whole=True)
            row.ids, row.num_shown = [], 0
        elif not processor.is_control(token):
            row.ids.append(token)
            self._show(index, row, is_whole=False)

    def _show(self, index: int, row: _Row, is_whole: bool) -> None:
        """Emit the characters that are new; half a character of several bytes waits for the other half."""
        text = self.processor.tokenizer.decode(row.ids, skip_special_tokens=True)
        if not is_whole:
            text = text.rstrip(UNFINISHED_CHARACTER)
        if len(text) > row.num_shown:
            self.emit(TextPiece(index, text[row.num_shown :]))
            row.num_shown = len(text)

    @torch.no_grad()
    def _pixels(self, latents: list[Tensor]) -> Tensor:
        """A picture `(1, 3, H, W)` of its first latents, grey where there are none yet."""
        config = self.model.config
        drawn = torch.stack(latents)
        rest = drawn.new_zeros(config.num_latents - len(drawn), drawn.shape[1])
        pixels = self.model.decode_image_latents(torch.cat([drawn, rest]).unsqueeze(0))
        side = math.isqrt(config.num_latents)
        known = (torch.arange(config.num_latents, device=pixels.device) < len(drawn)).view(side, side)
        patch = pixels.shape[-1] // side
        is_known = known.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        return torch.where(is_known, pixels, torch.zeros_like(pixels))


def stream(
    model: OrthusForConditionalGeneration, processor: OrthusProcessor, preview_every: int = 0, **options: Any
) -> Iterator[Event]:
    """Run `model.generate(**options)` in a thread and yield its events, [`Finished`] last.

    Leaving the loop early stops the generation at its next position. What `generate` raises is raised here.
    """
    events: queue.Queue[Event | BaseException] = queue.Queue()
    is_cancelled = threading.Event()

    def check() -> None:
        if is_cancelled.is_set():
            raise Cancelled

    def run() -> None:
        try:
            events.put(Finished(model.generate(streamer=streamer, **options)))
        except BaseException as error:
            events.put(error)

    streamer = SegmentStreamer(model, processor, events.put, preview_every, check)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Finished):
                return
    finally:
        is_cancelled.set()
        thread.join()
