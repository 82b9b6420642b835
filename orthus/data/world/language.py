"""Words and phrases for scenes: everything that is said about a picture is put together here.

The six caption templates are GenEval's, to the letter ("a photo of {phrase}"); the rest are paraphrases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from numpy.random import Generator

from orthus.data.world.sampling import pick, pick_weighted, shuffled
from orthus.data.world.scene import GRID, Cell, Scene, SceneObject, cell_of

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
ROW_WORDS = ("top", "upper", "lower", "bottom")
COLUMN_WORDS = ("far left", "left", "right", "far right")
FRAMES = (("a photo of {}", 0.6), ("a picture of {}", 0.15), ("draw {}", 0.15), ("{}", 0.1))
NOTHING = "nothing"
ANSWER_MARK = ". Answer: "


def article(word: str) -> str:
    """GenEval's rule: "an" before aeiou."""
    return "an" if word[0] in "aeiou" else "a"


def plural(word: str) -> str:
    """GenEval's rule: "es" after s, else "s"."""
    return word + ("es" if word[-1] == "s" else "s")


def noun(shape: str, color: str | None = None) -> str:
    """The class, with its colour if given: "red circle"."""
    return shape if color is None else f"{color} {shape}"


def one(shape: str, color: str | None = None) -> str:
    """With its article: "an orange circle"."""
    words = noun(shape, color)
    return f"{article(words)} {words}"


def several(count: int, shape: str, color: str | None = None) -> str:
    """With a number word: "one red star", "three red stars", "zero stars"."""
    words = noun(shape, color)
    return f"{NUMBERS[count]} {words if count == 1 else plural(words)}"


def place_words(cell: Cell) -> str:
    """(row, column) as words: "upper far right"."""
    return f"{ROW_WORDS[cell[0]]} {COLUMN_WORDS[cell[1]]}"


def listed(phrases: Sequence[str]) -> str:
    """Joined as in "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def raster_order(scene: Scene) -> list[SceneObject]:
    """The objects by cell, row by row, then by centre."""
    side = scene.image_size
    return sorted(scene.objects, key=lambda item: (cell_of(item, side), item.y, item.x))


def placed(item: SceneObject, image_size: int) -> str:
    """With colour and place: "a red circle at the upper far right"."""
    return f"{one(item.shape, item.color)} at the {place_words(cell_of(item, image_size))}"


def note(item: SceneObject, image_size: int) -> str:
    """The same for the model's own descriptions: "circle red upper far right". What is looked up by its class stands right
    after it, which a small transformer learns far sooner than the sentence (docs/LOG.md)."""
    return f"{item.shape} {item.color} {place_words(cell_of(item, image_size))}"


def dense_phrase(scene: Scene, items: Sequence[SceneObject] | None = None) -> str:
    """A note on each object, in raster order unless `items` says otherwise; "nothing" for none."""
    chosen = raster_order(scene) if items is None else items
    return ", ".join(note(item, scene.image_size) for item in chosen) or NOTHING


def about_phrase(scene: Scene, classes: Sequence[str]) -> str:
    """The objects of each class in turn: "star red top left, no moon"."""
    items = {shape: [item for item in raster_order(scene) if item.shape == shape] for shape in classes}
    return ", ".join(dense_phrase(scene, items[shape]) if items[shape] else f"no {shape}" for shape in classes)


def reasoned(reasons: Sequence[str], answer: str) -> str:
    """An answer after what it follows from ("" is left out); `final_answer` takes it apart."""
    given = ". ".join(reason for reason in reasons if reason)
    return f"{given}{ANSWER_MARK}{answer}" if given else answer


def final_answer(text: str) -> str:
    """What stands after the reasons, or all of a text that gives none."""
    return text.rpartition(ANSWER_MARK)[2]


def coarse_phrase(scene: Scene, by_columns: bool) -> str:
    """What is in each half: "a red circle in the left half, a blue star and a pink moon in the right half"."""
    halves: tuple[list[str], list[str]] = ([], [])
    for item in raster_order(scene):
        row, column = cell_of(item, scene.image_size)
        halves[(column if by_columns else row) >= GRID // 2].append(one(item.shape, item.color))
    names = ("left", "right") if by_columns else ("top", "bottom")
    return ", ".join(f"{listed(half)} in the {name} half" for half, name in zip(halves, names, strict=True) if half)


def counts_phrase(scene: Scene) -> str:
    """What there is, without places: "two red stars, a blue circle"."""
    counts = Counter((item.shape, item.color) for item in raster_order(scene))
    return ", ".join(one(*kind) if n == 1 else several(n, *kind) for kind, n in counts.items()) or NOTHING


def is_next_to(a: SceneObject, b: SceneObject, image_size: int) -> bool:
    """Whether two objects are in adjacent cells of one row or column."""
    (row_a, column_a), (row_b, column_b) = cell_of(a, image_size), cell_of(b, image_size)
    return abs(row_a - row_b) + abs(column_a - column_b) == 1


def reference(scene: Scene, item: SceneObject) -> str | None:
    """The shortest noun that means just this object: "circle", else "red circle", else None."""
    if sum(other.shape == item.shape for other in scene.objects) == 1:
        return item.shape
    if sum(other.shape == item.shape and other.color == item.color for other in scene.objects) == 1:
        return noun(item.shape, item.color)
    return None


def framed(rng: Generator, phrase: str) -> str:
    """The phrase as a request for a picture; GenEval's "a photo of ..." most of the time."""
    return pick_weighted(rng, FRAMES).format(phrase)


def pair_phrase(rng: Generator, scene: Scene, colored: bool) -> str:
    """The first two objects: "a circle and a square"; "next to" sometimes, where they are."""
    a, b = scene.objects[:2]
    joint = "next to" if is_next_to(a, b, scene.image_size) and rng.random() < 0.4 else "and"
    return f"{one(a.shape, a.color if colored else None)} {joint} {one(b.shape, b.color if colored else None)}"


def relation_phrase(rng: Generator, moved: SceneObject, relation: str, anchor: SceneObject, colored: bool) -> str:
    """Two objects and a relation: "a circle left of a square", at times "to the left of"."""
    if relation in ("left of", "right of") and rng.random() < 0.15:
        relation = f"to the {relation}"
    colors = (moved.color, anchor.color) if colored else (None, None)
    return f"{one(moved.shape, colors[0])} {relation} {one(anchor.shape, colors[1])}"


@dataclass(frozen=True)
class CaptionMix:
    """How often each kind of caption is drawn (weights; they need not sum to one)."""

    single: float = 0.08
    two: float = 0.10
    counting: float = 0.17
    colors: float = 0.10
    position: float = 0.22
    color_attr: float = 0.18
    dense: float = 0.15

    def __post_init__(self) -> None:
        weights = vars(self)
        if min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise ValueError(f"caption weights {weights} must be at least 0 and not all 0")

    def items(self) -> list[tuple[str, float]]:
        """(kind, weight) in the order of the fields."""
        return list(vars(self).items())


def dense_caption(rng: Generator, scene: Scene) -> str:
    """A full caption: every object with colour and place (raster or random order), or coarse places, or counts."""
    draw = rng.random()
    if draw < 0.12:
        return coarse_phrase(scene, by_columns=rng.random() < 0.5)
    if draw < 0.2:
        return counts_phrase(scene)
    items = shuffled(rng, scene.objects) if draw < 0.5 else raster_order(scene)
    return ", ".join(placed(item, scene.image_size) for item in items)


def request(rng: Generator, scene: Scene) -> str:
    """A full caption as a request for a picture."""
    return pick(rng, ("{}", "draw {}", "a photo of {}")).format(dense_caption(rng, scene))
