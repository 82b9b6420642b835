"""An answered MME run for people: scores with intervals and floors, samples; and two runs side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.comparison import differences, table
from eval.mme.files import AnswerFiles, read_answer_files
from eval.mme.generate import ANSWERS, SMALL_WORLD, Settings, items_of, questions_hash
from eval.mme.grading import PARSERS, Pair, grade_pairs, image_scores, read_truth
from eval.mme.items import Item, twin_of
from eval.mme.results import GROUPS, result_of
from eval.page import Sample, Table, first_of_each, page
from eval.provenance import read_provenance, source_lines
from eval.statistics import Task, interval_text, paired_bootstrap
from eval.whole_files import write_json, write_picture, write_text
from orthus.training.settings import differences as settings_differences


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


def benchmark_of(manifest: Mapping[str, Any]) -> str:
    return "SmallMME (the small world's own)" if manifest["data"] == SMALL_WORLD else f"MME, {manifest['data']}"


def write_report(settings: Settings, command: str, per_kind: int = 24) -> Path:
    """`report.json` and `report.html` of a run; returns the page. Raises ValueError for settings that ask other questions."""
    folder, items = Path(settings.output), items_of(settings)
    manifest, files = read_run(folder)
    if manifest["questions_sha256"] != questions_hash(items, settings.style):
        raise ValueError(f"{folder} answers other questions than these settings ask; give the settings of its generate")
    result: dict[str, Any] = {"benchmark": benchmark_of(manifest)}
    result |= result_of(files.pairs, settings.parser, cluster_of(manifest)) | {"warnings": files.warnings, "manifest": manifest}
    result["provenance"] = read_provenance(folder)
    write_json(folder / "report.json", result)
    samples = _samples(files.pairs, settings.parser)
    shown = _with_pictures(first_of_each(samples, per_kind), items, folder / "shown")
    source = [command, *source_lines(result["provenance"])]
    target = folder / "report.html"
    write_text(target, page(f"{result['benchmark']}: {folder.name}", source, tables(result), [], shown, len(samples)))
    return target


def cluster_of(manifest: Mapping[str, Any]) -> Callable[[str], str]:
    """From a picture's name to what was drawn independently: small-world pictures come in twins that share their questions."""
    return twin_of if manifest["data"] == SMALL_WORLD else str


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
    return [Table(f"Scores of {result['benchmark']}", rows, note), Table("Totals", totals)]


def tasks_of(pairs: Mapping[str, Sequence[Pair]], parser: str, cluster: Callable[[str], str]) -> dict[str, Task]:
    """MME scores of each picture (0, 50 or 200), by subtask."""
    return {
        name: Task(image_scores(grade_pairs(group, parser)), [cluster(first.image_id) for first, _ in group], maximum=200.0)
        for name, group in pairs.items()
    }


def compare(first: Path, second: Path, parser: str, command: str, target: Path) -> dict[str, Any]:
    """Two runs on the same questions: differences with paired intervals, as a page and beside it as JSON.

    Raises ValueError for runs of other questions.
    """
    (manifest, files), (other_manifest, other_files) = read_run(first), read_run(second)
    if manifest["questions_sha256"] != other_manifest["questions_sha256"]:
        raise ValueError(
            f"{first} and {second} answer other questions, or other prompts of them; compare runs that were asked alike"
        )
    cluster = cluster_of(manifest)
    tasks = tasks_of(files.pairs, parser, cluster), tasks_of(other_files.pairs, parser, cluster)
    shown = [table((first.name, second.name), *tasks, unit="pictures")]
    found: dict[str, Any] = {"parser": parser, "difference": differences(*tasks)}
    for group, members in GROUPS.items():
        sides = [{name: task for name, task in side.items() if name in members} for side in tasks]
        if sides[0]:
            total = paired_bootstrap(sides[0], sides[1])
            found["difference"][group] = {**total.interval.scaled(len(sides[0])).as_dict(), "p": total.p_value}
            shown[0].rows.append([group, "", "", interval_text(found["difference"][group]), f"{total.p_value:.4f}", ""])
    changed = settings_differences(manifest, other_manifest)
    shown.append(Table("What differs between the runs", [["setting"], *([line] for line in changed)]))
    found |= {
        name: {"folder": str(path), "provenance": read_provenance(path)} for name, path in (("first", first), ("second", second))
    }
    title = f"{benchmark_of(manifest)}: {first.name} and {second.name}"
    write_text(target, page(title, [command], shown, [], []))
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
            write_picture(path, by_key[str(key)].picture())
        shown.append(replace(sample, parts=(path, *words)))
    return shown
