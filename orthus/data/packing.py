"""Examples -> batches of full rows. Examples share rows; `position_ids` restarting at 0 tell where each begins."""

import warnings
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from orthus.configuration import IGNORE_INDEX
from orthus.data.schema import BadItem, ExampleSource
from orthus.data.sources.order import shuffled
from orthus.processing import OrthusProcessor, Rendered

MIN_SEEN = 100  # examples before a fraction of dropped ones means anything
AHEAD_PER_THREAD = 4  # examples that are read ahead


@dataclass(frozen=True)
class _Waiting:
    position: int
    task: str
    rendered: Rendered


def choose_row(lengths: list[int], row_length: int) -> list[int]:
    """Which of the waiting examples share a row: the first (so that none waits for ever), and those that fill it best.

    An exact subset sum: bit `s` of `reachable[k]` says whether some of the first `k` candidates add up to `s` tokens.
    `lengths` are in order of arrival, each at most `row_length`. Returns ascending places in `lengths`.
    """
    room = row_length - lengths[0]
    mask = (1 << (room + 1)) - 1
    reachable = [1]
    for length in lengths[1:]:
        reachable.append((reachable[-1] | reachable[-1] << length) & mask)
        if reachable[-1] >> room:  # the row is already full to the last token
            break
    total = reachable[-1].bit_length() - 1
    chosen = []
    for place in range(len(reachable) - 1, 0, -1):
        if not reachable[place - 1] >> total & 1:
            chosen.append(place)
            total -= lengths[place]
    return [0, *reversed(chosen)]


class PackedLoader:
    """Endless iterator over batches, deterministic, sharded and resumable; one per rank.

    Rank `r` reads the positions `p >= start_index` with `p % world_size == r` in order. Position `p` is `dataset[p]`; a
    dataset with a length is read at `p % len(dataset)`, or with a `seed` in a fresh permutation for each epoch. Of
    `buffer_size` waiting examples, those are put together that fill a row best.

    A batch is `input_ids`, `position_ids`, `labels`, each `(rows_per_batch, row_length)` int64, and `pixel_values
    (N, 3, H, W)` of all pictures in row-major order of their placeholders (absent if there are none). Where pictures bring
    latents, `image_latents (N, L, C)` holds these, and NaN for those given as pixels. The first label of each example is -100;
    the rest of a row is padding: an example of its own whose labels are all -100.

    An example longer than `row_length`, or one that its source calls a `BadItem`, is dropped, counted and warned about once per
    task or source; `ValueError` when more than `max_dropped_fraction` are. `num_threads` threads read and render ahead, in order:
    batches do not depend on them. `state_dict` describes the batches handed out so far: a prefetching wrapper must keep the one
    that belongs to the batch it hands out.
    """

    def __init__(
        self,
        dataset: ExampleSource,
        processor: OrthusProcessor,
        rows_per_batch: int,
        row_length: int,
        rank: int = 0,
        world_size: int = 1,
        start_index: int = 0,
        seed: int | None = None,
        buffer_size: int = 64,
        max_dropped_fraction: float = 0.01,
        num_threads: int = 0,
    ) -> None:
        if min(rows_per_batch, row_length, buffer_size) < 1:
            raise ValueError(f"{rows_per_batch=}, {row_length=}, {buffer_size=}; each must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank} is outside 0..{world_size - 1} (world_size = {world_size})")
        if start_index < 0 or not 0 <= max_dropped_fraction < 1:
            raise ValueError(
                f"start_index = {start_index}, max_dropped_fraction = {max_dropped_fraction}; need >= 0, and 0 <= f < 1"
            )
        try:
            self._length: int | None = len(dataset)  # type: ignore[arg-type]
        except TypeError:  # endless
            self._length = None
        if self._length == 0:
            raise ValueError("the dataset is empty; check its path or its filters")
        self.dataset, self.processor = dataset, processor
        self.rows_per_batch, self.row_length = rows_per_batch, row_length
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.buffer_size, self.max_dropped_fraction = buffer_size, max_dropped_fraction
        self._next = start_index + (rank - start_index) % world_size
        self._threads = ThreadPoolExecutor(num_threads) if num_threads else None
        self._ahead: deque[Future[_Waiting | BadItem]] = deque()  # of the positions from `_next` on
        self._max_ahead = AHEAD_PER_THREAD * num_threads
        self._waiting: list[_Waiting] = []
        self.examples: Counter[str] = Counter()  # handed out, by task
        self.dropped: Counter[str] = Counter()  # too long, by task
        self.bad: Counter[str] = Counter()  # unusable, by source
        self.num_real_tokens = 0
        self.num_tokens = 0

    @property
    def fill(self) -> float:
        """Share of tokens handed out so far that are not padding; 0 before the first batch."""
        return self.num_real_tokens / max(self.num_tokens, 1)

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        rows = [self._next_row() for _ in range(self.rows_per_batch)]
        return self._to_batch(rows)

    def _index(self, position: int) -> int:
        if self._length is None:
            return position
        epoch, index = divmod(position, self._length)
        return index if self.seed is None else shuffled(index, self._length, (self.seed, epoch))

    def _read(self, position: int) -> _Waiting | BadItem:
        index = self._index(position)
        try:
            example = self.dataset[index]
        except BadItem as bad:
            return bad
        try:
            return _Waiting(position, example.task, self.processor.render(example.turns))
        except ValueError as error:
            raise ValueError(f"example {index} of task {example.task!r}: {error}") from error

    def _take(self) -> _Waiting | BadItem:
        """What is at the next position."""
        position = self._next
        self._next += self.world_size
        if self._threads is None:
            return self._read(position)
        while len(self._ahead) < self._max_ahead:
            self._ahead.append(self._threads.submit(self._read, position + len(self._ahead) * self.world_size))
        return self._ahead.popleft().result()

    def _refill(self) -> None:
        while len(self._waiting) < self.buffer_size:
            found = self._take()
            if isinstance(found, BadItem):
                self._drop(self.bad, found.source, str(found), "repair the source, or raise max_dropped_fraction")
            elif len(found.rendered.input_ids) > self.row_length:
                what = f"an example of task {found.task!r} has {len(found.rendered.input_ids)} tokens, more than row_length"
                remedy = "raise row_length or max_dropped_fraction"
                self._drop(self.dropped, found.task, f"{what} = {self.row_length}", remedy)
            else:
                self._waiting.append(found)

    def _drop(self, counter: Counter[str], name: str, what: str, remedy: str) -> None:
        if name not in counter:
            warnings.warn(f"{what}: dropped, and more like it will be counted", stacklevel=2)
        counter[name] += 1
        num_dropped = self.dropped.total() + self.bad.total()
        seen = num_dropped + self.examples.total() + len(self._waiting)
        if num_dropped > self.max_dropped_fraction * max(seen, MIN_SEEN):
            counts = {**self.dropped, **{f"bad in {source}": number for source, number in self.bad.items()}}
            raise ValueError(f"dropped {num_dropped} of {seen} examples ({counts}); the last: {what}; {remedy}")

    def _next_row(self) -> list[_Waiting]:
        self._refill()
        chosen = choose_row([len(waiting.rendered.input_ids) for waiting in self._waiting], self.row_length)
        row = [self._waiting[place] for place in chosen]
        for place in reversed(chosen):
            del self._waiting[place]
        self.examples.update(waiting.task for waiting in row)
        return row

    def _to_batch(self, rows: list[list[_Waiting]]) -> dict[str, torch.Tensor]:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for number, row in enumerate(rows, start=1):
            for waiting in row:
                rendered = waiting.rendered
                ids += rendered.input_ids
                labels.append(IGNORE_INDEX)
                labels += rendered.labels[1:]
                positions += range(len(rendered.input_ids))
            padding = number * self.row_length - len(ids)
            self.num_real_tokens += self.row_length - padding
            ids += [self.processor.pad_token_id] * padding
            labels += [IGNORE_INDEX] * padding
            positions += range(padding)
        self.num_tokens += len(ids)
        shape = (self.rows_per_batch, self.row_length)
        batch = {
            "input_ids": torch.tensor(ids).view(shape),
            "position_ids": torch.tensor(positions).view(shape),
            "labels": torch.tensor(labels).view(shape),
        }
        images = [image for row in rows for waiting in row for image in waiting.rendered.images]
        return batch | self.processor._pictures(images)

    def counts(self) -> dict[str, int]:
        """What has been handed out and dropped so far, by name; counts of several loaders add up."""
        found = {"num_tokens": self.num_tokens, "num_real_tokens": self.num_real_tokens, **self.examples}
        found |= {f"too long: {task}": number for task, number in self.dropped.items()}
        return found | {f"bad: {source}": number for source, number in self.bad.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: where to read on, which examples wait, and what has been counted."""
        return {
            "next_position": self._next,
            "waiting_positions": [waiting.position for waiting in self._waiting],
            "examples": dict(self.examples),
            "dropped": dict(self.dropped),
            "bad": dict(self.bad),
            "num_real_tokens": self.num_real_tokens,
            "num_tokens": self.num_tokens,
            "shard": self._shard(),
        }

    def _shard(self) -> dict[str, Any]:
        return {
            "rank": self.rank, "world_size": self.world_size, "seed": self.seed, "length": self._length,
            "row_length": self.row_length, "buffer_size": self.buffer_size, "data": getattr(self.dataset, "identity", None),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken. Raises `ValueError` if this loader would read or pack differently."""
        if state["shard"] != self._shard():
            raise ValueError(f"state is of a loader with {state['shard']}, not {self._shard()}; make them equal")
        self._next = state["next_position"]
        self._ahead.clear()
        again = [self._read(position) for position in state["waiting_positions"]]
        for found in again:
            if isinstance(found, BadItem):
                raise ValueError(f"an example that waited when the state was taken cannot be read any more: {found}")
        self._waiting = [found for found in again if isinstance(found, _Waiting)]
        self.examples, self.dropped, self.bad = (Counter(state[name]) for name in ("examples", "dropped", "bad"))
        self.num_real_tokens, self.num_tokens = state["num_real_tokens"], state["num_tokens"]
