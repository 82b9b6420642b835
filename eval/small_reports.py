"""From answers to the results of the small world: each task's scores with intervals, and the grades of every answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import floors
from eval.answers import Answer
from eval.geneval import TAGS, Protocol, summarise
from eval.mme import Record, grade, image_scores, score_subtask
from eval.profile_grader import detect_by_profile
from eval.small_tasks import grade_geneval, judge_edit, judge_story
from eval.statistics import Task, bootstrap
from orthus.data.world.benchmark import EditItem, MmeItem, StoryItem
from orthus.data.world.language import final_answer


def report_geneval(
    items: Sequence[Mapping[str, Any]], answers: Mapping[str, Answer], folder: Path, task: str = "geneval"
) -> dict[str, Any]:
    """Score per task and overall with intervals over prompts; grades go to `grades-<task>.jsonl`."""
    records = grade_geneval(items, answers, detect_by_profile, task)
    write_lines(folder / f"grades-{task}.jsonl", records)
    tasks = {
        tag: Task(
            [float(r["correct"]) for r in records if r["tag"] == tag],
            [r["prompt"] for r in records if r["tag"] == tag],
        )
        for tag in TAGS
    }
    num_prompts = {tag: len(set(task.clusters or ())) for tag, task in tasks.items()}
    summarise(records, Protocol(num_prompts, 1), allow_partial=True)
    result: dict[str, Any] = {"overall": bootstrap(tasks).as_dict()}
    result |= {tag: {**bootstrap(task).as_dict(), "num_prompts": num_prompts[tag]} for tag, task in tasks.items()}
    result["second_grader_disagreement"] = _mean([r["correct"] != r["second_correct"] for r in records])
    result["pictures_with_unknown_objects"] = _mean([r["num_unknown"] > 0 for r in records])
    return result


def report_mme(items: Sequence[MmeItem], answers: Mapping[str, Answer], parser: str) -> dict[str, Any]:
    """Accuracy, acc+ and MME score per subtask and overall; intervals over twins of pictures."""
    by_subtask: dict[str, list[MmeItem]] = {}
    for item in items:
        by_subtask.setdefault(item.subtask, []).append(item)
    acc, plus, score, result = {}, {}, {}, {}
    for subtask, group in by_subtask.items():
        records = mme_records(group, answers)
        graded = grade(records, parser)
        twins = [image_id[:-1] for image_id in graded]
        acc[subtask] = Task([sum(pair) / 2 for pair in graded.values()], twins)
        plus[subtask] = Task([float(all(pair)) for pair in graded.values()], twins)
        score[subtask] = Task(image_scores(graded), twins)
        whole = score_subtask(records, parser)
        seen = {
            f"{name}_accuracy": _mean([right for i in group if i.held_out == flag for right in graded[i.image_id]])
            for name, flag in (("held_out", True), ("seen", False))
        }
        result[subtask] = {
            **bootstrap(acc[subtask]).as_dict(),
            "acc_plus": bootstrap(plus[subtask]).as_dict(),
            "score": bootstrap(score[subtask]).as_dict(),
            "other_rate": whole.other_rate,
            **seen,
        }
    total = bootstrap(score).scaled(len(score)).as_dict()
    overall = {"overall": bootstrap(acc).as_dict(), "acc_plus": bootstrap(plus).as_dict(), "score": total}
    return {**overall, **result, "parser": parser}


def mme_records(items: Sequence[MmeItem], answers: Mapping[str, Answer]) -> list[Record]:
    """What is graded: the answer, without the description that the model may give before it."""
    return [
        Record(item.image_id, question, truth, final_answer(answers[f"{item.image_id}/{number}"].text))
        for item in items
        for number, (question, truth) in enumerate(item.questions)
    ]


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


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0
