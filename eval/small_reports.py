"""From answers to the results of the small world: each task's scores with intervals, and the grades of every answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import floors
from eval.answers import Answer
from eval.geneval.folders import read_folder
from eval.geneval.grading import RESULTS, grade_folder, read_detections
from eval.geneval.records import read_results
from eval.geneval.summary import intervals
from eval.geneval.world import second_grader, world_grader
from eval.grader import UNKNOWN
from eval.mme.grading import grade_pairs, image_scores, score_pairs
from eval.mme.items import twin_of
from eval.mme.report import read_run
from eval.small_tasks import judge_edit, judge_story
from eval.statistics import Task, bootstrap
from eval.whole_files import write_lines
from orthus.data.world.benchmark import EditItem, MmeItem, StoryItem

SECOND = "second"


def grade_captions(folder: Path) -> None:
    """Grade a folder of `eval.geneval` with the small world's grader, and into `folder/second` with the second one. Every
    process takes its share."""
    pictures = read_folder(folder)
    grade_folder(pictures, world_grader(), folder)
    grade_folder(pictures, second_grader(), folder / SECOND)


def report_geneval(folder: Path) -> dict[str, Any]:
    """Score per task and overall of a graded folder, with intervals over prompts."""
    results, second = read_results(folder / RESULTS), read_results(folder / SECOND / RESULTS)
    found = intervals(results)
    prompts = {tag: len({r["metadata"] for r in results if r["tag"] == tag}) for tag in found}
    result: dict[str, Any] = {"overall": found.pop("overall").as_dict()}
    result |= {tag: {**interval.as_dict(), "num_prompts": prompts[tag]} for tag, interval in found.items()}
    result["second_grader_disagreement"] = _mean([a["correct"] != b["correct"] for a, b in zip(results, second, strict=True)])
    result["pictures_with_unknown_objects"] = _mean([UNKNOWN in d["detections"] for d in read_detections(folder).values()])
    return result


def report_mme(items: Sequence[MmeItem], folder: Path, parser: str) -> dict[str, Any]:
    """Accuracy, acc+ and MME score per subtask and overall of a run of `eval.mme`; intervals over twins of pictures."""
    held_out = {f"{item.image_id}.png": item.held_out for item in items}
    acc, plus, score, result = {}, {}, {}, {}
    for subtask, pairs in read_run(folder)[1].pairs.items():
        graded = grade_pairs(pairs, parser)
        names = [first.image_id for first, _ in pairs]
        twins = [twin_of(name) for name in names]
        acc[subtask] = Task([sum(pair) / 2 for pair in graded], twins)
        plus[subtask] = Task([float(all(pair)) for pair in graded], twins)
        score[subtask] = Task(image_scores(graded), twins, maximum=200.0)
        sides: dict[bool, list[bool]] = {True: [], False: []}
        for name, pair in zip(names, graded, strict=True):
            sides[held_out[f"{subtask}/{name}"]] += pair
        result[subtask] = {
            **bootstrap(acc[subtask]).as_dict(),
            "acc_plus": bootstrap(plus[subtask]).as_dict(),
            "score": bootstrap(score[subtask]).as_dict(),
            "other_rate": score_pairs(pairs, parser).other_rate,
            "held_out_accuracy": _mean(sides[True]),
            "seen_accuracy": _mean(sides[False]),
        }
    total = bootstrap(score).scaled(len(score)).as_dict()
    overall = {"overall": bootstrap(acc).as_dict(), "acc_plus": bootstrap(plus).as_dict(), "score": total}
    return {**overall, **result, "parser": parser}


def report_edits(items: Sequence[EditItem], answers: Mapping[str, Answer], folder: Path) -> dict[str, Any]:
    """Share of edits after which the picture holds exactly what it must, overall (kinds in equal parts) and by kind."""
    records = []
    for number, item in enumerate(items):
        key = f"{number:05d}"
        pictures = answers[key].pictures
        judged = judge_edit(item, pictures[0] if pictures else None)
        records.append({"key": key, "tag": item.edit.kind, "prompt": item.edit.instruction, **judged})
    write_lines(folder / "grades-edit.jsonl", records)
    kinds = {r["tag"]: Task([float(o["correct"]) for o in records if o["tag"] == r["tag"]]) for r in records}
    result: dict[str, Any] = {"overall": bootstrap(kinds).as_dict()}
    result |= {kind: bootstrap(task).as_dict() for kind, task in kinds.items()}
    result |= {name: bootstrap(Task([float(r[name]) for r in records])).as_dict() for name in ("kept", "changed")}
    result["do_nothing"] = bootstrap(Task([float(right) for right in floors.edit_floor(items)])).as_dict()
    return result


def report_stories(items: Sequence[StoryItem], answers: Mapping[str, Answer], folder: Path) -> dict[str, Any]:
    """Well-formed stories, right pictures (clustered by story), wholly right stories, and the repeating baseline."""
    records = []
    for number, item in enumerate(items):
        key = f"{number:05d}"
        judged = judge_story(item, answers[key])
        records.append({"key": key, "tag": item.story.kind, "prompt": item.story.prompt, **judged})
    write_lines(folder / "grades-story.jsonl", records)

    def pictures(verdicts: Sequence[Sequence[bool]]) -> Task:
        clusters = [number for number, story in enumerate(verdicts) for _ in story]
        return Task([float(right) for story in verdicts for right in story], clusters)

    result: dict[str, Any] = {
        name: bootstrap(Task([float(r[name]) for r in records])).as_dict() for name in ("well_formed", "all_right")
    }
    result["overall"] = bootstrap(pictures([r["pictures"] for r in records])).as_dict()
    for kind in sorted({r["tag"] for r in records}):
        result[kind] = bootstrap(pictures([r["pictures"] for r in records if r["tag"] == kind])).as_dict()
    result["do_nothing"] = bootstrap(pictures(floors.story_floor(items))).as_dict()
    return result


def report_descriptions(items: Sequence[tuple[Any, str]], answers: Mapping[str, Answer], folder: Path) -> dict[str, Any]:
    """Descriptions that name exactly what is there (overall), and the share of objects named with class, colour and place."""
    records: list[dict[str, Any]] = []
    for number, (_, truth) in enumerate(items):
        key = f"{number:05d}"
        wanted, said = Counter(truth.split(", ")), Counter(answers[key].text.split(", "))
        named = (wanted & said).total() / wanted.total()
        records.append({"key": key, "correct": wanted == said, "named": named, "answer": answers[key].text, "truth": truth})
    write_lines(folder / "grades-describe.jsonl", records)
    names = {"overall": "correct", "objects": "named"}
    return {row: bootstrap(Task([float(r[name]) for r in records])).as_dict() for row, name in names.items()}


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0
