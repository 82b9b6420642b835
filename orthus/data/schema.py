"""What a training example is: turns of text and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol, get_args

from PIL import Image

Segment = str | Image.Image
Role = Literal["user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Turn:
    """What one speaker says: text and pictures in reading order.

    Raises ValueError for an unknown role or no segments, TypeError for a segment that is neither text nor a picture.
    """

    role: Role
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role={self.role!r} is unknown; use one of {', '.join(ROLES)}")
        if isinstance(self.segments, str | Image.Image):
            kind = type(self.segments).__name__
            raise TypeError(f"segments is a single {kind}; wrap it in a tuple: (segment,)")
        object.__setattr__(self, "segments", tuple(self.segments))
        if not self.segments:
            raise ValueError(f"the {self.role} turn has no segments; give it text or a picture, or leave the turn out")
        for place, segment in enumerate(self.segments):
            if not isinstance(segment, str | Image.Image):
                kind = type(segment).__name__
                raise TypeError(f"segment {place} of the {self.role} turn is a {kind}; pass str or PIL.Image.Image")


@dataclass(frozen=True)
class Example:
    """Turns with the name of the task that they teach (`task` is only used for mixing and for metrics)."""

    turns: tuple[Turn, ...]
    task: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple(self.turns))
        if not self.turns:
            raise ValueError(f"the example of task {self.task!r} has no turns; give it at least one")
        for place, turn in enumerate(self.turns):
            if not isinstance(turn, Turn):
                raise TypeError(f"turn {place} is a {type(turn).__name__}; pass Turn(role, segments)")


def pictures_of(example: Example) -> list[Image.Image]:
    """In reading order."""
    return [segment for turn in example.turns for segment in turn.segments if isinstance(segment, Image.Image)]


def batches(pictures: Iterator[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    """All of them, `size` at a time."""
    while batch := list(islice(pictures, size)):
        yield batch


class BadItem(ValueError):
    """One item of a source that cannot be used: a damaged picture, a wrong line. Loaders count it and read on."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    def __str__(self) -> str:
        return f"source {self.source!r}: {self.reason}"


class ExampleSource(Protocol):
    """Anything indexable. With a length it is read again and again; without one it is taken to be endless."""

    def __getitem__(self, index: int, /) -> Example: ...
