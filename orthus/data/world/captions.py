"""Caption -> picture examples: a scene and a caption for each kind of the caption mix."""

from __future__ import annotations

from collections.abc import Callable

from orthus.data.world.draft import Draft, Source, assistant, user
from orthus.data.world.language import (
    CaptionMix,
    dense_phrase,
    framed,
    listed,
    one,
    pair_phrase,
    relation_phrase,
    request,
    several,
)
from orthus.data.world.sampling import Wanted, pick, pick_weighted, retry, sample_scene, try_scene
from orthus.data.world.scene import RELATIONS, SHAPES, Scene, relations
from orthus.data.world.splits import colors_of, count_allowed, pair_allowed, triple_allowed

EXTRA_SHARE = 0.1
POSITION_EXTRA_SHARE = 0.2
DOUBLE_SHARE = 0.08
DESCRIBE = "Describe the picture."
COUNT_WEIGHTS = ((1, 0.1), (2, 0.3), (3, 0.3), (4, 0.3))
Captioned = tuple[Scene, str]


def draw_pair(source: Source) -> tuple[str, str]:
    """Two different classes that may share a scene, in random order."""

    def attempt() -> tuple[str, str] | None:
        a, b = pick(source.rng, SHAPES), pick(source.rng, SHAPES)
        return (a, b) if a != b and (pair_allowed(a, b) or not source.strict) else None

    return retry(attempt, "pair of classes")


def draw_triple(source: Source) -> tuple[str, str, str]:
    """(A, relation, B) that a scene may hold."""

    def attempt() -> tuple[str, str, str] | None:
        a, relation, b = pick(source.rng, SHAPES), pick(source.rng, RELATIONS), pick(source.rng, SHAPES)
        return (a, relation, b) if a != b and (triple_allowed(a, relation, b) or not source.strict) else None

    return retry(attempt, "triple")


def draw_count(source: Source) -> tuple[str, int]:
    """A class and how many of it, one to four."""

    def attempt() -> tuple[str, int] | None:
        shape, count = pick(source.rng, SHAPES), pick_weighted(source.rng, COUNT_WEIGHTS)
        return (shape, count) if count_allowed(shape, count) or not source.strict else None

    return retry(attempt, "class and count")


def exactly(source: Source, *required: Wanted, extra_share: float = EXTRA_SHARE) -> Scene:
    """A scene of the required objects; at times with one object of another class as well."""
    extra = int(source.rng.random() < extra_share)
    forbid = {wanted.shape for wanted in required}
    return sample_scene(source.rng, source.config, required, len(required) + extra, forbid, source.strict)


def _single(source: Source) -> Captioned:
    scene = exactly(source, Wanted(pick(source.rng, SHAPES)))
    return scene, framed(source.rng, one(scene.objects[0].shape))


def _two(source: Source) -> Captioned:
    a, b = draw_pair(source)
    scene = exactly(source, Wanted(a), Wanted(b))
    return scene, framed(source.rng, pair_phrase(source.rng, scene, colored=False))


def _counting(source: Source) -> Captioned:
    """n of a class: all of one colour in 60 %, in most of which the caption names it; at times a named companion."""
    rng = source.rng

    def attempt() -> Captioned | None:
        shape, count = draw_count(source)
        color = pick(rng, colors_of(shape, source.strict)) if rng.random() < 0.6 else None
        extra = int(rng.random() < 0.25)
        required = [Wanted(shape, color)] * count
        scene = try_scene(rng, source.config, required, count + extra, {shape}, source.strict)
        if scene is None:
            return None
        phrase = several(count, shape, color if rng.random() < 0.85 else None)
        if extra and color is not None and rng.random() < 0.5:
            other = scene.objects[-1]
            phrase = f"{several(count, shape, color)} and {one(other.shape, other.color)}"
        return scene, framed(rng, phrase)

    return retry(attempt, "counting scene")


def _colors(source: Source) -> Captioned:
    scene = exactly(source, Wanted(pick(source.rng, SHAPES)))
    return scene, framed(source.rng, one(scene.objects[0].shape, scene.objects[0].color))


def _position(source: Source) -> Captioned:
    """A relation B with a margin; colours named in half; at times one more object of another class."""
    rng = source.rng
    if rng.random() < DOUBLE_SHARE:
        return retry(lambda: _beside_two(source), "scene of one object beside two")
    required: list[Wanted] = []

    def attempt() -> Scene | None:
        moved, relation, anchor = draw_triple(source)
        required[:] = [Wanted(anchor), Wanted(moved, relation=relation, anchor=0)]
        extra = int(rng.random() < POSITION_EXTRA_SHARE)
        return try_scene(rng, source.config, required, 2 + extra, {moved, anchor}, source.strict)

    scene = retry(attempt, "position scene")
    relation = required[1].relation or ""
    phrase = relation_phrase(rng, scene.objects[1], relation, scene.objects[0], colored=rng.random() < 0.5)
    return scene, framed(rng, phrase)


def _beside_two(source: Source) -> Captioned | None:
    """A beside two B of one colour: "a red circle above two blue stars"."""
    rng = source.rng
    moved, relation, anchor = draw_triple(source)
    if source.strict and not count_allowed(anchor, 2):
        return None
    color = pick(rng, colors_of(anchor, source.strict))
    across = RELATIONS[2:] if relation in RELATIONS[:2] else RELATIONS[:2]
    pair = [Wanted(anchor, color), Wanted(anchor, color, relation=pick(rng, across))]
    required = [*pair, Wanted(moved, relation=relation)]
    scene = try_scene(rng, source.config, required, 3, (), source.strict)
    if scene is None or relation not in relations(scene.objects[2], scene.objects[1]):
        return None
    return scene, framed(rng, f"{one(moved, scene.objects[2].color)} {relation} {several(2, anchor, color)}")


def _color_attr(source: Source) -> Captioned:
    """Two or three objects of different classes and colours, all named with their colours."""
    rng = source.rng
    count = 3 if rng.random() < 0.08 else 2

    def attempt() -> Scene | None:
        shapes = [pick(rng, SHAPES) for _ in range(count)]
        wanted = [Wanted(shape, pick(rng, colors_of(shape, source.strict))) for shape in shapes]
        if len(set(shapes)) < count or len({item.color for item in wanted}) < count:
            return None
        extra = int(rng.random() < EXTRA_SHARE)
        return try_scene(rng, source.config, wanted, count + extra, shapes, source.strict)

    scene = retry(attempt, "scene with colour attributes")
    if count == 3:
        return scene, framed(rng, listed([one(item.shape, item.color) for item in scene.objects[:3]]))
    return scene, framed(rng, pair_phrase(rng, scene, colored=True))


def _dense(source: Source) -> Captioned:
    scene = sample_scene(source.rng, source.config, strict=source.strict)
    return scene, request(source.rng, scene)


KINDS: dict[str, Callable[[Source], Captioned]] = {
    "single": _single,
    "two": _two,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
    "dense": _dense,
}


def captioned_scene(source: Source, kind: str) -> Captioned:
    """A scene and a caption of the kind (a field of CaptionMix). ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"caption kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    return KINDS[kind](source)


def draft_t2i(source: Source, mix: CaptionMix) -> Draft:
    """user: caption; assistant: picture."""
    scene, caption = captioned_scene(source, pick_weighted(source.rng, mix.items()))
    return Draft((user(caption), assistant(scene)), "t2i")


def draft_describe(source: Source) -> Draft:
    """user: picture and the request to describe it; assistant: every object in raster order."""
    scene = sample_scene(source.rng, source.config, strict=source.strict)
    return Draft((user(scene, DESCRIBE), assistant(dense_phrase(scene))), "describe")
