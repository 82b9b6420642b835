"""Stories: text and pictures in turn, where each picture follows from the text and the pictures before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from orthus.data.world.draft import Draft, DraftSegment, Source, assistant, user
from orthus.data.world.edits import added, moved, try_edit
from orthus.data.world.language import (
    NUMBERS,
    counts_phrase,
    dense_phrase,
    noun,
    one,
    place_words,
    placed,
    plural,
    several,
)
from orthus.data.world.sampling import Wanted, pick, retry, sample_scene, try_scene
from orthus.data.world.scene import GRID, SHAPES, Cell, Scene, cell_of
from orthus.data.world.splits import colors_of, count_allowed, has_violation

DIRECTIONS: dict[str, Cell] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
STEP_KINDS = ("recolor", "move", "replace", "add", "remove")


@dataclass(frozen=True)
class Story:
    """A user's turn and what follows it: `pictures[i]` comes after `texts[i]`; `closing` ends some stories.

    first: the picture in the user's turn, or None. determined: the pictures whose whole content, places included,
    follows from what precedes them (the others leave places or colours open).
    """

    kind: str
    prompt: str
    first: Scene | None
    texts: tuple[str, ...]
    pictures: tuple[Scene, ...]
    determined: tuple[bool, ...]
    closing: str = ""

    def draft(self) -> Draft:
        """The story as an example."""
        said: list[DraftSegment] = []
        for text, picture in zip(self.texts, self.pictures, strict=True):
            said += [text, picture]
        if self.closing:
            said.append(self.closing)
        asked = (self.prompt,) if self.first is None else (self.first, self.prompt)
        return Draft((user(*asked), assistant(*said)), "story")


def _grown(source: Source, shape: str, color: str, first: int, last: int) -> list[Scene] | None:
    """Scenes of `first`, ..., `last` equal objects; each keeps the objects of the one before."""
    rule = source.strict
    if rule and not all(count_allowed(shape, count) for count in range(first, last + 1)):
        return None
    wanted = [Wanted(shape, color)] * last
    full = try_scene(source.rng, source.config, wanted, last, (), rule)
    if full is None:
        return None
    return [replace(full, objects=full.objects[:count]) for count in range(first, last + 1)]


def _colored_shape(source: Source) -> tuple[str, str]:
    shape = pick(source.rng, SHAPES)
    return shape, pick(source.rng, colors_of(shape, source.strict))


def _count_up(source: Source) -> Story | None:
    """One red star, two red stars, ...; the first picture may be the user's."""
    shape, color = _colored_shape(source)
    last = 2 + int(source.rng.random() * 3)
    scenes = _grown(source, shape, color, 1, last)
    if scenes is None:
        return None
    words = plural(noun(shape, color))
    texts = [several(count, shape, color) for count in range(1, last + 1)]
    if last > 2 and source.rng.random() < 0.3:
        prompt = f"Go on with the story: count {words} up to {NUMBERS[last]}."
        return Story("count up", prompt, scenes[0], tuple(texts[1:]), tuple(scenes[1:]), (False,) * (last - 1))
    prompt = f"Tell a story with pictures: count {words} up to {NUMBERS[last]}."
    return Story("count up", prompt, None, tuple(texts), tuple(scenes), (False,) * last)


def _missing(source: Source) -> Story | None:
    """The user's picture has too few: describe it, then draw what is missing, one at a time."""
    shape, color = _colored_shape(source)
    last = 2 + int(source.rng.random() * 3)
    first = max(1, last - 1 - int(source.rng.random() * 2))
    scenes = _grown(source, shape, color, first, last)
    if scenes is None:
        return None
    prompt = f"There should be {several(last, shape, color)}. Describe the picture, then draw what is missing."
    texts = []
    for count in range(first, last):
        gap = last - count
        texts.append(f"{several(count, shape, color)}, {NUMBERS[gap]} {'is' if gap == 1 else 'are'} missing")
    return Story("missing", prompt, scenes[0], tuple(texts), tuple(scenes[1:]), (False,) * (last - first))


def _journey(source: Source) -> Story | None:
    """One object moves by one cell at a time; with bystanders at times."""
    rng = source.rng
    shape, color = _colored_shape(source)
    direction = pick(rng, list(DIRECTIONS))
    extra = int(rng.random() < 0.3)
    scene = try_scene(rng, source.config, [Wanted(shape, color)], 1 + extra, {shape}, source.strict)
    if scene is None:
        return None
    scenes, cells = [scene], [cell_of(scene.objects[0], scene.image_size)]
    for _ in range(1 + int(rng.random() * 3)):
        row, column = cells[-1][0] + DIRECTIONS[direction][0], cells[-1][1] + DIRECTIONS[direction][1]
        if not (0 <= row < GRID and 0 <= column < GRID):
            break
        following = moved(source, scenes[-1], scenes[-1].objects[0], Wanted(shape, color, cell=(row, column)))
        if following is None:
            break
        scenes.append(following)
        cells.append((row, column))
    if len(scenes) < 2:
        return None
    texts = [f"{dense_phrase(scenes[0])}"] + [f"the {shape} is now at the {place_words(cell)}" for cell in cells[1:]]
    determined = (True,) * len(scenes)
    if rng.random() < 0.3:
        prompt = f"Tell what happens: the {shape} moves {direction}."
        return Story("journey", prompt, scenes[0], tuple(texts[1:]), tuple(scenes[1:]), determined[1:])
    prompt = f"Tell a story: {one(shape, color)} moves {direction}."
    return Story("journey", prompt, None, tuple(texts), tuple(scenes), determined)


def _recoloring(source: Source) -> Story | None:
    """One object changes its colour twice or three times."""
    rng = source.rng
    shape, color = _colored_shape(source)
    extra = int(rng.random() < 0.3)
    scene = try_scene(rng, source.config, [Wanted(shape, color)], 1 + extra, {shape}, source.strict)
    if scene is None:
        return None
    scenes, texts = [scene], [dense_phrase(scene)]
    for _ in range(1 + int(rng.random() * 3)):
        item = scenes[-1].objects[0]
        color = pick(rng, [other for other in colors_of(shape, source.strict) if other != item.color])
        scenes.append(replace(scenes[-1], objects=(replace(item, color=color), *scene.objects[1:])))
        texts.append(f"the {shape} turns {color}")
    prompt = f"Tell a story: {one(shape)} changes its color."
    return Story("recolor", prompt, None, tuple(texts), tuple(scenes), (True,) * len(scenes))


def _draw_then_describe(source: Source) -> Story | None:
    """Draw some objects, add one, then describe what is there."""
    rng = source.rng
    scene = sample_scene(rng, source.config, (), 1 + int(rng.random() * 3), (), source.strict)
    items = counts_phrase(scene)
    shape, color = _colored_shape(source)
    result = added(source, scene, Wanted(shape, color))
    if result is None or (source.strict and has_violation(result[0])):
        return None
    full, item = result
    new = one(shape, color)
    prompt = f"Draw {items}, then add {new}, then describe the picture."
    texts = (f"first {items}", f"now {placed(item, full.image_size)}")
    return Story("draw then describe", prompt, None, texts, (scene, full), (False, True), dense_phrase(full))


def _changes(source: Source) -> Story | None:
    """The user gives a picture and two or three edits; the answer shows each."""
    rng = source.rng
    scene = sample_scene(rng, source.config, (), 1 + int(rng.random() * 3), (), source.strict)
    scenes, texts, determined = [scene], [], []
    for _ in range(2 + int(rng.random() < 0.3)):
        edit = try_edit(source, pick(rng, STEP_KINDS), scenes[-1])
        if edit is None:
            return None
        scenes.append(edit.after)
        texts.append(edit.instruction)
        determined.append(edit.is_determined)
    prompt = f"Show each change: {', then '.join(texts)}."
    return Story("changes", prompt, scenes[0], tuple(texts), tuple(scenes[1:]), tuple(determined))


STORIES: dict[str, Callable[[Source], Story | None]] = {
    "count up": _count_up,
    "missing": _missing,
    "journey": _journey,
    "recolor": _recoloring,
    "draw then describe": _draw_then_describe,
    "changes": _changes,
}


def draw_story(source: Source, kind: str | None = None) -> Story:
    """A random story. kind: a key of STORIES or None for any. ValueError for an unknown kind."""
    drawn = kind or pick(source.rng, list(STORIES))
    if drawn not in STORIES:
        raise ValueError(f"story kind {drawn!r} is unknown; use one of {', '.join(STORIES)}")
    return retry(lambda: STORIES[drawn](source), f"story of kind {drawn}")


def draft_story(source: Source) -> Draft:
    """user: a request, at times with a picture; assistant: text and pictures in turn."""
    return draw_story(source).draft()
