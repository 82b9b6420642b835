"""What a scene is: objects with a class, a colour and a square box; the only thing that renderer and grader share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from typing import Literal

SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring", "moon", "arrow")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black")
BACKGROUNDS = ("white", "ivory", "mint", "sky")
RELATIONS = ("left of", "right of", "above", "below")
MIRROR: Mapping[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
GRID = 4
IMAGE_SIZES = (32, 64, 128)
LEVELS = ("grid", "free")
OFFICIAL_THRESHOLD = 0.5

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape. `x`, `y` are its centre and `size` its full extent on both axes, in pixels; y points down."""

    shape: str
    color: str
    x: float
    y: float
    size: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in drawing order (later ones on top) on a plain light background; `image_size` in pixels."""

    objects: tuple[SceneObject, ...]
    background: str = "white"
    image_size: int = 64


@dataclass(frozen=True)
class WorldConfig:
    """How scenes are drawn at random.

    level: "grid" puts each object inside one cell of a 4 x 4 grid; "free" puts it anywhere with little overlap.
    image_size: 32, 64 or 128 pixels; cell and object sizes scale with it.
    Raises ValueError for values outside these sets.
    """

    level: Literal["grid", "free"] = "grid"
    image_size: int = 64
    max_objects: int = 6
    max_overlap: float = 0.1
    world_seed: int = 20241129

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level={self.level!r} is unknown; use one of {', '.join(LEVELS)}")
        if self.image_size not in IMAGE_SIZES:
            raise ValueError(f"image_size={self.image_size} is not offered; use one of {IMAGE_SIZES}")
        if not 5 <= self.max_objects <= 6:
            raise ValueError(f"max_objects={self.max_objects} is not offered; use 5 or 6 (questions count up to five)")
        if not 0.0 <= self.max_overlap <= 0.1:
            raise ValueError(f"max_overlap={self.max_overlap} is outside 0 to 0.1; larger values hide objects")

    @property
    def scale(self) -> float:
        """Pixels per reference pixel of the 64 px world."""
        return self.image_size / 64

    @property
    def cell(self) -> int:
        """Side of a grid cell in pixels."""
        return self.image_size // GRID

    @property
    def size_range(self) -> tuple[float, float]:
        """Smallest and largest object size in pixels."""
        low, high = (11.0, 14.0) if self.level == "grid" else (12.0, 18.0)
        return low * self.scale, high * self.scale


def cell_of(item: SceneObject, image_size: int) -> Cell:
    """(row, column) of the 4 x 4 grid cell that holds the object's centre."""
    row, column = int(item.y * GRID / image_size), int(item.x * GRID / image_size)
    return min(max(row, 0), GRID - 1), min(max(column, 0), GRID - 1)


def relations(a: SceneObject, b: SceneObject, threshold: float = OFFICIAL_THRESHOLD) -> tuple[str, ...]:
    """Where `a` is as seen from `b`, by GenEval's rule: none, one or two of RELATIONS.

    The offset of the centres is shrunk by a tenth of the summed sides on each axis, divided by the length of the
    offset before shrinking, and compared with `threshold`.
    """
    dx, dy = a.x - b.x, a.y - b.y
    slack = 0.1 * (a.size + b.size)
    shrunk_x, shrunk_y = max(abs(dx) - slack, 0.0), max(abs(dy) - slack, 0.0)
    if shrunk_x < 1e-3 and shrunk_y < 1e-3:
        return ()
    bound = threshold * hypot(dx, dy)
    found: tuple[str, ...] = ()
    if shrunk_x > bound:
        found += ("right of" if dx > 0 else "left of",)
    if shrunk_y > bound:
        found += ("below" if dy > 0 else "above",)
    return found


def has_margin(a: SceneObject, b: SceneObject, relation: str) -> bool:
    """Whether `a relation b` holds clearly: alone, within 32 degrees, and at least one mean side apart."""
    dx, dy = a.x - b.x, a.y - b.y
    major, minor = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if abs(major) < 0.5 * (a.size + b.size) or abs(minor) > 0.625 * abs(major):
        return False
    return relations(a, b) == (relation,)


def overlap(a: SceneObject, b: SceneObject) -> float:
    """Shared area of the two boxes as a part of the smaller one."""
    reach = 0.5 * (a.size + b.size)
    width = min(reach - abs(a.x - b.x), a.size, b.size)
    height = min(reach - abs(a.y - b.y), a.size, b.size)
    return max(width, 0.0) * max(height, 0.0) / min(a.size, b.size) ** 2
