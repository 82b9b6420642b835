"""Questions about a picture. For yes/no questions P(yes | question) is 1/2 by construction.

A twin scene is drawn with up to four independent switches: two objects trade places, the same two trade colours, an
object is of one class or of another, a class has n or n + 1 objects. Each switch has two *opposite* questions of which
exactly one is true. All settings of the switches must be allowed, each is as likely as the others, and the question is
drawn independently of the setting, so that no question and no other answer tells how a switch is set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from numpy.random import Generator

from orthus.data.world.captions import DESCRIBE, draw_triple
from orthus.data.world.draft import Draft, DraftSegment, DraftTurn, Source, assistant, user
from orthus.data.world.language import NOTHING, NUMBERS, about_phrase, dense_phrase, one, place_words, plural, several
from orthus.data.world.sampling import CELLS, Wanted, pick, pick_weighted, retry, shuffled, try_scene
from orthus.data.world.scene import MIRROR, RELATIONS, SHAPES, Scene, SceneObject, cell_of, relations
from orthus.data.world.splits import colors_of, count_allowed, has_violation, pair_allowed, triple_allowed

YES_NO = " Please answer yes or no."
SUBTASKS = ("existence", "count", "position", "color")
SWITCH_SHARES = {"position": 0.7, "color": 0.5, "existence": 0.45, "count": 0.5}
EMPTY_SHARE = 0.1
COUNT_BASES = ((1, 0.3), (2, 0.4), (3, 0.3))


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    asks: facts that it asks for. reveals: facts that can be read off the question and its answer. Two questions may
    stand in one dialogue only if neither reveals what the other asks. about: the classes whose objects the answer
    follows from. relation: how the first of two is placed to the second.
    """

    text: str
    answer: str
    kind: str
    asks: frozenset[str]
    reveals: frozenset[str]
    about: tuple[str, ...] = ()
    relation: str = ""

    def agrees_with(self, other: Question) -> bool:
        """Whether neither question gives the other away."""
        return self.asks.isdisjoint(other.reveals) and self.reveals.isdisjoint(other.asks)


@dataclass(frozen=True)
class TwinScene:
    """A scene and its switches.

    The first two objects, a and b, can trade boxes ("position": `a relation b` in the base) and colours ("color"), an
    object of class `existence[0]` can become one of `existence[1]`, and one object of class `count` can go.
    """

    base: Scene
    switches: tuple[str, ...]
    relation: str = ""
    existence: tuple[str, str] = ("", "")
    count: str = ""

    def setting(self, flipped: frozenset[str]) -> Scene:
        """The scene with the named switches flipped."""
        objects = list(self.base.objects)
        if "position" in flipped:
            a, b = objects[:2]
            objects[:2] = [replace(a, x=b.x, y=b.y, size=b.size), replace(b, x=a.x, y=a.y, size=a.size)]
        if "color" in flipped:
            a, b = objects[:2]
            objects[:2] = [replace(a, color=b.color), replace(b, color=a.color)]
        if "existence" in flipped:
            old, new = self.existence
            objects = [replace(item, shape=new) if item.shape == old else item for item in objects]
        if "count" in flipped:
            objects.remove(next(item for item in objects if item.shape == self.count))
        return replace(self.base, objects=tuple(objects))

    def settings(self) -> list[Scene]:
        """The scenes of all settings of the switches."""
        masks = product((False, True), repeat=len(self.switches))
        return [self.setting(frozenset(name for name, on in zip(self.switches, mask, strict=True) if on)) for mask in masks]


def _pair_objects(source: Source, positioned: bool) -> tuple[list[Wanted], str] | None:
    """Two objects that may trade colours and, if `positioned`, places; and the relation of the first to the second."""
    a, relation, b = draw_triple(source)
    if source.strict and not triple_allowed(a, MIRROR[relation], b):
        return None
    shared = [color for color in colors_of(a, source.strict) if color in colors_of(b, source.strict)]
    first = pick(source.rng, shared)
    second = pick(source.rng, [color for color in shared if color != first])
    anchor, moved = Wanted(b, second), Wanted(a, first, relation=relation if positioned else None)
    return [anchor, moved], relation


def _companions(source: Source, taken: list[str]) -> list[str]:
    """Classes that may join those of `taken`."""
    free = [shape for shape in SHAPES if shape not in taken]
    if source.strict:
        free = [shape for shape in free if all(pair_allowed(shape, other) for other in taken)]
    return free


def _existence_objects(source: Source, taken: list[str]) -> tuple[list[Wanted], tuple[str, str]] | None:
    options = _companions(source, taken)
    if len(options) < 2:
        return None
    old, new = shuffled(source.rng, options)[:2]
    shared = [color for color in colors_of(old, source.strict) if color in colors_of(new, source.strict)]
    return [Wanted(old, pick(source.rng, shared))], (old, new)


def _count_objects(source: Source, taken: list[str], room: int) -> list[Wanted] | None:
    """n + 1 objects of a class, n from one to three and n + 1 at most `room`."""
    base = pick_weighted(source.rng, [(n, weight) for n, weight in COUNT_BASES if n < room])
    options = _companions(source, taken)
    if not options:
        return None
    shape = pick(source.rng, options)
    if source.strict and not (count_allowed(shape, base) and count_allowed(shape, base + 1)):
        return None
    return [Wanted(shape)] * (base + 1)


def _requirements(source: Source, switches: tuple[str, ...]) -> tuple[list[Wanted], str, tuple[str, str], str] | None:
    """The objects that the switches need, with `relation`, `existence` and `count` of the TwinScene."""
    required: list[Wanted] = []
    relation, existence, count = "", ("", ""), ""
    if "position" in switches or "color" in switches:
        pair = _pair_objects(source, "position" in switches)
        if pair is None:
            return None
        required, relation = pair
    if "existence" in switches:
        chosen = _existence_objects(source, [wanted.shape for wanted in required])
        if chosen is None:
            return None
        required, existence = required + chosen[0], chosen[1]
    if "count" in switches:
        taken = [wanted.shape for wanted in required] + [shape for shape in existence if shape]
        group = _count_objects(source, taken, source.config.max_objects - len(required))
        if group is None:
            return None
        required, count = required + group, group[0].shape
    return required, relation, existence, count


def try_twin(source: Source, switches: tuple[str, ...], num_extra: int | None = None) -> TwinScene | None:
    """One attempt at a scene of which every setting of `switches` is allowed.

    num_extra: how many objects take no part in any switch; None means one in 30 %, where there is room.
    """
    needed = _requirements(source, switches)
    if needed is None:
        return None
    required, relation, existence, count = needed
    extra = num_extra
    if extra is None:
        extra = int(len(required) < source.config.max_objects and source.rng.random() < 0.3)
    forbid = {wanted.shape for wanted in required} | set(existence)
    base = try_scene(source.rng, source.config, required, len(required) + extra, forbid, source.strict)
    if base is None:
        return None
    if relation:  # the anchor was placed first; `a relation b` is read in the order (a, b)
        base = replace(base, objects=(base.objects[1], base.objects[0], *base.objects[2:]))
    twin = TwinScene(base, switches, relation, existence, count)
    if source.strict and any(has_violation(scene) for scene in twin.settings()):
        return None
    return twin


def _yes_no(text: str, truth: bool, kind: str, asks: set[str], reveals: set[str], about: tuple[str, ...]) -> Question:
    return Question(text + YES_NO, "yes" if truth else "no", kind, frozenset(asks), frozenset(asks | reveals), about)


def reason(question: Question, scene: Scene) -> str:
    """What an answer follows from: the objects of the classes that the question is about, and for yes/no questions the fact
    to compare with the question: "star red top left: red", "no moon", "star red top left, moon blue lower right: left of".
    """
    if not question.about:
        return ""
    objects, found = about_phrase(scene, question.about), [item for item in scene.objects if item.shape == question.about[0]]
    if question.kind == "color":
        return f"{objects}: {found[0].color}"
    if question.kind == "count":
        return f"{objects}: {NUMBERS[len(found)]}"
    return f"{objects}: {question.relation}" if question.kind == "position" else objects


def _exists(*shapes: str) -> set[str]:
    return {f"exists {shape}" for shape in shapes}


def existence_question(shape: str, other: str, truth: bool) -> Question:
    """Is there an object of the class? `other` is the class that is there if and only if this one is not."""
    return _yes_no(f"Is there {one(shape)} in the picture?", truth, "existence", _exists(shape, other), set(), (shape,))


def count_question(shape: str, count: int, truth: bool) -> Question:
    verb = f"Is there only one {shape}" if count == 1 else f"Are there {several(count, shape)}"
    return _yes_no(f"{verb} in the picture?", truth, "count", {f"count {shape}"}, _exists(shape), (shape,))


def position_question(a: str, relation: str, b: str, truth: bool) -> Question:
    asks = {f"where {a}", f"where {b}"}
    question = _yes_no(f"Is the {a} {relation} the {b}?", truth, "position", asks, _exists(a, b), (a, b))
    return replace(question, relation=relation if truth else MIRROR[relation])


def color_question(shape: str, color: str, truth: bool, short: bool = True) -> Question:
    text = f"Is the {shape} {color}?" if short else f"Is there {one(shape, color)} in the picture?"
    return _yes_no(text, truth, "color", {f"color {shape}"}, _exists(shape), (shape,))


def opposites(rng: Generator, twin: TwinScene, switch: str, flipped: bool) -> tuple[Question, Question]:
    """Two opposite questions on a switch: the first is true in the base, the second where the switch is flipped."""
    truth = not flipped
    a, b = twin.base.objects[0], twin.base.objects[min(1, len(twin.base.objects) - 1)]
    if switch == "existence":
        old, new = twin.existence
        return existence_question(old, new, truth), existence_question(new, old, not truth)
    if switch == "count":
        most = sum(item.shape == twin.count for item in twin.base.objects)
        return count_question(twin.count, most, truth), count_question(twin.count, most - 1, not truth)
    if switch == "position":
        return _position_opposites(rng, a.shape, twin.relation, b.shape, truth)
    short, (asked, other) = rng.random() < 0.7, (a, b) if rng.random() < 0.5 else (b, a)
    first = color_question(asked.shape, asked.color, truth, short)
    return first, color_question(asked.shape, other.color, not truth, short)


def _position_opposites(rng: Generator, a: str, relation: str, b: str, truth: bool) -> tuple[Question, Question]:
    """The relation and its mirror image, asked of either object."""
    if rng.random() < 0.5:
        a, b, relation = b, a, MIRROR[relation]
    return position_question(a, relation, b, truth), position_question(a, MIRROR[relation], b, not truth)


def _unique(scene: Scene) -> list[SceneObject]:
    shapes = [item.shape for item in scene.objects]
    return [item for item in scene.objects if shapes.count(item.shape) == 1]


def _object_facts(item: SceneObject) -> set[str]:
    return {f"exists {item.shape}", f"color {item.shape}", f"where {item.shape}", f"count {item.shape}"}


def _open(text: str, answer: str, kind: str, asks: set[str], reveals: set[str], *about: str) -> Question:
    return Question(text, answer, kind, frozenset(asks), frozenset(asks | reveals), about)


def _color_open(rng: Generator, scene: Scene) -> Question | None:
    unique = _unique(scene)
    if not unique:
        return None
    item = pick(rng, unique)
    return _open(
        f"What color is the {item.shape}?", item.color, "what color", {f"color {item.shape}"}, _exists(item.shape), item.shape
    )


def _where_open(rng: Generator, scene: Scene) -> Question | None:
    unique = _unique(scene)
    if not unique:
        return None
    item = pick(rng, unique)
    answer = place_words(cell_of(item, scene.image_size))
    return _open(f"Where is the {item.shape}?", answer, "where", {f"where {item.shape}"}, _exists(item.shape), item.shape)


def _count_open(rng: Generator, scene: Scene) -> Question | None:
    """How many of a class: the most frequent one in half of the cases, at times one that is not there."""
    shapes = [item.shape for item in scene.objects]
    draw = rng.random()
    shape = pick(rng, SHAPES) if draw < 0.15 else pick(rng, shapes)
    if draw > 0.5:
        shape = max(shapes, key=shapes.count)
    asks = {f"count {shape}", f"exists {shape}"}
    return _open(f"How many {plural(shape)} are there?", NUMBERS[shapes.count(shape)], "how many", asks, set(), shape)


def _relation_open(rng: Generator, scene: Scene) -> Question | None:
    """What is left of the square?, where exactly one object is."""
    unique = _unique(scene)
    if not unique:
        return None
    anchor, relation = pick(rng, unique), pick(rng, RELATIONS)
    found = [item for item in scene.objects if item is not anchor and relation in relations(item, anchor)]
    if len(found) != 1:
        return None
    asks = _object_facts(found[0]) | {f"where {anchor.shape}"}
    answer = one(found[0].shape, found[0].color)
    return _open(f"What is {relation} the {anchor.shape}?", answer, "what relation", asks, _exists(anchor.shape), anchor.shape)


def _cell_open(rng: Generator, scene: Scene) -> Question | None:
    """What is at the upper left?; "nothing" at times."""
    cells = {cell_of(item, scene.image_size): item for item in scene.objects}
    if len(cells) < len(scene.objects):
        return None
    cell = pick(rng, CELLS) if rng.random() < EMPTY_SHARE else pick(rng, list(cells))
    item = cells.get(cell)
    answer = NOTHING if item is None else one(item.shape, item.color)
    asks = {f"cell {place_words(cell)}"} | (set() if item is None else _object_facts(item))
    return _open(f"What is at the {place_words(cell)}?", answer, "what place", asks, set())


OPEN = (
    (_color_open, 0.12),
    (_where_open, 0.25),
    (_count_open, 0.18),
    (_relation_open, 0.25),
    (_cell_open, 0.2),
)


def open_question(rng: Generator, scene: Scene) -> Question | None:
    """A random question with a short answer in words; None where the drawn kind does not apply to the scene."""
    return pick_weighted(rng, OPEN)(rng, scene)


def _draw_switches(rng: Generator) -> tuple[str, ...]:
    drawn = tuple(name for name, share in SWITCH_SHARES.items() if rng.random() < share)
    if len(drawn) > 2 and "existence" in drawn and "count" in drawn:  # too crowded: few such scenes are allowed
        dropped = pick(rng, ("existence", "count"))
        drawn = tuple(name for name in drawn if name != dropped)
    return drawn or (pick(rng, SUBTASKS),)


def draw_questions(source: Source) -> tuple[Scene, list[Question]]:
    """A scene and two to four questions on it in random order, yes/no and open, none giving another away."""
    rng = source.rng
    switches = _draw_switches(rng)
    twin = retry(lambda: try_twin(source, switches), f"twin scene with {switches}")
    flipped = frozenset(name for name in switches if rng.random() < 0.5)
    scene = twin.setting(flipped)
    questions = [pick(rng, opposites(rng, twin, name, name in flipped)) for name in switches]
    total = 2 + int(rng.random() * 3)
    for _ in range(30):
        if len(questions) >= total:
            break
        extra = open_question(rng, scene)
        if extra is not None and all(extra.agrees_with(question) for question in questions):
            questions.append(extra)
    return scene, shuffled(rng, questions)


def dialogue(scene: Scene, questions: Sequence[Question], first: Sequence[DraftSegment], task: str) -> Draft:
    """Questions and their answers in turn; `first`, the user's first turn, shows the scene and asks the first question."""
    turns: list[DraftTurn] = []
    for place, question in enumerate(questions):
        turns += [user(question.text) if place else user(*first), assistant(question.answer)]
    return Draft(tuple(turns), task, tuple(reason(question, scene) for question in questions))


def draft_vqa(source: Source) -> Draft:
    """A picture and questions on it; at times a request to describe it at last."""
    scene, questions = draw_questions(source)
    draft = dialogue(scene, questions, (scene, questions[0].text), "vqa")
    if any(question.kind == "existence" for question in questions) or source.rng.random() >= 0.1:
        return draft
    described = (user(DESCRIBE), assistant(dense_phrase(scene)))
    return replace(draft, turns=(*draft.turns, *described), reasons=(*draft.reasons, ""))
