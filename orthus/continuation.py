"""The rules of decoding: what the rows of one call of `generate`, or of one request, may write and draw next.

Every row is in one of three modes and is extended by one token or latent per position. What is computed for many of them at once
(logits, latents, the backbone) is the business of `decoding.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from orthus.backbone_rows import Prompt, pad_left
from orthus.sampling import Sampling

TEXT, IMAGE, FINISHED = 0, 1, 2


@dataclass(frozen=True)
class Limits:
    """What a row may still do."""

    modality: str
    max_new_tokens: int
    max_images: int
    force_image: bool


class PromptTooLong(ValueError):
    """A prompt of `length` positions with what is wanted after it is more than the `limit` of the backbone."""

    def __init__(self, message: str, length: int, limit: int) -> None:
        super().__init__(message)
        self.length, self.limit = length, limit


@dataclass(frozen=True)
class Drawing:
    """How latents are drawn. `prefix` `(B, P, C)`: the first latents of each row's first image."""

    guidance: float
    image_guidance: float | None
    sampling: Sampling
    noise: Tensor | None  # (B, num_images, L, C)
    generator: torch.Generator | list[torch.Generator] | None
    prefix: Tensor | None = None


@dataclass(frozen=True)
class Writing:
    """How tokens are chosen: the likeliest of the processed scores, or `choice` among them. `guidance` acts until a row's first
    image. What `transformers` calls processors and criteria sees the prompt and what was written."""

    processors: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    choice: "RandomChoice | None" = None
    guidance: float = 1.0
    streamer: Any = None


class RandomChoice:
    """A last logits processor whose argmax is a draw from the softmax of the scores (Gumbel-max): with a generator per row the
    draws of a row do not depend on the others."""

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None) -> None:
        self.generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.choose(scores, range(len(scores)))

    def choose(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """Scores `(len(rows), V)` of these rows of the batch with Gumbel noise."""
        one = None if isinstance(self.generator, list) else self.generator
        given = [self.generator[row] for row in rows] if isinstance(self.generator, list) else [one] * len(rows)
        draws = [torch.rand(scores.shape[-1], generator=g, device=g.device if g else scores.device) for g in given]
        uniform = torch.stack(draws).to(scores.device).clamp(min=torch.finfo(torch.float32).tiny)
        return scores.float() - (-uniform.log()).log()


@dataclass
class Row:
    """What one row has written so far."""

    mode: int = TEXT
    tokens: list[int] = field(default_factory=list)
    images: list[list[Tensor]] = field(default_factory=list)


class Continuation:
    """Rows that continue the prompts of `streams` together, and how far they are.

    At each position: `begin_position`, `write` for the rows in text mode, `rows_that_draw` and `receive` for their latents,
    `end_position`. `next_ids` and `drawn` then say what is fed; `report_position` tells those who wait.
    """

    def __init__(
        self,
        config: Any,
        streams: list[Prompt],
        limits: Limits,
        drawing: Drawing,
        writing: Writing,
        on_position: Callable[[int], None] | None = None,
    ) -> None:
        self.config, self.prompts, self.limits, self.drawing, self.writing = config, streams, limits, drawing, writing
        self.num_streams, self.num_rows = len(streams), len(streams[0].input_ids)
        width = max(stream.input_ids.shape[1] for stream in streams)
        self.prompt_ids = pad_left(streams[0].input_ids, width, config.pad_token_id)
        self.rows = [Row() for _ in range(self.num_rows)]
        self.banned = banned_ids(config, self.prompt_ids.device)
        self.on_position = on_position
        self.num_positions = 0
        self.next_ids: list[int] = []
        self.drawn: list[int] = []  # rows that draw a latent at this position
        self._before: list[int] = []

    @property
    def is_done(self) -> bool:
        return all(row.mode == FINISHED for row in self.rows)

    def begin_position(self) -> None:
        self.next_ids = [self.config.pad_token_id] * self.num_rows
        self.drawn, self._before = [], [len(row.tokens) for row in self.rows]

    def begin_image(self, latents: Tensor) -> None:
        """Let every row begin an image with latents `(B, P, C)` that are given."""
        for row in self.rows:
            row.mode, row.tokens = IMAGE, [self.config.boi_token_id]
            row.images.append([])
        self.num_positions = 1 + latents.shape[1]
        for place, latent in enumerate([None, *latents.unbind(1)]):
            for row, value in zip(self.rows, latent if latent is not None else (), strict=False):
                row.tokens.append(self.config.image_token_id)
                row.images[-1].append(value)
            self._before = [place] * self.num_rows
            self._stream(list(range(self.num_rows)), latent)

    def rows_that_write(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.mode == TEXT]

    def guides_text(self, index: int) -> bool:
        """Whether the row's words are guided (arXiv 2306.17806, section 3): before its first image."""
        row = self.rows[index]
        return self.writing.guidance != 1.0 and row.mode == TEXT and not row.images

    def write(self, rows: list[int], scores: Tensor | None) -> tuple[list[int], Tensor | None]:
        """One token for each of `rows`: forced, greedy or sampled, by scores `(len(rows), V)` where it is free. Returns the rows
        that begin an image, and the processed scores `(B, V)` for [`end_position`]."""
        config, processed = self.config, None
        if scores is None:
            chosen = [config.boi_token_id] * len(rows)
        else:
            scores[:, self.banned] = -torch.inf
            for index, row_scores in zip(rows, scores, strict=True):
                if not self._may_draw(self.rows[index]):
                    row_scores[config.boi_token_id] = -torch.inf
            processed = self._processed(scores, rows)
            chosen = self._pick(processed, rows)
        begun = []
        for index, token in zip(rows, chosen, strict=True):
            row = self.rows[index]
            is_last_chance = self.limits.max_new_tokens - len(row.tokens) == config.num_latents + 2
            is_end = token in config.end_token_ids
            if self.limits.force_image and not row.images and self._may_draw(row) and (is_end or is_last_chance):
                token, is_end = config.boi_token_id, False
            row.tokens.append(token)
            self.next_ids[index] = token
            if token == config.boi_token_id:
                row.mode = IMAGE
                row.images.append([])
                begun.append(index)
            elif is_end or self._is_full(row):
                row.mode = FINISHED
        return begun, processed

    def rows_that_draw(self) -> list[int]:
        """Rows in image mode that draw now: not at begin-of-image itself, and after the last latent comes end-of-image."""
        self.drawn = [i for i, row in enumerate(self.rows) if row.mode == IMAGE and self._draws_latent(row, i)]
        return self.drawn

    def noise(self, rows: list[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Standard normal draws `(len(rows), C)` for the next latents of `rows`."""
        generator = self.drawing.generator
        if self.drawing.noise is not None:
            images = [self.rows[i].images for i in rows]
            picked = [self.drawing.noise[i, len(im) - 1, len(im[-1])] for i, im in zip(rows, images, strict=True)]
            return torch.stack(picked).to(device)
        width = self.config.head_config.latent_dim
        if not isinstance(generator, list):
            own = generator.device if generator is not None else device
            return torch.randn(len(rows), width, generator=generator, device=own, dtype=dtype).to(device)
        draws = [torch.randn(width, generator=generator[i], device=generator[i].device, dtype=dtype) for i in rows]
        return torch.stack(draws).to(device)

    def receive(self, latents: Tensor) -> None:
        """The next latents `(n, C)` of the rows that draw."""
        for index, latent in zip(self.drawn, latents, strict=True):
            row = self.rows[index]
            row.images[-1].append(latent)
            row.tokens.append(self.config.image_token_id)
            self._finish_if_last_image(row)

    def end_position(self, scores: Tensor | None, latents: Tensor | None) -> None:
        """Tell the streamer what is new, and end the rows at which a criterion asks for it."""
        self._stream(self.drawn, latents)
        self._stop(scores)

    def report_position(self) -> None:
        self.num_positions += 1
        if self.on_position is not None:
            self.on_position(self.num_positions)
        if self.is_done and self.writing.streamer is not None:
            self.writing.streamer.end()

    def visible(self) -> list[bool]:
        """Where the next column is seen, stream after stream: guidance streams see it only while they guide their row."""
        active = [row.mode != FINISHED for row in self.rows]
        guided = [row.mode == IMAGE or self.guides_text(index) for index, row in enumerate(self.rows)]
        return active + guided * (self.num_streams - 1)

    def _processed(self, scores: Tensor, rows: list[int]) -> Tensor:
        """Scores `(B, V)` from those of `rows`. Processors see every row at its place in the batch, zeros for the others."""
        full = scores.new_zeros(self.num_rows, scores.shape[-1])
        full[rows] = scores
        return self.writing.processors(cast(Any, self._history()), cast(Any, full)) if self.writing.processors else full

    def _pick(self, scores: Tensor, rows: list[int]) -> list[int]:
        """The next token of each of `rows`, by processed scores `(B, V)`."""
        chosen, choice = scores[rows], self.writing.choice
        return (chosen if choice is None else choice.choose(chosen, rows)).argmax(-1).tolist()

    def _history(self) -> Tensor:
        """Ids `(B, T)` of the prompts and of all that was written, padded on the left."""
        pad, width = self.config.pad_token_id, max(len(row.tokens) for row in self.rows)
        prompts = self.prompt_ids
        written = [torch.tensor(row.tokens, dtype=torch.long, device=prompts.device) for row in self.rows]
        full = [torch.cat([prompt, ids]) for prompt, ids in zip(prompts, written, strict=True)]
        return torch.cat([pad_left(ids.unsqueeze(0), prompts.shape[1] + width, pad) for ids in full])

    def _stop(self, scores: Tensor | None) -> None:
        """End the rows at which a stopping criterion asks for it; a picture that is not whole by then is dropped."""
        if not self.writing.stopping_criteria:
            return
        is_done = self.writing.stopping_criteria(cast(Any, self._history()), cast(Any, scores))
        for row, done in zip(self.rows, cast(Tensor, is_done).tolist(), strict=True):
            if done and row.mode != FINISHED:
                if row.mode == IMAGE and len(row.images[-1]) < self.config.num_latents:
                    row.images.pop()
                row.mode = FINISHED

    def _stream(self, drawn: list[int], latents: Tensor | None) -> None:
        """Tell the streamer the new id of every row (padding where there is none) and the new latents."""
        streamer, pad = self.writing.streamer, self.config.pad_token_id
        if streamer is None:
            return
        if latents is not None and hasattr(streamer, "put_latents"):
            streamer.put_latents(drawn, latents)
        new = [row.tokens[start:] for row, start in zip(self.rows, self._before, strict=True)]
        for place in range(max(map(len, new))):
            streamer.put(torch.tensor([ids[place] if place < len(ids) else pad for ids in new]))

    def _may_draw(self, row: Row) -> bool:
        room = self.limits.max_new_tokens - len(row.tokens)
        enough = room >= self.config.num_latents + 2
        return self.limits.modality != "text" and len(row.images) < self.limits.max_images and enough

    def _is_full(self, row: Row) -> bool:
        return len(row.tokens) >= self.limits.max_new_tokens

    def _draws_latent(self, row: Row, index: int) -> bool:
        if self.next_ids[index] == self.config.boi_token_id:
            return False
        if len(row.images[-1]) < self.config.num_latents:
            return True
        row.tokens.append(self.config.eoi_token_id)
        self.next_ids[index] = self.config.eoi_token_id
        row.mode = FINISHED if self._is_full(row) else TEXT
        return False

    def _finish_if_last_image(self, row: Row) -> None:
        """In image-only mode nothing follows the last latent of the last image but end-of-image."""
        complete = len(row.images[-1]) == self.config.num_latents
        if self.limits.modality == "image" and complete and len(row.images) == self.limits.max_images:
            row.tokens.append(self.config.eoi_token_id)
            row.mode = FINISHED


def banned_ids(config: Any, device: torch.device) -> Tensor:
    """Ids that the LM head may never write: code rows, image placeholders, end-of-image, padding, begin-of-text."""
    codes = torch.arange(config.code_offset, config.code_offset + config.num_codes, device=device)
    names = ("image_token_id", "eoi_token_id", "pad_token_id", "bos_token_id")
    return torch.cat([codes, torch.tensor([getattr(config, name) for name in names], device=device)])
