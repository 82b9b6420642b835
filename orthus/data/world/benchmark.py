"""Held-out benchmark items in GenEval's and MME's own forms, and items for edits and stories. Pure functions of a seed.

The benchmark draws from streams of their own, apart from every data set split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.random import Generator

from orthus.data.world.draft import Source
from orthus.data.world.edits import EDITS, Edit, draw_edit
from orthus.data.world.language import one, several
from orthus.data.world.questions import SUBTASKS, TwinScene, opposites, try_twin
from orthus.data.world.sampling import T, Wanted, retry, sample_scene, shuffled
from orthus.data.world.scene import COLORS, MIRROR, RELATIONS, SHAPES, Scene, WorldConfig, cell_of
from orthus.data.world.splits import (
    HELD_OUT,
    SPLITS,
    clauses,
    color_clause,
    count_clause,
    pair_clause,
    relation_clause,
)
from orthus.data.world.stories import Story, draw_story

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL_COUNTS = (2, 3, 4)
STREAMS = ("geneval", "mme", "edit", "story")
# The kinds of story of which the prompt fixes the number of pictures and what they show.
STORY_KINDS = ("count up", "missing", "draw then describe", "changes")
CLAUSE_OF_SUBTASK = {"existence": "pair", "count": "count", "position": "relation", "color": "color"}
Item = dict[str, Any]
Clauses = list[dict[str, Any]]


@dataclass(frozen=True)
class MmeItem:
    """A picture with one "yes" and one "no" question: `questions` holds (text, answer) twice, in random order.

    held_out: the scene or its twin holds a held-out clause of the kind that the questions are about.
    """

    image_id: str
    subtask: str
    scene: Scene
    questions: tuple[tuple[str, str], tuple[str, str]]
    held_out: bool


@dataclass(frozen=True)
class EditItem:
    """An edit with what must be seen afterwards: `kept` and `changed` together are all that the picture may hold.

    Each is a list of {"class", "color", "count", "cell"}; `color` or `cell` (row, column) is None where the
    instruction leaves it open. A new object at an open cell must be `edit.relation` of `edit.anchor`.
    """

    edit: Edit
    kept: Clauses
    changed: Clauses


@dataclass(frozen=True)
class StoryItem:
    """A story with what each picture must hold, and nothing else, as {"class", "color", "count", "cell"}.

    `cell` is None where it is open. `story.first` is the picture in the user's turn or None; the expected number of
    pictures is `len(expected)`.
    """

    story: Story
    expected: tuple[Clauses, ...]


def _stream(name: str, seed: int) -> Generator:
    """The random stream of one part of the benchmark (the last word keeps it apart from those of the data sets)."""
    words = [WorldConfig().world_seed, SPLITS.index("test"), STREAMS.index(name), seed, 1]
    return np.random.default_rng(words)


def _spread(rng: Generator, options: Sequence[T], count: int) -> list[T]:
    """`count` options, each as often as the others (give or take one), in random order."""
    drawn: list[T] = []
    while len(drawn) < count:
        drawn += shuffled(rng, options)
    return shuffled(rng, drawn[:count])


def _clause(shape: str, count: int = 1, **extra: object) -> dict[str, Any]:
    return {"class": shape, "count": count, **extra}


def _item(tag: str, include: Clauses, phrase: str, exclude: Clauses | None = None) -> Item:
    item: Item = {"tag": tag, "include": include}
    if exclude:
        item["exclude"] = exclude
    item["prompt"] = f"a photo of {phrase}"
    return item


def _single_items() -> list[Item]:
    return [_item("single_object", [_clause(shape)], one(shape)) for shape in SHAPES]


def _two_items(held_out: bool) -> list[Item]:
    pairs = [(a, b) for a, b in permutations(SHAPES, 2) if (pair_clause(a, b) in HELD_OUT) == held_out]
    return [_item("two_object", [_clause(a), _clause(b)], f"{one(a)} and {one(b)}") for a, b in pairs]


def _counting_items(held_out: bool) -> list[Item]:
    groups = [(s, n) for s in SHAPES for n in GENEVAL_COUNTS if (count_clause(s, n) in HELD_OUT) == held_out]
    return [_item("counting", [_clause(s, n)], several(n, s), [_clause(s, n + 1)]) for s, n in groups]


def _color_items(held_out: bool) -> list[Item]:
    pairs = [(s, c) for s in SHAPES for c in COLORS if (color_clause(s, c) in HELD_OUT) == held_out]
    return [_item("colors", [_clause(s, color=c)], one(s, c)) for s, c in pairs]


def _position_items(held_out: bool) -> list[Item]:
    """`include[0]` is the reference, `include[1]` the moved object, which the prompt names first."""
    triples = [
        (a, relation, b)
        for a, b in permutations(SHAPES, 2)
        for relation in RELATIONS
        if (relation_clause(a, relation, b) in HELD_OUT) == held_out and pair_clause(a, b) not in HELD_OUT
    ]
    return [
        _item("position", [_clause(b), _clause(a, position=[relation, 0])], f"{one(a)} {relation} {one(b)}")
        for a, relation, b in triples
    ]


def _color_attr_items(held_out: bool, by_pair: bool) -> list[Item]:
    """Held out by the class pair (`by_pair`) or by one of the two (class, colour) pairs, never by both."""
    items = []
    for a, b in permutations(SHAPES, 2):
        if (pair_clause(a, b) in HELD_OUT) != (held_out and by_pair):
            continue
        for first, second in permutations(COLORS, 2):
            num_held = (color_clause(a, first) in HELD_OUT) + (color_clause(b, second) in HELD_OUT)
            if num_held == int(held_out and not by_pair):
                include = [_clause(a, color=first), _clause(b, color=second)]
                items.append(_item("color_attr", include, f"{one(a, first)} and {one(b, second)}"))
    return items


def small_geneval_items(num_per_task: int = 200, held_out: bool = True, seed: int = 0) -> list[Item]:
    """Items of the six tasks in GenEval's metadata form, `num_per_task` of each, in the order of GENEVAL_TAGS.

    held_out: each item needs a held-out clause (colors: class and colour; counting: class and count; two_object: class
    pair; position: triple; color_attr: half and half class pair, class and colour), else none. single_object has no
    such clause: all ten classes are seen in training. There are few distinct prompts in some tasks (held-out counting:
    6), so prompts repeat, equally often: cluster by prompt in statistics.
    """
    rng = _stream("geneval", seed)
    half = num_per_task // 2
    items = _spread(rng, _single_items(), num_per_task)
    for build in (_two_items, _counting_items, _color_items, _position_items):
        items += _spread(rng, build(held_out), num_per_task)
    both = _spread(rng, _color_attr_items(held_out, by_pair=True), half)
    both += _spread(rng, _color_attr_items(held_out, by_pair=False), num_per_task - half)
    return items + shuffled(rng, both)


def ground_truth_scene(item: Mapping[str, Any], rng: Generator, config: WorldConfig | None = None) -> Scene:
    """A scene that holds what the item asks for and nothing else."""
    required: list[Wanted] = []
    for clause in item["include"]:
        relation, anchor = clause.get("position", (None, 0))
        wanted = Wanted(clause["class"], clause.get("color"), relation=relation, anchor=anchor)
        required += [wanted] * clause["count"]
    return sample_scene(rng, config or WorldConfig(), required, strict=False)


def _is_about_held_out(twin: TwinScene, subtask: str) -> bool:
    """Whether the objects that the questions ask about make a held-out clause of their kind true in some setting."""
    a, b = twin.base.objects[0], twin.base.objects[min(1, len(twin.base.objects) - 1)]
    if subtask == "position":
        turned = (twin.relation, MIRROR[twin.relation])
        return any(relation_clause(a.shape, relation, b.shape) in HELD_OUT for relation in turned)
    if subtask == "color":
        return any(color_clause(shape, color) in HELD_OUT for shape in (a.shape, b.shape) for color in (a.color, b.color))
    if subtask == "count":
        most = sum(item.shape == twin.count for item in twin.base.objects)
        return any(count_clause(twin.count, count) in HELD_OUT for count in (most, most - 1))
    others = [item.shape for item in twin.base.objects if item.shape != twin.existence[0]]
    return any(pair_clause(shape, other) in HELD_OUT for shape in twin.existence for other in others)


def _mme_twin(source: Source, subtask: str) -> TwinScene:
    """A twin scene; when the source is not strict, one held out by a clause of the subtask's kind and no other."""
    kind = CLAUSE_OF_SUBTASK[subtask]

    def attempt() -> TwinScene | None:
        num_extra = 1 + int(source.rng.random() * 3) if subtask == "existence" else None
        twin = try_twin(source, (subtask,), num_extra)
        if twin is None or source.strict:
            return twin
        found = set().union(*(clauses(scene) for scene in twin.settings())) & HELD_OUT
        is_clean = all(clause[0] == kind for clause in found)
        return twin if is_clean and _is_about_held_out(twin, subtask) else None

    return retry(attempt, f"benchmark scene for {subtask}", tries=5000)


def small_mme_items(num_images_per_subtask: int = 100, seed: int = 0, config: WorldConfig | None = None) -> list[MmeItem]:
    """Pictures with two opposite questions each, for the subtasks of SUBTASKS in turn.

    Pictures come in twins on which the same two questions have opposite answers, so that every question string is
    answered yes exactly as often as no. Every other pair of twins is about a held-out clause.
    ValueError for an odd number of pictures.
    """
    if num_images_per_subtask % 2:
        raise ValueError(f"num_images_per_subtask={num_images_per_subtask} is odd; pictures come in twins, give an even one")
    rng = _stream("mme", seed)
    world = config or WorldConfig()
    items: list[MmeItem] = []
    for subtask in SUBTASKS:
        of_subtask: list[MmeItem] = []
        for number in range(num_images_per_subtask // 2):
            held_out = number % 2 == 1
            twin = _mme_twin(Source(rng, world, strict=not held_out), subtask)
            of_subtask += _mme_pair(rng, twin, subtask, number, held_out)
        items += shuffled(rng, of_subtask)
    return items


def _mme_pair(rng: Generator, twin: TwinScene, subtask: str, number: int, held_out: bool) -> list[MmeItem]:
    """The two pictures of a twin, with the same two questions."""
    first, second = opposites(rng, twin, subtask, flipped=False)
    pair = []
    for is_flipped in (False, True):
        answers = (second.answer, first.answer) if is_flipped else (first.answer, second.answer)
        questions = [(first.text, answers[0]), (second.text, answers[1])]
        if rng.random() < 0.5:
            questions.reverse()
        scene = twin.setting(frozenset((subtask,)) if is_flipped else frozenset())
        image_id = f"{subtask}/{number:04d}{'b' if is_flipped else 'a'}"
        pair.append(MmeItem(image_id, subtask, scene, (questions[0], questions[1]), held_out))
    return pair


def _contents(scene: Scene, with_cells: bool = True) -> Clauses:
    """What the scene holds: one clause per object, or counts of equal objects where cells are open."""
    if with_cells:
        return [
            {"class": item.shape, "color": item.color, "count": 1, "cell": cell_of(item, scene.image_size)}
            for item in scene.objects
        ]
    counts = Counter((item.shape, item.color) for item in scene.objects)
    return [{"class": shape, "color": color, "count": n, "cell": None} for (shape, color), n in counts.items()]


def edit_items(num_items: int = 120, seed: int = 0, config: WorldConfig | None = None, strict: bool = True) -> list[EditItem]:
    """Edits of all kinds, equally often, on new scenes. strict: without held-out clauses."""
    rng = _stream("edit", seed)
    source = Source(rng, config or WorldConfig(), strict)
    items = []
    for kind in _spread(rng, list(EDITS), num_items):
        edit = draw_edit(source, kind)
        after = list(zip(edit.after.objects, _contents(edit.after), strict=True))
        kept = [clause for item, clause in after if item in edit.before.objects]
        changed = [clause for item, clause in after if item not in edit.before.objects]
        for clause in changed if kind == "add" else []:
            clause["color"] = None if edit.is_color_open else clause["color"]
            clause["cell"] = None if edit.relation else clause["cell"]
        items.append(EditItem(edit, kept, changed))
    return items


def story_items(num_items: int = 80, seed: int = 0, config: WorldConfig | None = None, strict: bool = True) -> list[StoryItem]:
    """Stories of the kinds whose prompt fixes the number of pictures, equally often. strict: no held-out clauses."""
    rng = _stream("story", seed)
    source = Source(rng, config or WorldConfig(), strict)
    items = []
    for kind in _spread(rng, STORY_KINDS, num_items):
        story = _checkable_story(source, kind)
        with_cells = kind == "changes"
        items.append(StoryItem(story, tuple(_contents(scene, with_cells) for scene in story.pictures)))
    return items


def _checkable_story(source: Source, kind: str) -> Story:
    """A story of the kind; one of changes that leave nothing open."""

    def attempt() -> Story | None:
        story = draw_story(source, kind)
        return story if kind != "changes" or all(story.determined) else None

    return retry(attempt, f"checkable story of kind {kind}")
