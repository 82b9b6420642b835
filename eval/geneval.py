"""GenEval's verdict (arXiv 2310.11513) in pure Python: filter detections, judge a picture, summarise a run.

Nothing here needs a detector, a colour classifier or torch: detections come in as boxes with scores, colours as names.
The rules and the reason strings are those of the published scorer. One thing differs on purpose: relation names in a
reason are sorted, where upstream joins a set whose order changes with the hash seed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One detected object: `box` is (x0, y0, x1, y1) in pixels, x1 and y1 exclusive; `color` is a name where known."""

    class_name: str
    score: float
    box: Box
    color: str | None = None


Colors = Callable[[str, Sequence[Detection]], Sequence[str | None]]
"""What names the colours of detections of one class, in order: `colors(class_name, detections)`."""


@dataclass(frozen=True)
class Options:
    """The scorer's `--options`; the defaults are the published ones (`max_overlap` 1.0 means no suppression)."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1


@dataclass(frozen=True)
class Verdict:
    """`reason` has one line per failed clause; `details` is class -> [[x0, y0, x1, y1, score], ...], as upstream."""

    correct: bool
    reason: str
    details: dict[str, list[list[float]]]


@dataclass(frozen=True)
class Protocol:
    """What a complete run holds: `prompts_per_tag` and `images_per_prompt`."""

    prompts_per_tag: Mapping[str, int]
    images_per_prompt: int


OFFICIAL = Protocol(dict(zip(TAGS, (80, 99, 80, 94, 100, 100), strict=True)), images_per_prompt=4)


def relative_position(box: Box, reference: Box, position_threshold: float = 0.1) -> set[str]:
    """Relations that hold from `box` to `reference`; empty when the boxes overlap too much to say.

    Each axis of the centre offset shrinks by `position_threshold` times the summed sides, and is then divided by the
    norm of the offset *before* shrinking; a relation needs strictly more than 0.5 of it.
    """
    offset = [(box[i] + box[i + 2] - reference[i] - reference[i + 2]) / 2 for i in (0, 1)]
    sides = [abs(box[i + 2] - box[i]) + abs(reference[i + 2] - reference[i]) for i in (0, 1)]
    shrunk = [math.copysign(max(abs(o) - position_threshold * s, 0.0), o) for o, s in zip(offset, sides, strict=True)]
    if all(abs(value) < 1e-3 for value in shrunk):
        return set()
    dx, dy = (value / math.hypot(*offset) for value in shrunk)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, is_true in holds.items() if is_true}


def intersection_over_union(a: Box, b: Box) -> float:
    """IoU of two boxes as the scorer computes it: a box that ends at x1 counts the column x1 too."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0.0) * max(y1 - y0 + 1, 0.0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def filter_detections(detections: Sequence[Detection], tag: str, options: Options = Options()) -> dict[str, list[Detection]]:
    """Detections kept per class, most confident first: score above the tag's threshold, then the best `max_objects`."""
    threshold = options.counting_threshold if tag == "counting" else options.threshold
    by_class: dict[str, list[Detection]] = {}
    for detection in detections:
        if detection.score > threshold:
            by_class.setdefault(detection.class_name, []).append(detection)
    return {name: _best(found, options) for name, found in by_class.items()}


def _best(found: Sequence[Detection], options: Options) -> list[Detection]:
    """The `max_objects` of highest score, without those that overlap a better one by `max_overlap` (1.0: keep all)."""
    ordered = sorted(found, key=lambda detection: -detection.score)[: options.max_objects]
    if options.max_overlap == 1.0:
        return ordered
    kept: list[Detection] = []
    for candidate in ordered:
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
    in another scale would silently change every relation.
    """
    if image_size is not None:
        _check_boxes(detections, image_size)
    objects = filter_detections(detections, metadata["tag"], options)
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
    details = {name: [[*found.box, found.score] for found in group] for name, group in objects.items()}
    return Verdict(not reasons, "\n".join(reasons), details)


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
        tally = Counter(colors(name, found))
        if tally[clause["color"]] < count:
            present = ", ".join(f"{tally[color]} {color}" for color in COLORS if color in tally)
            wanted = f"expected {clause['color']} {name}>={count}"
            return [f"{wanted}, found {tally[clause['color']]} {clause['color']}; and {present}"]
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
    """The first pair (found, reference) without the wanted relation, as a reason."""
    wanted, target_index = position
    if not 0 <= target_index < len(groups):
        raise ValueError(
            f"position of {name} refers to clause {target_index}, but only {len(groups)} clauses come before it; "
            "put the reference object first"
        )
    references = groups[target_index]
    if references is None:
        return [f"no target for {name} to be {wanted}"]
    for detection in found:
        for reference in references:
            relations = relative_position(detection.box, reference.box, options.position_threshold)
            if wanted not in relations:
                return [f"expected {name} {wanted} target, found {' and '.join(sorted(relations))} target"]
    return []


def _check_boxes(detections: Sequence[Detection], image_size: tuple[int, int]) -> None:
    width, height = image_size
    for detection in detections:
        x0, y0, x1, y1 = detection.box
        if not (-1 <= x0 <= x1 <= width + 1 and -1 <= y0 <= y1 <= height + 1):
            raise ValueError(
                f"box {detection.box} of {detection.class_name} lies outside the {width}x{height} picture; "
                "give (x0, y0, x1, y1) in pixels of that picture"
            )


@dataclass
class _Tally:
    num_images: int = 0
    num_correct: int = 0
    prompts: dict[Hashable, list[bool]] = field(default_factory=dict)


def summarise(results: Sequence[Mapping[str, Any]], protocol: Protocol = OFFICIAL, allow_partial: bool = False) -> dict[str, Any]:
    """Scores of a run from its results ("tag", "correct" and "metadata", a JSON string or anything hashable, each).

    "overall" is the unweighted mean of the task scores, the number that papers quote. A run that lacks prompts,
    pictures or tags of `protocol` raises `ValueError`; with `allow_partial` its mean is called "overall_partial" and
    what is missing is listed, since the mean over a part of the prompts is another benchmark.
    """
    tallies: dict[str, _Tally] = {}
    for result in results:
        tally = tallies.setdefault(result["tag"], _Tally())
        tally.num_images += 1
        tally.num_correct += bool(result["correct"])
        tally.prompts.setdefault(result["metadata"], []).append(bool(result["correct"]))
    missing = _missing(tallies, protocol)
    if missing and not allow_partial:
        raise ValueError(f"no overall score for a partial run ({'; '.join(missing)}); finish it or allow a partial one")
    tasks = {tag: tally.num_correct / tally.num_images for tag, tally in tallies.items()}
    prompts = [any(verdicts) for tally in tallies.values() for verdicts in tally.prompts.values()]
    num_images = sum(tally.num_images for tally in tallies.values())
    num_correct = sum(tally.num_correct for tally in tallies.values())
    overall = sum(tasks.values()) / len(tasks) if tasks else 0.0
    return {
        "overall_partial" if missing else "overall": overall,
        "tasks": tasks,
        "num_images": num_images,
        "num_prompts": len(prompts),
        "image_accuracy": num_correct / num_images if num_images else 0.0,
        "prompt_accuracy": sum(prompts) / len(prompts) if prompts else 0.0,
        "missing": missing,
    }


def _missing(tallies: Mapping[str, _Tally], protocol: Protocol) -> list[str]:
    """What a run has too little or too much of, in words."""
    problems = [f"unknown tag {tag!r}" for tag in tallies if tag not in protocol.prompts_per_tag]
    for tag, num_prompts in protocol.prompts_per_tag.items():
        prompts = tallies[tag].prompts if tag in tallies else {}
        if len(prompts) != num_prompts:
            problems.append(f"{tag}: {len(prompts)} of {num_prompts} prompts")
        uneven = sum(len(verdicts) != protocol.images_per_prompt for verdicts in prompts.values())
        if uneven:
            problems.append(f"{tag}: {uneven} prompts without exactly {protocol.images_per_prompt} pictures")
    return problems
