"""Drafts: examples whose pictures are still scenes, and the source of randomness that builders draw from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from numpy.random import Generator

from orthus.data.schema import Example, Role, Segment, Turn
from orthus.data.world.language import dense_phrase, reasoned
from orthus.data.world.render import picture
from orthus.data.world.scene import Scene, WorldConfig

DraftSegment = str | Scene
DraftTurn = tuple[Role, tuple[DraftSegment, ...]]


@dataclass(frozen=True)
class Source:
    """What a builder draws from. strict: scenes keep clear of held-out clauses."""

    rng: Generator
    config: WorldConfig
    strict: bool = True


@dataclass(frozen=True)
class Draft:
    """An example before rendering. reasons: for each answer on a picture what it follows from, or ""."""

    turns: tuple[DraftTurn, ...]
    task: str
    reasons: tuple[str, ...] = ()

    def scenes(self) -> list[Scene]:
        """All scenes in reading order."""
        return [segment for _, segments in self.turns for segment in segments if isinstance(segment, Scene)]

    def with_plan(self) -> Draft:
        """The assistant first says what it will draw: a full description goes before its last picture."""
        *earlier, (role, segments) = self.turns
        *before, picture_scene = segments
        assert role == "assistant" and isinstance(picture_scene, Scene)
        return replace(self, turns=(*earlier, (role, (*before, dense_phrase(picture_scene), picture_scene))))

    def with_reasons(self) -> Draft:
        """Each answer comes after what it follows from, the first one after a full description of the user's picture as well."""
        turns, shown = list(self.turns), self.turns[0][1][0]
        description = dense_phrase(shown) if isinstance(shown, Scene) else ""
        for place, reason in zip(range(1, len(turns), 2), self.reasons, strict=True):
            role, (answer,) = turns[place]
            assert role == "assistant" and isinstance(answer, str)
            turns[place] = role, (reasoned([description, reason] if place == 1 else [reason], answer),)
        return replace(self, turns=tuple(turns))

    def render(self) -> Example:
        """The example with pictures in place of scenes."""
        turns = tuple(Turn(role, tuple(_rendered(segment) for segment in segments)) for role, segments in self.turns)
        return Example(turns, self.task)


def _rendered(segment: DraftSegment) -> Segment:
    return picture(segment) if isinstance(segment, Scene) else segment


def user(*segments: DraftSegment) -> DraftTurn:
    return "user", segments


def assistant(*segments: DraftSegment) -> DraftTurn:
    return "assistant", segments
