"""Random scenes: required objects first, then distractors, each placed so that no rule is broken."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import radians, tan
from typing import TypeVar

from numpy.random import Generator

from orthus.data.world.scene import (
    BACKGROUNDS,
    GRID,
    RELATIONS,
    SHAPES,
    Cell,
    Scene,
    SceneObject,
    WorldConfig,
    cell_of,
    has_margin,
    overlap,
)
from orthus.data.world.splits import clashes, colors_of, has_violation, pair_allowed

T = TypeVar("T")
CELLS: tuple[Cell, ...] = tuple((row, column) for row in range(GRID) for column in range(GRID))
MAX_TRIES = 400
FREE_PROPOSALS = 24
ALIGNED_SHARE = 0.6
REPEAT_SHARE = 0.15


class SamplingError(RuntimeError):
    """No scene was found within the bounded number of tries."""


@dataclass(frozen=True)
class Wanted:
    """An object that a scene must have. None leaves the choice to chance.

    relation: this object stands `relation` of `required[anchor]`, an earlier one, with a clear margin.
    """

    shape: str
    color: str | None = None
    cell: Cell | None = None
    relation: str | None = None
    anchor: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r} is unknown; use one of {', '.join(SHAPES)}")
        if self.relation is not None and self.relation not in RELATIONS:
            raise ValueError(f"relation={self.relation!r} is unknown; use one of {', '.join(RELATIONS)}")


def pick(rng: Generator, options: Sequence[T]) -> T:
    """One of the options with equal chance (much faster than `Generator.choice`)."""
    return options[int(rng.random() * len(options))]


def pick_weighted(rng: Generator, weights: Sequence[tuple[T, float]]) -> T:
    """One of the options with chance in proportion to its weight."""
    left = rng.random() * sum(weight for _, weight in weights)
    for option, weight in weights:
        left -= weight
        if left < 0:
            return option
    return weights[-1][0]


def shuffled(rng: Generator, options: Sequence[T]) -> list[T]:
    return [options[int(place)] for place in rng.permutation(len(options))]


def retry(attempt: Callable[[], T | None], what: str, tries: int = MAX_TRIES) -> T:
    """The first result of `attempt` that is not None; SamplingError naming `what` after `tries`."""
    for _ in range(tries):
        result = attempt()
        if result is not None:
            return result
    raise SamplingError(f"no {what} found in {tries} tries; ask for fewer objects or constraints")


def draw_size(rng: Generator, config: WorldConfig) -> float:
    """A size in pixels, on a raster of half a reference pixel."""
    low, high = config.size_range
    quantum = 0.5 * config.scale
    return low + quantum * int(rng.random() * (round((high - low) / quantum) + 1))


def _jitter(rng: Generator, config: WorldConfig, room: float) -> float:
    """An offset of at most one reference pixel and at most `room` pixels, on a raster of half a reference pixel."""
    quantum = 0.5 * config.scale
    reach = int(min(room, config.scale) / quantum)
    return quantum * (int(rng.random() * (2 * reach + 1)) - reach)


def place_in_cell(rng: Generator, config: WorldConfig, cell: Cell, size: float) -> tuple[float, float]:
    """A centre for an object of `size` that should belong to `cell` (row, column), in pixels, inside the picture."""
    side = config.cell
    room = (side - size) / 2 if config.level == "grid" else config.scale
    x = (cell[1] + 0.5) * side + _jitter(rng, config, room)
    y = (cell[0] + 0.5) * side + _jitter(rng, config, room)
    low, high = size / 2, config.image_size - size / 2
    return min(max(x, low), high), min(max(y, low), high)


def _cells_towards(rng: Generator, relation: str, anchor: Cell, free: Collection[Cell]) -> list[Cell]:
    """Free cells that lie in `relation` to the anchor cell with a margin, in random order."""
    horizontal = relation in ("left of", "right of")
    sign = 1 if relation in ("right of", "below") else -1
    aligned: list[Cell] = []
    oblique: list[Cell] = []
    for cell in free:
        rows, columns = cell[0] - anchor[0], cell[1] - anchor[1]
        major, minor = (columns, rows) if horizontal else (rows, columns)
        if major * sign > 0 and 2 * abs(minor) <= abs(major):
            (oblique if minor else aligned).append(cell)
    if aligned and rng.random() < ALIGNED_SHARE:
        return shuffled(rng, aligned)
    return shuffled(rng, aligned + oblique)


def _grid_centres(
    rng: Generator, config: WorldConfig, wanted: Wanted, size: float, objects: Sequence[SceneObject]
) -> Iterator[tuple[float, float]]:
    taken = {cell_of(item, config.image_size) for item in objects}
    free = [cell for cell in CELLS if cell not in taken]
    if wanted.cell is not None:
        free = [wanted.cell] if wanted.cell in free else []
    elif wanted.relation is not None:
        anchor = cell_of(objects[wanted.anchor], config.image_size)
        free = _cells_towards(rng, wanted.relation, anchor, free)
    while free:
        yield place_in_cell(rng, config, free.pop(int(rng.random() * len(free))), size)


def _free_centres(
    rng: Generator, config: WorldConfig, wanted: Wanted, size: float, objects: Sequence[SceneObject]
) -> Iterator[tuple[float, float]]:
    """Random centres on a raster of a quarter of a reference pixel; towards the anchor's side for a relation."""
    quantum = 0.25 * config.scale
    low, span = size / 2, config.image_size - size
    for _ in range(FREE_PROPOSALS):
        if wanted.cell is not None:
            yield place_in_cell(rng, config, wanted.cell, size)
            continue
        x, y = low + rng.random() * span, low + rng.random() * span
        if wanted.relation is not None:
            anchor = objects[wanted.anchor]
            slope = tan(radians(25)) * (2 * rng.random() - 1)
            if wanted.relation in ("left of", "right of"):
                y = anchor.y + slope * (x - anchor.x)
            else:
                x = anchor.x + slope * (y - anchor.y)
        x, y = min(max(x, low), low + span), min(max(y, low), low + span)
        yield low + quantum * int((x - low) / quantum), low + quantum * int((y - low) / quantum)


def fits(item: SceneObject, others: Sequence[SceneObject], config: WorldConfig) -> bool:
    """Whether `item` is free of the others: another cell on the grid, little overlap elsewhere."""
    if config.level == "grid":
        cell = cell_of(item, config.image_size)
        return all(cell_of(other, config.image_size) != cell for other in others)
    return all(overlap(item, other) <= config.max_overlap for other in others)


def place(
    rng: Generator, config: WorldConfig, wanted: Wanted, objects: Sequence[SceneObject], strict: bool
) -> SceneObject | None:
    """An object as wanted that fits among `objects`, or None when no proposal fits."""
    color = wanted.color or pick(rng, colors_of(wanted.shape, strict))
    size = draw_size(rng, config)
    propose = _grid_centres if config.level == "grid" else _free_centres
    for x, y in propose(rng, config, wanted, size, objects):
        item = SceneObject(wanted.shape, color, x, y, size)
        if config.level == "free" and not fits(item, objects, config):
            continue
        if wanted.relation is not None and not has_margin(item, objects[wanted.anchor], wanted.relation):
            continue
        if not strict or not clashes(item, objects):
            return item
    return None


def _distractor(rng: Generator, objects: Sequence[SceneObject], forbid: Collection[str], strict: bool) -> str | None:
    """A class for one more object: sometimes one that is there already, so that counts above one are common."""
    present = [item.shape for item in objects]
    if present and rng.random() < REPEAT_SHARE:
        options = [shape for shape in present if shape not in forbid]
    else:
        options = [shape for shape in SHAPES if shape not in forbid]
    if strict:
        options = [shape for shape in options if all(pair_allowed(shape, other) for other in present)]
    return pick(rng, options) if options else None


def try_scene(
    rng: Generator,
    config: WorldConfig,
    required: Sequence[Wanted],
    num_objects: int,
    forbid: Collection[str] = (),
    strict: bool = True,
) -> Scene | None:
    """One attempt of `sample_scene`: None where it failed."""
    objects: list[SceneObject] = []
    for wanted in required:
        item = place(rng, config, wanted, objects, strict)
        if item is None:
            return None
        objects.append(item)
    while len(objects) < num_objects:
        shape = _distractor(rng, objects, forbid, strict)
        item = None if shape is None else place(rng, config, Wanted(shape), objects, strict)
        if item is None:
            return None
        objects.append(item)
    scene = Scene(tuple(objects), pick(rng, BACKGROUNDS), config.image_size)
    return None if strict and has_violation(scene) else scene


def sample_scene(
    rng: Generator,
    config: WorldConfig,
    required: Sequence[Wanted] = (),
    num_objects: int | None = None,
    forbid: Collection[str] = (),
    strict: bool = True,
) -> Scene:
    """A random scene whose first objects are `required`.

    num_objects: in all; None means just the required ones, or 1 to `config.max_objects` when nothing is required.
    forbid: classes that the further objects must not have.
    strict: no held-out clause (training and validation). SamplingError when the constraints cannot be met.
    """
    if num_objects is None:
        num_objects = len(required) or 1 + int(rng.random() * config.max_objects)
    total = num_objects
    return retry(lambda: try_scene(rng, config, required, total, forbid, strict), f"scene with {list(required)}")
