"""An answered MME run for people: scores with intervals and floors, samples; and two runs side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from eval.comparison import differences, table
from eval.mme.files import AnswerFiles, read_answer_files
from eval.mme.generate import ANSWERS
from eval.mme.grading import PARSERS, Pair, grade_pairs, image_scores, read_truth
from eval.mme.items import Item
from eval.mme.results import GROUPS, result_of
from eval.page import Sample, Table, first_of_each, page
from eval.provenance import read_provenance
from eval.statistics import Task, interval_text
from eval.whole_files import write_bytes, write_json, write_text


def read_run(folder: Path) -> tuple[dict[str, Any], AnswerFiles]:
    """Manifest and answers of a run. Raises ValueError where not all questions of its manifest are answered."""
    files = read_answer_files(folder / ANSWERS)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    num_answers = sum(2 * len(pairs) for pairs in files.pairs.values())
    if num_answers != manifest["num_questions"]:
        raise ValueError(
            f"{folder / ANSWERS} holds {num_answers} answers to {manifest['num_questions']} questions; generate again"
        )
    return manifest, files


def write_report(folder: Path, items: Sequence[Item], parser: str, command: str, per_kind: int = 24) -> Path:
    """`report.json` and `report.html` of a run on `items`; returns the page."""
    manifest, files = read_run(folder)
    result = result_of(files.pairs, parser) | {
        "warnings": files.warnings,
        "manifest": manifest,
        "provenance": read_provenance(folder),
    }
    write_json(folder / "report.json", result)
    samples = first_of_each(_samples(files.pairs, parser), per_kind)
    shown = _with_pictures(samples, items, folder / "shown")
    target = folder / "report.html"
    write_text(target, page(f"MME: {folder.name}", command, tables(result), [], shown))
    return target


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Score, acc and acc+ of each subtask, totals with floors."""
    rows = [["subtask", "score of 200 [95 %, over pictures]", "acc", "acc+", "neither yes nor no", "questions"]]
    for name, score in result["subtasks"].items():
        shares = [f"{result[key][name]:.3f}" for key in ("acc", "acc_plus", "other_by_subtask")]
        cell = interval_text(result["intervals"][name] | {"value": score})
        rows.append([name.replace("_", " "), cell, *shares, str(result["num_questions"][name])])
    totals = [["", "total [95 %]", *(name.replace("_", " ") for name in result["floors"])]]
    for group in GROUPS:
        if group in result["intervals"]:
            floors = [f"{floor[group]:g}" for floor in result["floors"].values()]
            totals.append([group, interval_text(result["intervals"][group]), *floors])
    manifest = result["manifest"]
    note = f"parser {result['parser']}, prompt style {manifest['style']}" + (", blank pictures" if manifest["blank"] else "")
    note += "; not all questions of the published benchmark" if result["partial"] else ""
    return [Table("Scores", rows, note), Table("Totals", totals)]


def tasks_of(pairs: Mapping[str, Sequence[Pair]], parser: str) -> dict[str, Task]:
    """MME scores of each picture (0, 50 or 200), by subtask."""
    return {
        name: Task(image_scores(grade_pairs(group, parser)), [first.image_id for first, _ in group])
        for name, group in pairs.items()
    }


def compare(first: Path, second: Path, parser: str, command: str, target: Path) -> dict[str, Any]:
    """Two runs on the same questions: differences with paired intervals, as a page and beside it as JSON.

    Raises ValueError for runs of other questions, or asked in another way.
    """
    (manifest, files), (other_manifest, other_files) = read_run(first), read_run(second)
    for name in ("questions_sha256", "style"):
        values = [found[name] for found in (manifest, other_manifest)]
        if values[0] != values[1]:
            raise ValueError(
                f"{name} is {manifest[name]} in {first} and {other_manifest[name]} in {second}; only the model may differ"
            )
    tasks = tasks_of(files.pairs, parser), tasks_of(other_files.pairs, parser)
    found = differences(*tasks)
    write_text(target, page("MME: two runs", command, [table((first.name, second.name), *tasks, unit="pictures")], [], []))
    write_json(target.with_suffix(".json"), found)
    return found


def _samples(pairs: Mapping[str, Sequence[Pair]], parser: str) -> list[Sample]:
    """A sample for each question; its only part is still the name of its picture."""
    read = PARSERS[parser]
    return [
        Sample(
            subtask,
            record.question,
            "right" if read(record.answer) == read_truth(record.ground_truth) else "wrong",
            (f"{subtask}/{record.image_id}", f"answer: {record.answer}"),
            "" if read(record.answer) == read_truth(record.ground_truth) else f"truth: {record.ground_truth}",
            f"said {read(record.answer)}",
        )
        for subtask, group in pairs.items()
        for pair in group
        for record in pair
    ]


def _with_pictures(samples: Sequence[Sample], items: Sequence[Item], folder: Path) -> list[Sample]:
    """The samples with their pictures, which are kept in `folder`."""
    by_key = {item.picture_key: item for item in items}
    shown = []
    for sample in samples:
        key, *words = sample.parts
        path = folder / f"{key}.png"
        if not path.exists():
            buffer = BytesIO()
            by_key[str(key)].picture().save(buffer, format="PNG")
            write_bytes(path, buffer.getvalue())
        shown.append(replace(sample, parts=(path, *words)))
    return shown
