"""Several sources as one endless stream whose item i is a pure function of i."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from orthus.data.schema import Example, ExampleSource
from orthus.data.sources.opening import DOCUMENT_PROMPT, open_source
from orthus.data.sources.order import CYCLE, EpochOrder, cycle_order, slots_of
from orthus.data.sources.records import Prepare
from orthus.data.sources.settings import SourceSettings
from orthus.image_processing import MAX_PIXELS, to_rgb


class Mixture:
    """Endless: read it at 0, 1, 2, ... without further shuffling, each rank or worker at the positions of its own.

    Of every `CYCLE` positions each source has its share, evenly spread; its n-th position is item n of its own epochs, of which
    each is a fresh permutation: every item once per epoch. No state: any position can be read at any time, by anyone.

    sources: map-style with a length; their `block_sizes` and `mixed`, where they have them, keep neighbours together.
    weights: shares of positions, in any unit.
    """

    def __init__(self, sources: Sequence[ExampleSource], weights: Sequence[float], seed: int) -> None:
        if len(sources) != len(weights):
            raise ValueError(f"{len(sources)} sources have {len(weights)} weights; give one for each")
        self.sources, self.slots, self.seed = list(sources), slots_of(weights), seed
        self.lengths = [len(cast(Any, source)) for source in sources]
        if 0 in self.lengths:
            raise ValueError(f"source {self.lengths.index(0)} of the mixture is empty; leave it out")
        self._orders = [
            EpochOrder(getattr(source, "block_sizes", [length]), getattr(source, "mixed", 1), (seed, number))
            for number, (source, length) in enumerate(zip(sources, self.lengths, strict=True))
        ]

    @property
    def identity(self) -> list[Any]:
        """Plain values that say what positions mean: other lengths, shares or another seed would give other items."""
        return [list(self.lengths), list(self.slots), self.seed]

    def locate(self, position: int) -> tuple[int, int, int]:
        """`(source number, its epoch, index in the source)` of what stands at a position."""
        if position < 0:
            raise IndexError(f"position {position} is negative; a mixture has no end to count from")
        cycle, slot = divmod(position, CYCLE)
        owners, ranks = cycle_order(self.slots, self.seed, cycle)
        number = owners[slot]
        epoch, place = divmod(cycle * self.slots[number] + ranks[slot], self.lengths[number])
        return number, epoch, self._orders[number](epoch, place)

    def __getitem__(self, position: int) -> Example:
        """Raises BadItem where that item cannot be used: read on at the next position."""
        number, _, index = self.locate(position)
        return self.sources[number][index]


def open_mixture(
    settings: Iterable[SourceSettings],
    seed: int,
    prepare: Prepare = to_rgb,
    max_pixels: int = MAX_PIXELS,
    document_prompt: str = DOCUMENT_PROMPT,
) -> Mixture:
    """All sources opened, see `open_source`, in the shares of their weights. ValueError for two of the same name."""
    chosen = list(settings)
    names = [one.label for one in chosen]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two sources are called {name!r}; give them a `name` each")
    sources = [open_source(one, prepare, max_pixels, document_prompt) for one in chosen]
    return Mixture(sources, [one.weight for one in chosen], seed)
