"""The decoding loop: many rows at once, each writing text or drawing an image on its own, guidance streams as further rows.

Every row advances one position per backbone call. A row that has nothing to feed (finished, or an unconditional stream
while its row writes text) feeds padding that its mask hides. An unconditional stream restarts at each image by hiding the
columns after its prompt and starting its positions again (`backbone_rows.py`), so one cache serves all rows and streams.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from orthus import acceleration
from orthus.backbone_rows import BackboneRows, Prompt, pad_left
from orthus.sampling import LatentSampler, Sampling

if TYPE_CHECKING:
    from orthus.modeling import OrthusForConditionalGeneration

TEXT, IMAGE, FINISHED = 0, 1, 2


@dataclass(frozen=True)
class Limits:
    """What a row may still do."""

    modality: str
    max_new_tokens: int
    max_images: int
    force_image: bool


@dataclass(frozen=True)
class Drawing:
    """How latents are drawn. `prefix` `(B, P, C)`: the first latents of each row's first image."""

    guidance: float
    image_guidance: float | None
    sampling: Sampling
    noise: Tensor | None  # (B, num_images, L, C)
    generator: torch.Generator | list[torch.Generator] | None
    prefix: Tensor | None = None
    acceleration: str = "auto"


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


class DecodingLoop:
    """State of one call of `generate`: what the rows write, over the rows of all streams that the backbone is fed."""

    def __init__(
        self,
        model: "OrthusForConditionalGeneration",
        streams: list[Prompt],
        limits: Limits,
        drawing: Drawing,
        writing: Writing,
    ) -> None:
        self.model, self.limits, self.drawing, self.writing = model, limits, drawing, writing
        self.num_streams, self.num_rows = len(streams), len(streams[0].input_ids)
        self.prompt_ids = streams[0].input_ids
        self.rows = [Row() for _ in range(self.num_rows)]
        self.banned = banned_ids(model.config, self.prompt_ids.device)
        self.way = acceleration.resolve(drawing.acceleration, self.prompt_ids.device)
        self.backbone = BackboneRows(model, streams, limits.max_new_tokens, self.way, drawing.acceleration == "auto")
        self.sampler = LatentSampler(model.diffusion_head, drawing.sampling, self.way)

    def run(self, on_position: Callable[[int], None] | None) -> list[Row]:
        streamer = self.writing.streamer
        with acceleration.packed(self.model.backbone) if self.way == "packed" else nullcontext():
            if streamer is not None:
                streamer.put(self.backbone.input_ids[: self.num_rows].cpu())
            hidden = self.backbone.read_prompts()
            if self.drawing.prefix is not None:
                hidden = self._begin_image(self.drawing.prefix)
            for done in range(len(self.rows[0].tokens) + 1, self.limits.max_new_tokens + 1):
                fed = self._choose(hidden)
                if on_position is not None:
                    on_position(done)
                if fed is None:
                    break
                hidden = self.backbone.feed(*fed)
            if streamer is not None:
                streamer.end()
        return self.rows

    def _begin_image(self, latents: Tensor) -> Tensor:
        """Let every row begin an image with latents `(B, P, C)` that are given; hidden states `(streams, B, D)` after them."""
        model, config = self.model, self.model.config
        begin = torch.full((self.num_rows, 1), config.boi_token_id, device=latents.device)
        embedded = model.latent_embedding(latents, model.code_embeddings())
        embeddings = model.get_input_embeddings()(begin)
        for row in self.rows:
            row.mode, row.tokens = IMAGE, [config.boi_token_id]
            row.images.append([])
        for place, latent in enumerate([None, *latents.unbind(1)]):
            for row, value in zip(self.rows, latent if latent is not None else (), strict=False):
                row.tokens.append(config.image_token_id)
                row.images[-1].append(value)
            if self.writing.streamer is not None:
                self._stream([place] * self.num_rows, list(range(self.num_rows)), latent)
        visible = torch.ones(self.num_streams, self.num_rows, dtype=torch.long, device=latents.device)
        return self.backbone.feed(torch.cat([embeddings, embedded.to(embeddings.dtype)], 1), visible)

    def _choose(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Extend each row by one token or latent; embeddings `(B, 1, D)` to feed and where they are visible, None at the end."""
        config, model = self.model.config, self.model
        next_ids = [config.pad_token_id] * self.num_rows
        before = [len(row.tokens) for row in self.rows]
        scores = self._write_text(hidden, next_ids)
        drawing = [i for i, row in enumerate(self.rows) if row.mode == IMAGE and self._draws_latent(row, next_ids, i)]
        latents = self._draw(hidden[:, drawing], drawing) if drawing else None
        places = [len(self.rows[i].images[-1]) - 1 for i in drawing]
        for index in drawing:
            self.rows[index].tokens.append(config.image_token_id)
            self._finish_if_last_image(self.rows[index])
        if self.writing.streamer is not None:
            self._stream(before, drawing, latents)
        self._stop(scores)
        active = [row.mode != FINISHED for row in self.rows]
        if not any(active):
            return None
        embeddings = model.get_input_embeddings()(torch.tensor(next_ids, device=hidden.device)).unsqueeze(1)
        if latents is not None:
            first = torch.tensor(places, device=hidden.device)
            embedded = model.latent_embedding(latents.unsqueeze(1), model.code_embeddings(), first)
            embeddings[drawing] = embedded.to(embeddings.dtype)
        return embeddings, self._visible(active)

    def _write_text(self, hidden: Tensor, next_ids: list[int]) -> Tensor | None:
        """One token for each row in text mode, from hidden states `(streams, B, D)`: forced, greedy or sampled. Returns the
        scores `(B, V)` of a position at which something was written freely."""
        config = self.model.config
        writing = [i for i, row in enumerate(self.rows) if row.mode == TEXT]
        if not writing:
            return None
        scores = None
        if self.limits.modality == "image":
            chosen = [config.boi_token_id] * len(writing)
        else:
            scores = self._logits(hidden[:, writing], writing)
            scores[:, self.banned] = -torch.inf
            for index, row_scores in zip(writing, scores, strict=True):
                if not self._may_draw(self.rows[index]):
                    row_scores[config.boi_token_id] = -torch.inf
            scores = self._processed(scores, writing)
            chosen = self._pick(scores, writing)
        ends = config.end_token_ids
        for index, token in zip(writing, chosen, strict=True):
            row = self.rows[index]
            is_last_chance = self.limits.max_new_tokens - len(row.tokens) == config.num_latents + 2
            if self.limits.force_image and not row.images and self._may_draw(row) and (token in ends or is_last_chance):
                token = config.boi_token_id
            row.tokens.append(token)
            next_ids[index] = token
            if token == config.boi_token_id:
                row.mode = IMAGE
                row.images.append([])
                self.backbone.restart(index)
            elif token in ends or len(row.tokens) >= self.limits.max_new_tokens:
                row.mode = FINISHED
        return scores

    def _logits(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """Scores of the next token `(len(rows), V)`, guided in rows without an image (arXiv 2306.17806, section 3)."""
        scores = self.model.lm_head(hidden[0]).float()
        guided = [place for place, index in enumerate(rows) if self._guides_text(self.rows[index])]
        if guided:
            given = scores[guided].log_softmax(-1)
            uncond = self.model.lm_head(hidden[-1, guided]).float().log_softmax(-1)
            scores[guided] = uncond + self.writing.guidance * (given - uncond)
        return scores

    def _guides_text(self, row: Row) -> bool:
        return self.writing.guidance != 1.0 and row.mode == TEXT and not row.images

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
        pad, width = self.model.config.pad_token_id, max(len(row.tokens) for row in self.rows)
        prompts = self.backbone.input_ids[: self.num_rows]
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
                if row.mode == IMAGE and len(row.images[-1]) < self.model.config.num_latents:
                    row.images.pop()
                row.mode = FINISHED

    def _stream(self, before: list[int], drawing: list[int], latents: Tensor | None) -> None:
        """Tell the streamer the new id of every row (padding where there is none) and the new latents."""
        streamer, pad = self.writing.streamer, self.model.config.pad_token_id
        if latents is not None and hasattr(streamer, "put_latents"):
            streamer.put_latents(drawing, latents)
        new = [row.tokens[start:] for row, start in zip(self.rows, before, strict=True)]
        for place in range(max(map(len, new))):
            streamer.put(torch.tensor([ids[place] if place < len(ids) else pad for ids in new]))

    def _may_draw(self, row: Row) -> bool:
        room = self.limits.max_new_tokens - len(row.tokens)
        enough = room >= self.model.config.num_latents + 2
        return self.limits.modality != "text" and len(row.images) < self.limits.max_images and enough

    def _draws_latent(self, row: Row, next_ids: list[int], index: int) -> bool:
        """Whether a row in image mode draws now: not at begin-of-image itself, and after the last latent comes end-of-image."""
        config = self.model.config
        if next_ids[index] == config.boi_token_id:
            return False
        if len(row.images[-1]) < config.num_latents:
            return True
        row.tokens.append(config.eoi_token_id)
        next_ids[index] = config.eoi_token_id
        row.mode = TEXT
        return False

    def _finish_if_last_image(self, row: Row) -> None:
        """In image-only mode nothing follows the last latent of the last image but end-of-image."""
        complete = len(row.images[-1]) == self.model.config.num_latents
        if self.limits.modality == "image" and complete and len(row.images) == self.limits.max_images:
            row.tokens.append(self.model.config.eoi_token_id)
            row.mode = FINISHED

    def _draw(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """Next latents `(len(rows), C)` from hidden states `(streams, len(rows), D)`."""
        noise, num_latents, latents = self._noise(rows, hidden), self.model.config.num_latents, torch.empty(0)
        places = [len(self.rows[index].images[-1]) for index in rows]
        num_steps = [self.sampler.num_steps_at(place, num_latents) for place in places]
        weights = [self.sampler.guidance_at(self.drawing.guidance, place, num_latents) for place in places]
        for num in sorted(set(num_steps)):  # rows at different places of their images may take different numbers of steps
            group = [i for i, value in enumerate(num_steps) if value == num]
            guidance = torch.tensor([weights[i] for i in group], device=hidden.device).unsqueeze(-1)
            drawn = self.sampler.draw(hidden[:, group], noise[group], guidance, self.drawing.image_guidance, num)
            latents = drawn.new_empty(len(rows), drawn.shape[1]) if not len(latents) else latents
            latents[group] = drawn
        for index, latent in zip(rows, latents, strict=True):
            self.rows[index].images[-1].append(latent)
        return latents

    def _noise(self, rows: list[int], hidden: Tensor) -> Tensor:
        images = [self.rows[i].images for i in rows]
        if self.drawing.noise is not None:
            picked = [self.drawing.noise[i, len(im) - 1, len(im[-1])] for i, im in zip(rows, images, strict=True)]
            return torch.stack(picked).to(hidden.device)
        width, dtype = self.model.config.head_config.latent_dim, torch.promote_types(hidden.dtype, torch.float32)
        generator = self.drawing.generator
        if not isinstance(generator, list):
            device = generator.device if generator is not None else hidden.device
            return torch.randn(len(rows), width, generator=generator, device=device, dtype=dtype).to(hidden.device)
        draws = [torch.randn(width, generator=generator[i], device=generator[i].device, dtype=dtype) for i in rows]
        return torch.stack(draws).to(hidden.device)

    def _visible(self, active: list[bool]) -> Tensor:
        """`(streams, B)`, 1 where the next column is seen: guidance streams see it only while they guide their row."""
        guided = [row.mode == IMAGE or self._guides_text(row) for row in self.rows]
        return torch.tensor([active] + [guided] * (self.num_streams - 1), device=self.prompt_ids.device).long()


def banned_ids(config: Any, device: torch.device) -> Tensor:
    """Ids that the LM head may never write: code rows, image placeholders, end-of-image, padding, begin-of-text."""
    codes = torch.arange(config.code_offset, config.code_offset + config.num_codes, device=device)
    names = ("image_token_id", "eoi_token_id", "pad_token_id", "bos_token_id")
    return torch.cat([codes, torch.tensor([getattr(config, name) for name in names], device=device)])
