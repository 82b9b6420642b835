"""Dropping conditions in training, so that guidance has an unconditional stream to push away from (arXiv 2207.12598)."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from PIL import Image

from orthus.data.schema import Example, ExampleSource, Turn


class ConditionDropping:
    """Replaces what the user says by the unconditional prompt in a fraction of the examples of some tasks, and drops what the
    assistant says before it draws.

    A user turn with pictures (editing) keeps them and loses its text in one half of these cases, which is the image-only stream
    of three-stream guidance, and loses both in the other half.

    Args:
        fractions: share of examples to drop, by task; other tasks are left alone.
        prompt: the unconditional prompt, the same that generation uses.
    """

    def __init__(self, source: ExampleSource, fractions: Mapping[str, float], prompt: str, seed: int = 0) -> None:
        for task, fraction in fractions.items():
            if not 0 <= fraction <= 1:
                raise ValueError(f"drop.{task}={fraction} is not a fraction from 0 to 1")
        self.source, self.fractions, self.prompt, self.seed = source, dict(fractions), prompt, seed

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]  # only asked where the source has a length

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        fraction = self.fractions.get(example.task, 0.0)
        if fraction == 0:
            return example
        draw, half = np.random.default_rng([self.seed, 11, index]).random(2)
        if draw >= fraction:
            return example
        turns = tuple(self._dropped(turn, half < 0.5) if turn.role == "user" else _drawn(turn) for turn in example.turns)
        return replace(example, turns=turns)

    def _dropped(self, turn: Turn, keep_pictures: bool) -> Turn:
        pictures = tuple(segment for segment in turn.segments if isinstance(segment, Image.Image))
        return replace(turn, segments=pictures if pictures and keep_pictures else (self.prompt,))


def _drawn(turn: Turn) -> Turn:
    """The pictures of an assistant turn, without its words; a turn without pictures stays as it is."""
    pictures = tuple(segment for segment in turn.segments if isinstance(segment, Image.Image))
    return replace(turn, segments=pictures) if pictures else turn
