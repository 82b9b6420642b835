"""GenEval's verdict (arXiv 2310.11513): filter detections, judge a picture. numpy and the standard library only.

Detections come in as boxes with scores, colours as names. The rules, the reason strings and the arithmetic are those of the
published scorer. Two things differ on purpose, where its output depends on the machine: relation names in a reason are sorted
(it joins a set, whose order changes with the hash seed), and of equal scores the later detection comes first (it reverses an
unstable sort, whose order changes with the processor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One detected object: `box` is (x0, y0, x1, y1) in pixels, x1 and y1 exclusive; `color` is a name where known.

    `mask` is `(H, W)` over the whole picture, where the detector gives one.
    """

    class_name: str
    score: float
    box: Box
    color: str | None = None
    mask: npt.NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)


Colors = Callable[[str, Sequence[Detection]], Sequence[str | None]]
"""What names the colours of detections of one class, in order: `colors(class_name, detections)`."""


@dataclass(frozen=True)
class Options:
    """The scorer's `--options` that a verdict depends on; the defaults are the published ones.

    `max_overlap` is the intersection over union from which a detection is dropped beside a better one; 1.0 drops none.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1


PICTURE_OPTIONS = ("model", "clip_model", "bgcolor", "crop")
"""Published options that act before the verdict, on detections and colours."""


def parse_options(given: Mapping[str, Any]) -> Options:
    """Options from the published names, values as strings or numbers; the names that act before the verdict are passed over."""
    known = {name: type(value) for name, value in asdict(Options()).items()}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in known:
            try:
                values[name] = known[name](value)
            except (TypeError, ValueError):
                raise ValueError(f"option {name}={value!r} is no {known[name].__name__}") from None
        elif name not in PICTURE_OPTIONS:
            raise ValueError(f"unknown option {name!r}; the published ones are {', '.join([*known, *PICTURE_OPTIONS])}")
    return Options(**values)


@dataclass(frozen=True)
class Verdict:
    """`reason` has one line per failed clause; `details` is class -> [[x0, y0, x1, y1, score], ...], as upstream."""

    correct: bool
    reason: str
    details: dict[str, list[list[float]]]


def relative_position(box: Sequence[float], reference: Sequence[float], position_threshold: float = 0.1) -> set[str]:
    """Relations that hold from `box` to `reference`; empty when the boxes overlap too much to say.

    Each axis of the centre offset shrinks by `position_threshold` times the summed sides, and is then divided by the
    norm of the offset *before* shrinking; a relation needs strictly more than 0.5 of it.
    """
    corners = np.array([box, reference]).reshape(2, 2, 2)  # (box, corner, axis)
    with np.errstate(all="ignore"):
        offset = np.subtract(*corners.mean(axis=1))
        sides = np.abs(corners[:, 1] - corners[:, 0])
        shrunk = np.maximum(np.abs(offset) - position_threshold * (sides[0] + sides[1]), 0) * np.sign(offset)
        if np.all(np.abs(shrunk) < 1e-3):
            return set()
        dx, dy = shrunk / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, is_true in holds.items() if is_true}


def intersection_over_union(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU of two boxes as the scorer computes it: a box that ends at x1 counts the column x1 too."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - shared
    return shared / union if union else 0


def filter_detections(detections: Sequence[Detection], tag: str, options: Options = Options()) -> dict[str, list[Detection]]:
    """Detections kept per class, most confident first, of equal scores the later one first.

    The score must exceed the tag's threshold; the best `max_objects` stay, without those that overlap a better one.
    """
    threshold = options.counting_threshold if tag == "counting" else options.threshold
    by_class: dict[str, list[Detection]] = {}
    for detection in detections:
        by_class.setdefault(detection.class_name, []).append(detection)
    kept = {name: _best(found, threshold, options) for name, found in by_class.items()}
    return {name: found for name, found in kept.items() if found}


def _best(found: Sequence[Detection], threshold: float, options: Options) -> list[Detection]:
    scores = np.array([detection.score for detection in found])
    order = np.argsort(scores, kind="stable")[::-1]
    order = order[scores[order] > threshold][: options.max_objects]
    candidates = [found[index] for index in order]
    if options.max_overlap == 1:
        return candidates
    kept: list[Detection] = []
    for candidate in candidates:
        if all(intersection_over_union(better.box, candidate.box) < options.max_overlap for better in kept):
            kept.append(candidate)
    return kept


def detected_colors(class_name: str, detections: Sequence[Detection]) -> list[str | None]:
    """Colour names that the detections carry themselves (the small world's grader and oracle)."""
    return [detection.color for detection in detections]


def verdict(
    detections: Sequence[Detection],
    colors: Colors,
    metadata: Mapping[str, Any],
    image_size: tuple[int, int] | None = None,
    options: Options = Options(),
) -> Verdict:
    """Judge one picture against `metadata` ("tag", "include", "exclude" in GenEval's form).

    `image_size` is (width, height) in pixels; where given, a box outside the picture raises `ValueError`, since boxes
    in another scale would silently change every relation. A clause without "class" or "count" raises `ValueError`.
    """
    if image_size is not None:
        _check_boxes(detections, image_size)
    check_metadata(metadata)
    objects = filter_detections(_in_their_precision(detections), metadata["tag"], options)
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for clause in metadata.get("include", []):
        found = objects.get(clause["class"], [])[: clause["count"]]
        failures = _include_failures(clause, found, groups, colors, options)
        reasons.extend(failures)
        groups.append(None if failures else found)
    for clause in metadata.get("exclude", []):
        name, count = clause["class"], len(objects.get(clause["class"], []))
        if count >= clause["count"]:
            reasons.append(f"expected {name}<{clause['count']}, found {count}")
    details = {name: [[float(value) for value in (*o.box, o.score)] for o in group] for name, group in objects.items()}
    return Verdict(not reasons, "\n".join(reasons), details)


def _in_their_precision(detections: Sequence[Detection]) -> list[Detection]:
    """The detections with float32 numbers if float32 holds all of them exactly, else as they are.

    Detectors give float32, and the scorer computes in the type that it is given: a score of float32(0.3), which is
    0.30000001192 when written out, does not exceed the threshold 0.3.
    """
    exact = np.array([(*detection.box, detection.score) for detection in detections], np.float64).reshape(-1, 5)
    with np.errstate(over="ignore"):
        short = exact.astype(np.float32)
    if not np.array_equal(short.astype(np.float64), exact, equal_nan=True):
        return list(detections)
    return [
        replace(detection, box=(x0, y0, x1, y1), score=score)
        for detection, (x0, y0, x1, y1, score) in zip(detections, short, strict=True)
    ]


def _include_failures(
    clause: Mapping[str, Any],
    found: list[Detection],
    groups: Sequence[list[Detection] | None],
    colors: Colors,
    options: Options,
) -> list[str]:
    """Reasons why one include clause fails (none: it holds). `found` holds at most `count` objects of its class."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return [f"expected {name}>={count}, found {len(found)}"]
    if "color" in clause:
        seen = list(colors(name, found))
        wanted, num_right = clause["color"], seen.count(clause["color"])
        if num_right < count:
            present = ", ".join(f"{seen.count(color)} {color}" for color in COLORS if color in seen)
            return [f"expected {wanted} {name}>={count}, found {num_right} {wanted}; and {present}"]
    if "position" in clause:
        return _position_failures(name, clause["position"], found, groups, options)
    return []


def _position_failures(
    name: str,
    position: Sequence[Any],
    found: list[Detection],
    groups: Sequence[list[Detection] | None],
    options: Options,
) -> list[str]:
    """The first pair (found, reference) without the wanted relation, as a reason. A negative clause number counts back."""
    wanted, target_index = position
    if not -len(groups) <= target_index < len(groups):
        raise ValueError(_no_reference(name, target_index, len(groups)))
    references = groups[target_index]
    if references is None:
        return [f"no target for {name} to be {wanted}"]
    for detection in found:
        for reference in references:
            relations = relative_position(detection.box, reference.box, options.position_threshold)
            if wanted not in relations:
                return [f"expected {name} {wanted} target, found {' and '.join(sorted(relations))} target"]
    return []


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raises `ValueError`, naming what is wrong, for metadata that is not in GenEval's form."""
    if not isinstance(metadata.get("tag"), str):
        raise ValueError(f"metadata {dict(metadata)} has no 'tag'; give GenEval's form")
    for part in ("include", "exclude"):
        for clause in metadata.get(part, []):
            missing = {"class", "count"} - set(clause)
            if missing:
                raise ValueError(f"{part} clause {dict(clause)} has no {sorted(missing)}; name a class and a count")


def check_positions(metadata: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a position clause whose reference does not come before it, as a verdict may."""
    for number, clause in enumerate(metadata.get("include", [])):
        if "position" in clause and not -number <= clause["position"][1] < number:
            raise ValueError(_no_reference(clause["class"], clause["position"][1], number))


def _no_reference(name: str, target: int, number: int) -> str:
    return (
        f"position of {name} refers to clause {target}, but only {number} clauses come before it; put the reference object first"
    )


def _check_boxes(detections: Sequence[Detection], image_size: tuple[int, int]) -> None:
    width, height = image_size
    for detection in detections:
        x0, y0, x1, y1 = detection.box
        if not (-1 <= x0 <= x1 <= width + 1 and -1 <= y0 <= y1 <= height + 1):
            raise ValueError(
                f"box {detection.box} of {detection.class_name} lies outside the {width}x{height} picture; "
                "give (x0, y0, x1, y1) in pixels of that picture"
            )
