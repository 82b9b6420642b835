"""Text-only exercises for a backbone that was never pretrained: copy, look up, and read before there is anything to see.

All of them need content to be found in context by what it says, which a small transformer learns slowly from questions on
pictures alone and within minutes from dense exercises (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from orthus.data.world.draft import Draft, Source, assistant, user
from orthus.data.world.language import COLUMN_WORDS, NUMBERS, ROW_WORDS, about_phrase, dense_phrase
from orthus.data.world.questions import dialogue, draw_questions
from orthus.data.world.sampling import pick, sample_scene, shuffled
from orthus.data.world.scene import COLORS, SHAPES, Scene

WORDS = tuple(sorted({*COLORS, *NUMBERS, *" ".join((*ROW_WORDS, *COLUMN_WORDS)).split()}))
MOST_WORDS = 24
ABSENT_SHARE = 0.3


def _told(source: Source, scene: Scene) -> str:
    """A description in raster or random order."""
    return dense_phrase(scene, shuffled(source.rng, scene.objects) if source.rng.random() < 0.5 else None)


def _classes(scene: Scene) -> list[str]:
    return sorted({item.shape for item in scene.objects})


def draft_recite(source: Source) -> Draft:
    """user: words; assistant: the same words. Colours, numbers and places at random, or the classes of a scene."""
    rng = source.rng
    if rng.random() < 0.2:
        words: Sequence[str] = shuffled(rng, _classes(sample_scene(rng, source.config, strict=source.strict)))
    else:
        words = [pick(rng, WORDS) for _ in range(4 + int(rng.random() * (MOST_WORDS - 3)))]
    return Draft((user(" ".join(words)), assistant(" ".join(words))), "recite")


def draft_look_up(source: Source) -> Draft:
    """user: a description and classes; assistant: what it says of each class, in the order asked."""
    rng = source.rng
    scene = sample_scene(rng, source.config, strict=source.strict)
    present = _classes(scene)
    absent = [pick(rng, [shape for shape in SHAPES if shape not in present])] if rng.random() < ABSENT_SHARE else []
    asked = shuffled(rng, present + absent)
    return Draft((user(f"{_told(source, scene)}. {', '.join(asked)}"), assistant(about_phrase(scene, asked))), "look_up")


def draft_read(source: Source) -> Draft:
    """Questions as on a picture, on a description in words."""
    scene, questions = draw_questions(source)
    return dialogue(scene, questions, (f"{_told(source, scene)}. {questions[0].text}",), "read")
