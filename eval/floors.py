"""What numbers mean: baselines that know nothing, and how far the grader itself can be trusted.

A score without its floor misleads: right shapes at random places hold a given relation more often than one time in four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from eval.geneval.verdict import Detection as Judged
from eval.grader import as_judged, detect
from eval.mme.grading import Record, score_subtask
from eval.profile_grader import detect_by_profile
from eval.small_tasks import judge_caption, judge_content, judge_edit, oracle, pixels
from orthus.data.world.benchmark import GENEVAL_COUNTS, EditItem, MmeItem, StoryItem, ground_truth_scene
from orthus.data.world.dataset import WorldDataset
from orthus.data.world.render import picture
from orthus.data.world.scene import COLORS, GRID, Scene, WorldConfig

Item = Mapping[str, Any]
RoundTrip = Callable[[Sequence[Image.Image]], list[Image.Image]]


def _random_places(scene: Scene, rng: Generator) -> Scene:
    """The same objects in random different cells of the grid."""
    side = scene.image_size / GRID
    cells = rng.permutation(GRID * GRID)[: len(scene.objects)]
    moved = [
        replace(item, x=(int(cell) % GRID + 0.5) * side, y=(int(cell) // GRID + 0.5) * side)
        for item, cell in zip(scene.objects, cells, strict=True)
    ]
    return replace(scene, objects=tuple(moved))


def _random_colors(scene: Scene, rng: Generator) -> Scene:
    return replace(scene, objects=tuple(replace(item, color=str(rng.choice(COLORS))) for item in scene.objects))


def _swapped_colors(scene: Scene, rng: Generator) -> Scene:
    """Colours handed on by one object (one object alone gets another colour)."""
    colors = [item.color for item in scene.objects]
    if len(set(colors)) == 1:
        colors = [str(rng.choice([color for color in COLORS if color != colors[0]]))] * len(colors)
    else:
        colors = colors[1:] + colors[:1]
    return replace(scene, objects=tuple(replace(item, color=color) for item, color in zip(scene.objects, colors, strict=True)))


def _random_count(scene: Scene, rng: Generator) -> Scene:
    """As many objects as drawn from the benchmark's counts, of the classes of the scene in turn."""
    count = int(rng.choice(GENEVAL_COUNTS))
    objects = [scene.objects[i % len(scene.objects)] for i in range(count)]
    return _random_places(replace(scene, objects=tuple(objects)), rng)


def geneval_floors(items: Sequence[Item], seed: int = 0, config: WorldConfig | None = None) -> dict[str, dict[str, float]]:
    """Share of correct verdicts per task, of pictures that ignore one part of the prompt, judged on exact boxes.

    "unrelated": right for another prompt of the same task.
    """
    rng = np.random.default_rng([seed, 1])
    scenes = [ground_truth_scene(item, rng, config) for item in items]
    changes: dict[str, Callable[[Scene, Generator], Scene]] = {
        "random_placement": _random_places,
        "random_colors": _random_colors,
        "colors_swapped": _swapped_colors,
        "random_count": _random_count,
    }
    floors = {
        name: _per_tag(items, [judge_caption(oracle(change(scene, rng)), item).correct for scene, item in _both(scenes, items)])
        for name, change in changes.items()
    }
    shuffled = _within_tags(items, rng)
    floors["unrelated"] = _per_tag(
        items, [judge_caption(oracle(scenes[other]), item).correct for other, item in zip(shuffled, items, strict=True)]
    )
    floors["ground_truth"] = _per_tag(items, [judge_caption(oracle(scene), item).correct for scene, item in _both(scenes, items)])
    return floors


def _both(scenes: Sequence[Scene], items: Sequence[Item]) -> list[tuple[Scene, Item]]:
    return list(zip(scenes, items, strict=True))


def _within_tags(items: Sequence[Item], rng: Generator) -> list[int]:
    """For each item the number of another, random item of its task with another prompt (itself if there is none)."""
    chosen = []
    for number, item in enumerate(items):
        others = [n for n, other in enumerate(items) if other["tag"] == item["tag"] and other["prompt"] != item["prompt"]]
        chosen.append(int(rng.choice(others)) if others else number)
    return chosen


def _per_tag(items: Sequence[Item], verdicts: Sequence[bool]) -> dict[str, float]:
    by_tag: dict[str, list[bool]] = {}
    for item, is_correct in zip(items, verdicts, strict=True):
        by_tag.setdefault(item["tag"], []).append(is_correct)
    scores = {tag: sum(values) / len(values) for tag, values in by_tag.items()}
    return {"overall": sum(scores.values()) / len(scores), **scores}


def majority_answers(num_examples: int = 2000) -> dict[str, str]:
    """Most frequent answer to each yes/no question string of the training questions (ties: no)."""
    counts: dict[str, int] = {}
    dataset = WorldDataset("train", tasks={"vqa": 1.0})
    for index in range(num_examples):
        turns = dataset.draft(index).turns
        for (_, asked), (_, said) in zip(turns[::2], turns[1::2], strict=True):
            question, answer = asked[-1], said[0]
            if isinstance(question, str) and isinstance(answer, str) and answer.lower().strip(".") in ("yes", "no"):
                counts[question] = counts.get(question, 0) + (1 if answer.lower().startswith("yes") else -1)
    return {question: "yes" if count > 0 else "no" for question, count in counts.items()}


def mme_floors(items: Sequence[MmeItem], majority: Mapping[str, str], seed: int = 0) -> dict[str, dict[str, float]]:
    """acc, acc+ and the 0-800 score of answers that never look: always yes, a coin, the training majority per string."""
    rng = np.random.default_rng([seed, 2])
    rules: dict[str, Callable[[str], str]] = {
        "always_yes": lambda question: "yes",
        "coin": lambda question: str(rng.choice(("yes", "no"))),
        "text_only_majority": lambda question: majority.get(question, "no"),
    }
    return {name: _mme_rule(items, rule) for name, rule in rules.items()}


def _mme_rule(items: Sequence[MmeItem], rule: Callable[[str], str]) -> dict[str, float]:
    by_subtask: dict[str, list[Record]] = {}
    for item in items:
        for question, truth in item.questions:
            by_subtask.setdefault(item.subtask, []).append(Record(item.image_id, question, truth, rule(question)))
    scores = [score_subtask(records) for records in by_subtask.values()]
    return {
        "acc": sum(s.acc for s in scores) / len(scores),
        "acc_plus": sum(s.acc_plus for s in scores) / len(scores),
        "score": sum(s.score for s in scores),
    }


def edit_floor(items: Sequence[EditItem]) -> list[bool]:
    """Verdicts of handing the picture back unchanged."""
    return [judge_edit(item, picture(item.edit.before))["correct"] for item in items]


def story_floor(items: Sequence[StoryItem]) -> list[list[bool]]:
    """Per-picture verdicts of repeating the picture before, the user's or the story's (a blank one if there is none)."""
    verdicts = []
    for item in items:
        scenes = item.story.pictures
        blank = Scene((), scenes[0].background, scenes[0].image_size)
        before = [item.story.first or blank, *scenes[:-1]]
        verdicts.append(
            [
                judge_content(clauses, detect(pixels(picture(scene))), scene.image_size)
                for clauses, scene in zip(item.expected, before, strict=True)
            ]
        )
    return verdicts


def validate_grader(
    items: Sequence[Item], round_trip: RoundTrip | None = None, seed: int = 0, config: WorldConfig | None = None
) -> dict[str, dict[str, float]]:
    """How the grader's verdicts agree with exact ones, per task, on true pictures after `round_trip`.

    Each picture is judged against its own prompt (true) and another prompt of its task (mostly false). `agreement` counts
    equal verdicts of both; `true_positive` and `false_positive` are rates given the exact verdict; `scenes_exact` is the
    share of pictures of which every object was found with class and colour and nothing else; `disagreement` is how often
    the second grader's verdict differs from the first's.
    """
    rng = np.random.default_rng([seed, 3])
    scenes = [ground_truth_scene(item, rng, config) for item in items]
    images = [picture(scene) for scene in scenes]
    images = round_trip(images) if round_trip else images
    seen = [as_judged(detect(pixels(image))) for image in images]
    second = [as_judged(detect_by_profile(pixels(image))) for image in images]
    others = _within_tags(items, rng)
    rows: dict[str, list[tuple[bool, bool, bool, bool]]] = {}
    for number, item in enumerate(items):
        is_exact = _contents(seen[number]) == _contents(oracle(scenes[number]))
        for asked in (item, items[others[number]]):
            verdicts = [judge_caption(found[number], asked).correct for found in (seen, second)]
            truth = judge_caption(oracle(scenes[number]), asked).correct
            rows.setdefault(item["tag"], []).append((truth, verdicts[0], verdicts[1], is_exact))
    return {tag: _agreement(np.array(values)) for tag, values in rows.items()}


def _contents(detections: Sequence[Judged]) -> list[tuple[str, str | None]]:
    return sorted((d.class_name, d.color or "") for d in detections)


def _agreement(rows: np.ndarray) -> dict[str, float]:
    truth, first, second, is_exact = rows.T
    return {
        "agreement": float((truth == first).mean()),
        "true_positive": float(first[truth].mean()) if truth.any() else float("nan"),
        "false_positive": float(first[~truth].mean()) if (~truth).any() else float("nan"),
        "scenes_exact": float(is_exact.mean()),
        "disagreement": float((first != second).mean()),
        "n": len(rows),
    }
