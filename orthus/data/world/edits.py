"""Edits: a picture, an instruction, and the picture with just that change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orthus.data.world.draft import Draft, Source, assistant, user
from orthus.data.world.language import one, place_words, reference
from orthus.data.world.sampling import CELLS, Wanted, fits, pick, pick_weighted, place, retry, sample_scene, shuffled
from orthus.data.world.scene import RELATIONS, SHAPES, Scene, SceneObject, WorldConfig, cell_of
from orthus.data.world.splits import clashes, colors_of, has_violation


@dataclass(frozen=True)
class Edit:
    """`before` + `instruction` -> `after`. kind: recolor, remove, add, move, swap or replace.

    All objects of `before` that the instruction does not name are in `after` unchanged, in the same order.
    is_color_open: an object was added without naming its colour. relation, anchor: it was added beside this one of
    `before`, so that its cell is open. None and "" for all other edits.
    """

    kind: str
    before: Scene
    instruction: str
    after: Scene
    is_color_open: bool = False
    relation: str = ""
    anchor: SceneObject | None = None

    @property
    def is_determined(self) -> bool:
        """Whether `after` follows from `before` and the instruction, up to jitter and the size of a new object."""
        return not self.is_color_open and not self.relation


Change = Edit | None


def _with(scene: Scene, old: SceneObject, new: SceneObject) -> Scene:
    return replace(scene, objects=tuple(new if item is old else item for item in scene.objects))


def _target(source: Source, scene: Scene) -> tuple[SceneObject, str] | None:
    """An object and the noun that means only it."""
    for item in shuffled(source.rng, scene.objects):
        name = reference(scene, item)
        if name is not None:
            return item, name
    return None


def _recolor(source: Source, scene: Scene) -> Change:
    found = _target(source, scene)
    if found is None:
        return None
    item, name = found
    color = pick(source.rng, [color for color in colors_of(item.shape, source.strict) if color != item.color])
    return Edit("recolor", scene, f"make the {name} {color}", _with(scene, item, replace(item, color=color)))


def _remove(source: Source, scene: Scene) -> Change:
    found = _target(source, scene)
    if found is None or len(scene.objects) < 2:
        return None
    item, name = found
    after = replace(scene, objects=tuple(other for other in scene.objects if other is not item))
    return Edit("remove", scene, f"remove the {name}", after)


def added(source: Source, scene: Scene, wanted: Wanted) -> tuple[Scene, SceneObject] | None:
    """The scene with one more object as wanted, and that object; None where it does not fit."""
    item = place(source.rng, source.config, wanted, scene.objects, source.strict)
    return None if item is None else (replace(scene, objects=(*scene.objects, item)), item)


def _add(source: Source, scene: Scene) -> Change:
    """At a place or beside an object; the colour is named, except in 15 %."""
    rng = source.rng
    if len(scene.objects) >= source.config.max_objects:
        return None
    shape, named = pick(rng, SHAPES), rng.random() < 0.85
    relation, anchor = "", None
    if rng.random() < 0.5:
        cell = pick(rng, CELLS)
        wanted, where = Wanted(shape, cell=cell), f"at the {place_words(cell)}"
    else:
        found = _target(source, scene)
        if found is None:
            return None
        relation, anchor = pick(rng, RELATIONS), found[0]
        wanted = Wanted(shape, relation=relation, anchor=scene.objects.index(anchor))
        where = f"{relation} the {found[1]}"
    result = added(source, scene, wanted)
    if result is None:
        return None
    after, item = result
    instruction = f"add {one(shape, item.color if named else None)} {where}"
    return Edit("add", scene, instruction, after, not named, relation, anchor)


def moved(source: Source, scene: Scene, item: SceneObject, wanted: Wanted) -> Scene | None:
    """The scene with `item` at the place that `wanted` asks for: same class, colour and size."""
    others = [other for other in scene.objects if other is not item]
    for _ in range(4):
        target = place(source.rng, source.config, wanted, others, source.strict)
        if target is not None:
            half = item.size / 2
            low, high = half, scene.image_size - half
            shifted = replace(item, x=min(max(target.x, low), high), y=min(max(target.y, low), high))
            if _stands(source.config, shifted, others) and not (source.strict and clashes(shifted, others)):
                return _with(scene, item, shifted)
    return None


def _stands(config: WorldConfig, item: SceneObject, others: Sequence[SceneObject]) -> bool:
    """Whether the object fits among the others and lies inside the picture, on the grid inside one cell."""
    row, column = cell_of(item, config.image_size) if config.level == "grid" else (0, 0)
    side = config.cell if config.level == "grid" else config.image_size
    reach = (side - item.size) / 2
    is_inside = abs(item.x - (column + 0.5) * side) <= reach and abs(item.y - (row + 0.5) * side) <= reach
    return is_inside and fits(item, others, config)


def _move(source: Source, scene: Scene) -> Change:
    found = _target(source, scene)
    if found is None:
        return None
    item, name = found
    here = cell_of(item, scene.image_size)
    cell = pick(source.rng, [cell for cell in CELLS if cell != here])
    after = moved(source, scene, item, Wanted(item.shape, item.color, cell=cell))
    return None if after is None else Edit("move", scene, f"move the {name} to the {place_words(cell)}", after)


def _swap(source: Source, scene: Scene) -> Change:
    """Two objects trade places."""
    if len(scene.objects) < 2:
        return None
    a, b = shuffled(source.rng, scene.objects)[:2]
    names = reference(scene, a), reference(scene, b)
    if None in names or a.shape == b.shape:
        return None
    new_a, new_b = replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)
    rest = [item for item in scene.objects if item is not a and item is not b]
    if not (_stands(source.config, new_a, [*rest, new_b]) and _stands(source.config, new_b, [*rest, new_a])):
        return None
    after = _with(_with(scene, a, new_a), b, new_b)
    return Edit("swap", scene, f"swap the {names[0]} and the {names[1]}", after)


def _replace(source: Source, scene: Scene) -> Change:
    """Another class in the same place, with the same colour and size."""
    found = _target(source, scene)
    if found is None:
        return None
    item, name = found
    options = [s for s in SHAPES if s != item.shape and item.color in colors_of(s, source.strict)]
    shape = pick(source.rng, options)
    after = _with(scene, item, replace(item, shape=shape))
    return Edit("replace", scene, f"replace the {name} with {one(shape)}", after)


EDITS: dict[str, Callable[[Source, Scene], Change]] = {
    "recolor": _recolor,
    "remove": _remove,
    "add": _add,
    "move": _move,
    "swap": _swap,
    "replace": _replace,
}
EDIT_WEIGHTS = (("recolor", 0.2), ("remove", 0.15), ("add", 0.2), ("move", 0.2), ("swap", 0.1), ("replace", 0.15))


def try_edit(source: Source, kind: str, scene: Scene) -> Edit | None:
    """An edit of the kind on the scene, or None where the draw does not work out or breaks a rule."""
    edit = EDITS[kind](source, scene)
    if edit is None or edit.after == scene or (source.strict and has_violation(edit.after)):
        return None
    return edit


def draw_edit(source: Source, kind: str | None = None) -> Edit:
    """A random scene with an edit. kind: a key of EDITS, or None for one drawn by EDIT_WEIGHTS."""
    drawn = kind or pick_weighted(source.rng, EDIT_WEIGHTS)
    if drawn not in EDITS:
        raise ValueError(f"edit kind {drawn!r} is unknown; use one of {', '.join(EDITS)}")

    def attempt() -> Edit | None:
        num_objects = 1 + int(source.rng.random() * 5)
        return try_edit(source, drawn, sample_scene(source.rng, source.config, (), num_objects, (), source.strict))

    return retry(attempt, f"edit of kind {drawn}")


def draft_edit(source: Source) -> Draft:
    """user: picture and instruction; assistant: the edited picture."""
    edit = draw_edit(source)
    return Draft((user(edit.before, edit.instruction), assistant(edit.after)), "edit")
