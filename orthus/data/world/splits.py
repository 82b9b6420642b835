"""Which clauses are held out of training, fixed before the first training, and how to find them in a scene.

A clause is a tuple of strings in one canonical form: ("color", class, color), ("count", class, n),
("pair", class, class) with the classes sorted, ("relation", A, "left of" | "above", B).
Nothing here may change without a new name for the benchmark: `fingerprint()` is compared with FINGERPRINT by a test.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from orthus.data.world.scene import COLORS, MIRROR, RELATIONS, SHAPES, Scene, SceneObject, relations

Clause = tuple[str, ...]

SPLITS = ("train", "validation", "test")
FINGERPRINT = "b08c5dbe88b75cd1e7bf210fe8f832c1add9f64f059975d9f7ad81d79892b47e"
# A little below GenEval's 0.5, so that no relation that a grader could still measure slips into training.
STRICT_THRESHOLD = 0.46

HELD_OUT_COLORS: dict[str, tuple[str, ...]] = {
    "circle": ("pink",),
    "square": ("blue", "black"),
    "triangle": ("orange", "yellow"),
    "diamond": ("green", "purple"),
    "star": ("green", "pink"),
    "heart": ("red", "brown"),
    "cross": ("blue",),
    "ring": ("yellow", "brown"),
    "moon": ("red", "purple"),
    "arrow": ("orange", "black"),
}
HELD_OUT_COUNTS = (("ring", 2), ("cross", 2), ("star", 3), ("triangle", 3), ("arrow", 4), ("diamond", 4))
HELD_OUT_PAIRS = (
    ("arrow", "moon"),
    ("circle", "moon"),
    ("circle", "square"),
    ("cross", "heart"),
    ("cross", "ring"),
    ("diamond", "square"),
    ("heart", "triangle"),
    ("star", "triangle"),
)
HELD_OUT_RELATIONS = (
    ("cross", "left of", "star"),
    ("diamond", "left of", "arrow"),
    ("circle", "left of", "heart"),
    ("cross", "left of", "moon"),
    ("moon", "left of", "triangle"),
    ("star", "left of", "diamond"),
    ("cross", "left of", "circle"),
    ("triangle", "left of", "cross"),
    ("moon", "left of", "star"),
    ("square", "left of", "star"),
    ("diamond", "left of", "heart"),
    ("circle", "above", "ring"),
    ("triangle", "above", "diamond"),
    ("ring", "above", "heart"),
    ("ring", "above", "arrow"),
    ("square", "above", "arrow"),
    ("heart", "above", "arrow"),
    ("square", "above", "heart"),
    ("circle", "above", "diamond"),
    ("triangle", "above", "ring"),
    ("triangle", "above", "square"),
    ("ring", "above", "moon"),
)


def color_clause(shape: str, color: str) -> Clause:
    return "color", shape, color


def count_clause(shape: str, count: int) -> Clause:
    return "count", shape, str(count)


def pair_clause(a: str, b: str) -> Clause:
    return ("pair", a, b) if a < b else ("pair", b, a)


def relation_clause(a: str, relation: str, b: str) -> Clause:
    """Canonical form: "right of" and "below" are written as their mirror images."""
    if relation in ("left of", "above"):
        return "relation", a, relation, b
    return "relation", b, MIRROR[relation], a


HELD_OUT: frozenset[Clause] = frozenset(
    [color_clause(shape, color) for shape, colors in HELD_OUT_COLORS.items() for color in colors]
    + [count_clause(shape, count) for shape, count in HELD_OUT_COUNTS]
    + [pair_clause(a, b) for a, b in HELD_OUT_PAIRS]
    + [relation_clause(a, relation, b) for a, relation, b in HELD_OUT_RELATIONS]
)
ALLOWED_COLORS: dict[str, tuple[str, ...]] = {
    shape: tuple(color for color in COLORS if color not in HELD_OUT_COLORS[shape]) for shape in SHAPES
}
_TRIPLES = frozenset(
    (a, relation, b) for a in SHAPES for b in SHAPES for relation in RELATIONS if relation_clause(a, relation, b) in HELD_OUT
)
_TOUCHY = frozenset((a, b) for a, _, b in _TRIPLES)
_SEPARATE = frozenset((a, b) for pair in HELD_OUT_PAIRS for a, b in (pair, pair[::-1]))


def fingerprint() -> str:
    """sha256 of the sorted held-out clauses as JSON."""
    return hashlib.sha256(json.dumps(sorted(HELD_OUT)).encode()).hexdigest()


def colors_of(shape: str, strict: bool) -> tuple[str, ...]:
    """Colours that the class may have; all nine when not `strict`."""
    return ALLOWED_COLORS[shape] if strict else COLORS


def pair_allowed(a: str, b: str) -> bool:
    """Whether the two classes may share a training scene."""
    return (a, b) not in _SEPARATE


def triple_allowed(a: str, relation: str, b: str) -> bool:
    """Whether `a relation b` may occur in a training scene; a held-out class pair allows none."""
    return (a, relation, b) not in _TRIPLES and (a, b) not in _SEPARATE


def count_allowed(shape: str, count: int) -> bool:
    return count_clause(shape, count) not in HELD_OUT


def clashes(item: SceneObject, others: Sequence[SceneObject]) -> bool:
    """Whether a training scene of `others` must not also hold `item`, for its class pairs and relations."""
    shape = item.shape
    for other in others:
        pair = (shape, other.shape)
        if pair in _SEPARATE:
            return True
        if pair in _TOUCHY:
            for relation in relations(item, other, STRICT_THRESHOLD):
                if (shape, relation, other.shape) in _TRIPLES:
                    return True
    return False


def clauses(scene: Scene, threshold: float = STRICT_THRESHOLD) -> set[Clause]:
    """Every clause that the scene makes true."""
    counts = Counter(item.shape for item in scene.objects)
    found = {color_clause(item.shape, item.color) for item in scene.objects}
    found |= {count_clause(shape, count) for shape, count in counts.items()}
    found |= {pair_clause(a, b) for a, b in combinations(counts, 2)}
    for a, b in combinations(scene.objects, 2):
        if a.shape != b.shape:
            found |= {relation_clause(a.shape, relation, b.shape) for relation in relations(a, b, threshold)}
    return found


def violations(scene: Scene) -> list[Clause]:
    """The held-out clauses that the scene makes true, sorted."""
    return sorted(clauses(scene) & HELD_OUT)


def has_violation(scene: Scene) -> bool:
    """Fast twin of `bool(violations(scene))`."""
    objects = scene.objects
    counts: dict[str, int] = {}
    for place, item in enumerate(objects):
        if item.color in HELD_OUT_COLORS[item.shape] or clashes(item, objects[:place]):
            return True
        counts[item.shape] = counts.get(item.shape, 0) + 1
    return any(count > 1 and not count_allowed(shape, count) for shape, count in counts.items())


def is_allowed(scene: Scene, split: str) -> bool:
    """Whether the scene may occur in the split: no held-out clause in "train" and "validation", anything in "test".

    ValueError for another split.
    """
    return not is_strict(split) or not has_violation(scene)


def is_strict(split: str) -> bool:
    """Whether the split holds clauses out. ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
    return split != "test"
