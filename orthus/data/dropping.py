"""Dropping conditions in training, so that guidance has an unconditional stream to push away from (arXiv 2207.12598)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from orthus.data.schema import Example, ExampleSource, Turn


class ConditionDropping:
    """Replaces what the user says by the unconditional prompt in a fraction of the examples of some tasks.

    What the assistant says before it draws is dropped in one half of these cases, for guidance of pictures, and kept in the
    other, for guidance of text. A user turn with pictures (editing) keeps them and loses its text in one half, which is the
    image-only stream of three-stream guidance, and loses both in the other half.

    Args:
        fractions: share of examples to drop, by task; other tasks are left alone.
        prompt: the unconditional prompt, the same that generation uses.
    """

    def __init__(self, source: ExampleSource, fractions: Mapping[str, float], prompt: str, seed: int = 0) -> None:
        for task, fraction in fractions.items():
            if not 0 <= fraction <= 1:
                raise ValueError(f"drop.{task}={fraction} is not a fraction from 0 to 1")
        self.source, self.fractions, self.prompt, self.seed = source, dict(fractions), prompt, seed

    @property
    def identity(self) -> Any:
        """Of the source: what positions mean in it; None where only its length says."""
        return getattr(self.source, "identity", None)

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]  # only asked where the source has a length

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        fraction = self.fractions.get(example.task, 0.0)
        if fraction == 0:
            return example
        draw, half, words = np.random.default_rng([self.seed, 11, index]).random(3)
        if draw >= fraction:
            return example
        turns = [self._dropped(turn, half < 0.5) if turn.role == "user" else turn for turn in example.turns]
        return replace(example, turns=tuple(turns if words < 0.5 else map(_drawn, turns)))

    def _dropped(self, turn: Turn, keep_pictures: bool) -> Turn:
        pictures = tuple(segment for segment in turn.segments if isinstance(segment, Image.Image))
        return replace(turn, segments=pictures if pictures and keep_pictures else (self.prompt,))


def _drawn(turn: Turn) -> Turn:
    """The pictures of an assistant turn, without its words; a turn without pictures stays as it is."""
    pictures = tuple(segment for segment in turn.segments if isinstance(segment, Image.Image))
    return replace(turn, segments=pictures) if pictures else turn
