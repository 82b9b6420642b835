"""The decoding loop: rows of several continuations at once, each writing text or drawing an image on its own.

Every row advances one position per backbone call. A row that has nothing to feed (finished, or an unconditional stream while its
row writes text) feeds padding that its mask hides. Continuations may join and leave between positions; what `generate` runs is
this loop with one continuation that stays to its end.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthus import acceleration as ways
from orthus.backbone_rows import BackboneRows
from orthus.continuation import Continuation, Row
from orthus.sampling import LatentSampler, Sampling

if TYPE_CHECKING:
    from orthus.modeling import OrthusForConditionalGeneration

MAX_SAMPLERS = 8  # kept for continuations to come


@dataclass
class _Member:
    """A continuation in the loop. Its lines (a line is one stream of one row, a row of the backbone) are consecutive,
    stream-major, from `start` on."""

    continuation: Continuation
    sampler: LatentSampler
    start: int

    def lines(self, rows: Sequence[int], stream: int = 0) -> list[int]:
        return [self.start + stream * self.continuation.num_rows + row for row in rows]

    def __len__(self) -> int:
        return self.continuation.num_streams * self.continuation.num_rows


@dataclass(frozen=True)
class Reading:
    """A continuation whose prompts have been read, with the hidden states `(lines, D)` after them."""

    continuation: Continuation
    sampler: LatentSampler
    backbone: BackboneRows
    hidden: Tensor


@dataclass(frozen=True)
class _Draw:
    """A row that draws, the `number`-th one of its continuation."""

    member: _Member
    number: int
    row: int
    place: int  # raster index of the latent
    noise: Tensor  # (C,)


def run(model: "OrthusForConditionalGeneration", continuation: Continuation, acceleration: str) -> list[Row]:
    """One continuation by itself, to its end."""
    loop = DecodingLoop(model, acceleration, continuation.prompt_ids.device)
    with loop.ready():
        loop.join(loop.read(continuation))
        while not loop.advance():
            pass
    return continuation.rows


class DecodingLoop:
    """What the rows of all continuations have been fed, and what comes next.

    Args:
        acceleration: as in `generate`.
        is_shared: continuations join one another; the backbone's cache then is never a static one.
    """

    def __init__(
        self, model: "OrthusForConditionalGeneration", acceleration: str, device: torch.device, is_shared: bool = False
    ) -> None:
        self.model, self.is_shared = model, is_shared
        self.way = ways.resolve(acceleration, device)
        self.may_fall_back = acceleration == "auto"
        self.members: list[_Member] = []
        self.backbone: BackboneRows | None = None
        self.hidden = torch.empty(0)  # (lines, D) of the last column
        self.samplers: dict[Sampling, LatentSampler] = {}

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within it the backbone runs as fast as it may; weights must not change."""
        with ways.packed(self.model.backbone) if self.way == "packed" else nullcontext():
            yield

    def read(self, new: Continuation) -> Reading:
        """Read the prompts of a continuation, which may then join. Raises ValueError for a sampler that the head cannot have."""
        sampler = self._sampler(new.drawing.sampling)
        if new.writing.streamer is not None:
            new.writing.streamer.put(new.prompt_ids.cpu())
        way = "none" if self.is_shared else self.way
        backbone = BackboneRows(self.model, new.prompts, new.limits.max_new_tokens, way, self.may_fall_back)
        hidden = backbone.read_prompts().flatten(0, 1)
        if new.drawing.prefix is not None:
            hidden = self._begin_image(backbone, new, new.drawing.prefix)
        return Reading(new, sampler, backbone, hidden)

    def join(self, new: Reading) -> None:
        """From now on its rows advance with those that are here. An error, of memory say, leaves those as they were."""
        if self.backbone is None:
            self.backbone, self.hidden = new.backbone, new.hidden
        else:
            hidden = torch.cat([self.hidden, new.hidden])
            self.backbone.join(new.backbone)
            self.hidden = hidden
        self.members.append(_Member(new.continuation, new.sampler, len(self.hidden) - len(new.hidden)))

    def leave(self, leaving: Collection[Continuation]) -> None:
        """Take continuations out, done or not."""
        staying = [member for member in self.members if member.continuation not in leaving]
        kept = [line for member in staying for line in range(member.start, member.start + len(member))]
        self.members = staying
        if not staying:
            self.backbone, self.hidden = None, torch.empty(0)
        elif len(kept) < len(self.hidden):
            assert self.backbone is not None
            self.backbone.keep(kept)
            self.hidden = self.hidden[kept]
        start = 0
        for member in staying:
            member.start, start = start, start + len(member)

    def advance(self) -> list[Continuation]:
        """One position: each row writes a token or draws a latent. Returns the continuations that are done; they leave."""
        members = self.members
        for member in members:
            member.continuation.begin_position()
        scores, latents = self._write(), self._draw()
        for member, written, drawn in zip(members, scores, latents, strict=True):
            member.continuation.end_position(written, drawn)
        done = [member.continuation for member in members if member.continuation.is_done]
        fed = [(member, drawn) for member, drawn in zip(members, latents, strict=True) if not member.continuation.is_done]
        inputs = self._inputs(fed) if fed else None
        for member in members:
            member.continuation.report_position()
        if done:
            self.leave(done)
        if inputs is not None:
            assert self.backbone is not None
            self.hidden = self.backbone.feed(*inputs)
        return done

    def _sampler(self, sampling: Sampling) -> LatentSampler:
        """The sampler of these settings, one of the last few. Raises ValueError for settings that the head cannot have."""
        key, core = self.model.diffusion_head.resolve(sampling), next((one.core for one in self.samplers.values()), None)
        found = self.samplers.pop(key, None) or LatentSampler(self.model.diffusion_head, sampling, self.way, core)
        self.samplers[key] = found  # what was used last goes last
        if len(self.samplers) > MAX_SAMPLERS:
            del self.samplers[next(iter(self.samplers))]
        return found

    def _begin_image(self, own: BackboneRows, new: Continuation, latents: Tensor) -> Tensor:
        """Let every row of a continuation begin an image with latents `(B, P, C)` that are given; hidden states `(lines, D)`."""
        model = self.model
        new.begin_image(latents)
        begin = torch.full((new.num_rows, 1), model.config.boi_token_id, device=latents.device)
        embeddings = model.get_input_embeddings()(begin)
        embedded = model.latent_embedding(latents, model.code_embeddings()).to(embeddings.dtype)
        visible = torch.ones(new.num_streams * new.num_rows, dtype=torch.long, device=latents.device)
        return own.feed(torch.cat([embeddings, embedded], 1).repeat(new.num_streams, 1, 1), visible)

    def _write(self) -> list[Tensor | None]:
        """Let the rows in text mode write. Processed scores `(B, V)` of each continuation that did so freely."""
        rows = [member.continuation.rows_that_write() for member in self.members]
        is_free = [bool(r) and m.continuation.limits.modality != "image" for m, r in zip(self.members, rows, strict=True)]
        free = [(member, index) for member, r, f in zip(self.members, rows, is_free, strict=True) if f for index in r]
        logits = iter(self._logits(free).split([len(r) for r, f in zip(rows, is_free, strict=True) if f]) if free else ())
        processed: list[Tensor | None] = []
        for member, writing, freely in zip(self.members, rows, is_free, strict=True):
            begun, scores = member.continuation.write(writing, next(logits) if freely else None)
            processed.append(scores)
            again = [line for stream in range(1, member.continuation.num_streams) for line in member.lines(begun, stream)]
            if again:
                assert self.backbone is not None
                self.backbone.restart(again)
        return processed

    def _logits(self, places: list[tuple[_Member, int]]) -> Tensor:
        """Scores of the next token `(len(places), V)`, guided in rows without an image (arXiv 2306.17806, section 3)."""
        scores: Tensor = self.model.lm_head(self.hidden[[member.lines([row])[0] for member, row in places]]).float()
        guided = [k for k, (member, row) in enumerate(places) if member.continuation.guides_text(row)]
        if guided:
            chosen = [places[k] for k in guided]
            weights = [[member.continuation.writing.guidance] for member, _ in chosen]
            last = [member.lines([row], member.continuation.num_streams - 1)[0] for member, row in chosen]
            given = scores[guided].log_softmax(-1)
            uncond = self.model.lm_head(self.hidden[last]).float().log_softmax(-1)
            scores[guided] = uncond + torch.tensor(weights, device=scores.device) * (given - uncond)
        return scores

    def _draw(self) -> list[Tensor | None]:
        """Next latents `(n, C)` of each continuation that draws, in one call for rows with the same settings, number of diffusion
        steps and number of streams."""
        num_latents, results = self.model.config.num_latents, list[Tensor | None]()
        groups: dict[tuple[int, int, int], list[tuple[_Draw, Tensor]]] = {}
        for member in self.members:
            one = member.continuation
            rows = one.rows_that_draw()
            if not rows:
                results.append(None)
                continue
            noise = one.noise(rows, self.hidden.device, torch.promote_types(self.hidden.dtype, torch.float32))
            results.append(latents := torch.empty_like(noise))
            for number, row in enumerate(rows):
                place = len(one.rows[row].images[-1])
                key = (id(member.sampler), one.num_streams, member.sampler.num_steps_at(place, num_latents))
                groups.setdefault(key, []).append((_Draw(member, number, row, place, noise[number]), latents))
        for (_, num_streams, num_steps), group in groups.items():
            drawn = self._draw_group([draw for draw, _ in group], num_streams, num_steps)
            for (draw, latents), latent in zip(group, drawn, strict=True):
                latents[draw.number] = latent
        for member, given in zip(self.members, results, strict=True):
            if given is not None:
                member.continuation.receive(given)
        return results

    def _draw_group(self, draws: list[_Draw], num_streams: int, num_steps: int) -> Tensor:
        """Latents `(len(draws), C)`."""
        sampler, num_latents, device = draws[0].member.sampler, self.model.config.num_latents, self.hidden.device
        given = [draw.member.continuation.drawing for draw in draws]
        weights = [[sampler.guidance_at(g.guidance, d.place, num_latents)] for g, d in zip(given, draws, strict=True)]
        image_weights = [[drawing.image_guidance] for drawing in given]
        image_guidance = torch.tensor(image_weights, device=device) if num_streams == 3 else None
        lines = [[draw.member.lines([draw.row], stream)[0] for draw in draws] for stream in range(num_streams)]
        hidden = self.hidden[torch.tensor(lines, device=device)]
        noise = torch.stack([draw.noise for draw in draws])
        return sampler.draw(hidden, noise, torch.tensor(weights, device=device), image_guidance, num_steps)

    def _inputs(self, fed: list[tuple[_Member, Tensor | None]]) -> tuple[Tensor, Tensor]:
        """Embeddings `(lines, 1, D)` to feed and where they are visible `(lines,)`."""
        model, device = self.model, self.hidden.device
        ids, owners, visible, drawing, places, start = [], [], [], [], [], 0
        for member, _ in fed:
            one = member.continuation
            ids += one.next_ids
            owners += list(range(start, start + one.num_rows)) * one.num_streams
            visible += one.visible()
            drawing += [start + row for row in one.drawn]
            places += [len(one.rows[row].images[-1]) - 1 for row in one.drawn]
            start += one.num_rows
        embeddings = model.get_input_embeddings()(torch.tensor(ids, device=device)).unsqueeze(1)
        latents = [drawn for _, drawn in fed if drawn is not None]
        if latents:
            first = torch.tensor(places, device=device)
            embedded = model.latent_embedding(torch.cat(latents).unsqueeze(1), model.code_embeddings(), first)
            embeddings[drawing] = embedded.to(embeddings.dtype)
        return embeddings[owners], torch.tensor(visible, device=device).long()
