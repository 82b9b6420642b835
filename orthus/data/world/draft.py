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
    """An example before rendering."""

    turns: tuple[DraftTurn, ...]
    task: str

    def scenes(self) -> list[Scene]:
        """All scenes in reading order."""
        return [segment for _, segments in self.turns for segment in segments if isinstance(segment, Scene)]

    def with_plan(self) -> Draft:
        """The assistant first says what it will draw: a full description goes before its last picture."""
        *earlier, (role, segments) = self.turns
        *before, picture_scene = segments
        assert role == "assistant" and isinstance(picture_scene, Scene)
        return replace(self, turns=(*earlier, (role, (*before, dense_phrase(picture_scene), picture_scene))))

    def with_description(self) -> Draft:
        """The assistant first says what it sees: a full description of the user's picture goes before the first answer."""
        (asker, asked), (role, (answer,)), *later = self.turns
        (scene, *_) = asked
        assert role == "assistant" and isinstance(scene, Scene) and isinstance(answer, str)
        return replace(self, turns=((asker, asked), (role, (reasoned(dense_phrase(scene), answer),)), *later))

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
