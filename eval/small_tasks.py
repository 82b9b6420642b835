"""The four tasks of the small world: what is asked, and how an answer is judged. No model here.

`judge_*` functions take a picture or detections, so that generated pictures, ground truth and baselines go one way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from eval.answers import Answer, Request
from eval.geneval.verdict import Detection as Judged
from eval.geneval.verdict import Options, Verdict, detected_colors, verdict
from eval.grader import Detection, as_judged, detect
from orthus.data.world.benchmark import EditItem, StoryItem
from orthus.data.world.captions import DESCRIBE
from orthus.data.world.render import picture
from orthus.data.world.scene import Scene, SceneObject, cell_of, relations

Clause = Mapping[str, Any]
Detector = Callable[[npt.NDArray[np.uint8]], list[Detection]]
OPTIONS = Options(threshold=0.0, counting_threshold=0.0)
"""The grader rejects by itself what it is unsure of, so GenEval's score thresholds are open."""


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """A picture as uint8 `(H, W, 3)`."""
    return np.asarray(image.convert("RGB"))


def oracle(scene: Scene) -> list[Judged]:
    """The detections of a perfect grader."""
    boxes = [(o.x - o.size / 2, o.y - o.size / 2, o.x + o.size / 2, o.y + o.size / 2) for o in scene.objects]  # (x0, y0, x1, y1)
    return [Judged(o.shape, 1.0, box, o.color) for o, box in zip(scene.objects, boxes, strict=True)]


def judge_caption(detections: Sequence[Judged], item: Mapping[str, Any]) -> Verdict:
    """GenEval's verdict on a picture of the small world."""
    return verdict(detections, detected_colors, item, None, OPTIONS)


def shows(item: Mapping[str, Any], picture: Image.Image) -> bool:
    """Whether a picture shows what an item in GenEval's form asks for, to the small world's grader."""
    return judge_caption(as_judged(detect(pixels(picture))), item).correct


def describe_requests(scenes: Sequence[Scene]) -> list[Request]:
    return [Request(f"{number:05d}", (picture(scene), DESCRIBE)) for number, scene in enumerate(scenes)]


def edit_requests(items: Sequence[EditItem]) -> list[Request]:
    return [Request(f"{n:05d}", (picture(item.edit.before), item.edit.instruction)) for n, item in enumerate(items)]


def story_requests(items: Sequence[StoryItem]) -> list[Request]:
    requests = []
    for number, item in enumerate(items):
        story = item.story
        asked = (story.prompt,) if story.first is None else (picture(story.first), story.prompt)
        requests.append(Request(f"{number:05d}", asked))
    return requests


def as_object(detection: Detection) -> SceneObject:
    """A detection as a scene's object: centre and mean side of its box in pixels."""
    x0, y0, x1, y1 = detection.box
    return SceneObject(detection.shape, detection.color, (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0 + y1 - y0) / 2)


def _match(wanted: Sequence[Clause], found: Sequence[SceneObject], image_size: int) -> list[SceneObject] | None:
    """Distinct objects for all clauses (one of them each), or None; clauses with fewer open fields choose first."""
    if not wanted:
        return []
    clause, rest = wanted[0], wanted[1:]
    for index, item in enumerate(found):
        is_right = item.shape == clause["class"] and clause["color"] in (None, item.color)
        if is_right and clause["cell"] in (None, cell_of(item, image_size)):
            others = _match(rest, [*found[:index], *found[index + 1 :]], image_size)
            if others is not None:
                return [item, *others]
    return None


def match_clauses(clauses: Sequence[Clause], found: Sequence[SceneObject], image_size: int) -> list[SceneObject] | None:
    """Objects for the clauses in order, each object once (a count is that many clauses); None where one lacks."""
    singles = [dict(clause, count=1) for clause in clauses for _ in range(clause["count"])]
    order = sorted(range(len(singles)), key=lambda i: (singles[i]["cell"] is None, singles[i]["color"] is None))
    matched = _match([singles[i] for i in order], found, image_size)
    if matched is None:
        return None
    places = {place: item for place, item in zip(order, matched, strict=True)}
    return [places[i] for i in range(len(singles))]


def judge_content(clauses: Sequence[Clause], found: Sequence[Detection], image_size: int) -> bool:
    """Whether a picture holds exactly what the clauses say, and nothing else: no further or unknown object."""
    num_wanted = sum(clause["count"] for clause in clauses)
    if len(found) != num_wanted:
        return False
    return match_clauses(clauses, [as_object(detection) for detection in found], image_size) is not None


def judge_edit(item: EditItem, image: Image.Image | None) -> dict[str, Any]:
    """`correct`: all is as after the edit and nothing else is there. `kept`, `changed`: each half on its own."""
    if image is None:
        return {"correct": False, "kept": False, "changed": False}
    size = item.edit.before.image_size
    found = detect(pixels(image))
    objects = [as_object(detection) for detection in found]
    changed = match_clauses(item.changed, objects, size)
    is_changed = changed is not None and _gone_is_gone(item, objects, size)
    if changed is not None and item.edit.relation and item.edit.anchor is not None:
        is_changed = is_changed and any(
            item.edit.relation in relations(candidate, item.edit.anchor)
            for candidate in objects
            if candidate.shape == item.changed[0]["class"] and item.changed[0]["color"] in (None, candidate.color)
        )
    is_kept = match_clauses(item.kept, objects, size) is not None
    is_exact = judge_content([*item.kept, *item.changed], found, size)
    return {"correct": is_exact and is_kept and is_changed, "kept": is_kept, "changed": is_changed}


def _gone_is_gone(item: EditItem, objects: Sequence[SceneObject], image_size: int) -> bool:
    """Whether nothing remains where it was of what the edit took away, moved or changed."""
    before = {(o.shape, o.color, cell_of(o, image_size)) for o in item.edit.before.objects}
    after = {(o.shape, o.color, cell_of(o, image_size)) for o in item.edit.after.objects}
    return not any((o.shape, o.color, cell_of(o, image_size)) in before - after for o in objects)


def judge_story(item: StoryItem, answer: Answer) -> dict[str, Any]:
    """Form and content: `well_formed` = text and picture in turn, as many as asked, ended by itself; per-picture truth."""
    kinds = "".join("t" if isinstance(segment, str) else "p" for segment in answer.segments)
    num_expected = len(item.expected)
    well_formed = answer.has_ended and kinds in ("tp" * num_expected, "tp" * num_expected + "t")
    size = item.story.pictures[0].image_size
    pictures = answer.pictures[:num_expected]
    right = [judge_content(clauses, detect(pixels(image)), size) for clauses, image in zip(item.expected, pictures, strict=False)]
    right += [False] * (num_expected - len(right))
    return {"well_formed": well_formed, "pictures": right, "all_right": all(right), "form": kinds}
