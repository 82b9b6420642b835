"""A graded GenEval run for people: scores with intervals and floors, kinds of failure, samples; and two runs side by side."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.comparison import differences, table
from eval.geneval.folders import check_pictures, read_folder
from eval.geneval.grading import IDENTITY, PICTURES, RESULTS, read_detections
from eval.geneval.prompts import lines_sha256, official_lines
from eval.geneval.records import Record, read_results
from eval.geneval.summary import intervals, published_summary
from eval.page import Sample, Table, first_of_each, page
from eval.provenance import read_provenance, source_lines
from eval.statistics import Task, interval_text
from eval.whole_files import write_json, write_text
from orthus.training.settings import differences as settings_differences

REPORT = "report.json"
BUCKETS = {
    "missing": r"expected .*>=\d+, found 0$",
    "too few": r"expected .*>=\d+, found [1-9]\d*$",
    "wrong colour": r"expected .*>=\d+, found \d+ .*; and",
    "too many": r"expected .*<\d+, found",
    "wrong position": r"(expected .* target, found .*target|no target for )",
}
"""Kinds of failure by the line of a reason that they begin, the gravest first."""


def bucket_of(reason: str) -> str:
    """The gravest kind of failure that a reason names; "" for none."""
    lines = reason.splitlines()
    for name, pattern in BUCKETS.items():
        if any(re.match(pattern, line) for line in lines):
            return name
    return "other" if reason else ""


@dataclass(frozen=True)
class Graded:
    """Results of a graded run, the folder of its pictures, and what its manifests say together."""

    name: str
    pictures: Path
    results: list[Record]
    manifest: Mapping[str, Any]

    @property
    def is_official_set(self) -> bool:
        return self.manifest.get("prompts_sha256") == lines_sha256(official_lines())

    @property
    def benchmark(self) -> str:
        """What the numbers may be called: another prompt set, and another detector, is another benchmark."""
        grader = self.manifest.get("grader", "unknown grader")
        name = str(self.manifest.get("prompt_set", "unknown prompts"))
        if name.startswith("small"):
            return f"SmallGenEval, {name}"
        judged = "GenEval" if grader == "official" else f"GenEval[{grader}]"
        return judged if self.is_official_set else f"{judged} with other prompts ({name})"


def read_graded(output: Path) -> Graded:
    """Raises ValueError where the results are not those of exactly the pictures that are there."""
    results = read_results(output / RESULTS)
    grading = _json(output / IDENTITY)
    folder = output if (output / "00000").is_dir() else output / grading.get(PICTURES, "")
    pictures = read_folder(folder).pictures
    judged = Counter(key_of(result) for result in results)
    wanted = Counter(picture.key for picture in pictures)
    if judged != wanted:
        odd = min((judged - wanted) + (wanted - judged))
        raise ValueError(
            f"{output / RESULTS} has {len(results)} results of {len(pictures)} pictures in {folder} ({odd} differs); grade again"
        )
    digests = check_pictures(pictures)
    changed = [key for key, record in read_detections(output).items() if record["sha256"] != digests.get(key)]
    if changed:
        raise ValueError(f"{changed[0]} in {folder} changed after it was graded; grade into another --output")
    return Graded(output.name, folder, results, {**_json(folder / "manifest.json"), **grading})


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def report(run: Graded) -> dict[str, Any]:
    """Scores of a graded run, with the baselines of the small world if its prompts are asked."""
    scores = published_summary(run.results, allow_partial=True)
    cells = {name: interval.as_dict() for name, interval in intervals(run.results).items()}
    kinds = Counter((result["tag"], bucket_of(result["reason"])) for result in run.results if not result["correct"])
    named = {"benchmark": run.benchmark, "is_official": run.is_official_set and not scores.pop("partial")}
    failures: dict[str, dict[str, int]] = {}
    for (tag, kind), number in sorted(kinds.items()):
        failures.setdefault(tag, {})[kind] = number
    floors = floors_of(run.results) if run.benchmark.startswith("Small") else {}
    found = {"intervals": cells, "failures": failures, "floors": floors}
    return {**named, **scores, **found, "manifest": run.manifest, "provenance": read_provenance(run.pictures)}


def floors_of(results: Sequence[Record]) -> dict[str, dict[str, float]]:
    """What pictures score that ignore a part of the prompt, by kind and task."""
    from eval.floors import geneval_floors

    items = [json.loads(metadata) for metadata in dict.fromkeys(result["metadata"] for result in results)]
    return geneval_floors(items)


def write_report(output: Path, command: str, per_kind: int = 24) -> Path:
    """`report.json` and `report.html` of a graded run; returns the page. Raises ValueError as [`read_graded`]."""
    run = read_graded(output)
    result = report(run)
    write_json(output / REPORT, result)
    target = output / "report.html"
    title = f"{result['benchmark']}: {run.name}"
    source = [command, *source_lines(result["provenance"])]
    write_text(target, page(title, source, tables(result), [], first_of_each(samples_of(run), per_kind), len(run.results)))
    return target


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Scores with intervals and floors, and how often each kind of failure occurs."""
    floors = {name: floor for name, floor in result["floors"].items() if name != "ground_truth"}
    names = ["overall", *(name for name in result["intervals"] if name != "overall")]
    rows = [["task", "score [95 %, over prompts]", "pictures", *(name.replace("_", " ") for name in floors)]]
    for name in names:
        cell = result["intervals"][name]
        lowest = [f"{floor[name]:.3f}" if floor.get(name, 1.0) < 1.0 else "–" for floor in floors.values()]  # 1: not concerned
        rows.append([name.replace("_", " "), interval_text(cell), str(cell["n"]), *lowest])
    judge = result["manifest"].get("grader", "unknown")
    part = "" if result["is_official"] else " Not the official 553 prompts with 4 pictures each: no published score compares."
    note = (
        f"{result['total_images']} pictures of {result['total_prompts']} prompts: {result['pct_correct_images']:.1%} right, "
        f"{result['pct_correct_prompts']:.1%} of distinct prompts have one right. Grader: {judge}.{part}"
        + (" The columns on the right are what pictures score that ignore a part of the prompt." if floors else "")
    )
    kinds = [kind for kind in (*BUCKETS, "other") if any(kind in tag for tag in result["failures"].values())]
    failures = [["task", *kinds]]
    failures += [
        [tag.replace("_", " "), *(str(found.get(kind, 0)) for kind in kinds)] for tag, found in result["failures"].items()
    ]
    return [Table(result["benchmark"], rows, note), *([Table("Failures by kind", failures)] if kinds else [])]


def samples_of(run: Graded) -> list[Sample]:
    """Every judged picture, with the words that the model said before it drew."""
    said = _words(run.pictures)
    return [
        Sample(
            result["tag"].replace("_", " "),
            result["prompt"],
            "right" if result["correct"] else "wrong",
            (*said.get(key_of(result), ()), run.pictures / key_of(result)),
            result["reason"],
            bucket_of(result["reason"]),
        )
        for result in sorted(run.results, key=lambda result: result["correct"])  # failures first
    ]


def compare(first: Path, second: Path, command: str, target: Path, per_kind: int = 24) -> dict[str, Any]:
    """Two runs on the same prompts: differences with paired intervals, as a page and beside it as JSON.

    Raises ValueError for runs of other prompts, other numbers of pictures, or that were graded in another way.
    """
    runs = read_graded(first), read_graded(second)
    judged = [{key: run.manifest.get(key) for key in (*_json(path / IDENTITY), "num_samples") if key != PICTURES}
              for run, path in zip(runs, (first, second), strict=True)]  # fmt: skip
    if judged[0] != judged[1]:
        changed = "; ".join(settings_differences(judged[0], judged[1]))
        raise ValueError(
            f"{first} and {second} were not asked or graded alike ({changed}); only the model and its decoding may differ"
        )
    one, other = (sorted(run.results, key=key_of) for run in runs)
    tasks = _by_tag(one), _by_tag(other)
    found: dict[str, Any] = {"difference": differences(*tasks)}
    found |= {name: {"folder": str(path), "provenance": read_provenance(run.pictures)}
              for name, path, run in zip(("first", "second"), (first, second), runs, strict=True)}  # fmt: skip
    samples = _both(runs[0].pictures, runs[1].pictures, one, other)
    shown = [table((first.name, second.name), *tasks, unit="prompts")]
    title = f"{runs[0].benchmark}: {first.name} and {second.name}"
    write_text(target, page(title, [command], shown, [], first_of_each(samples, per_kind), len(samples)))
    write_json(target.with_suffix(".json"), found)
    return found


def _both(first: Path, second: Path, results: Sequence[Record], others: Sequence[Record]) -> list[Sample]:
    names = ("both wrong", "second only", "first only", "both right")
    return [
        Sample(
            one["tag"].replace("_", " "),
            one["prompt"],
            names[2 * one["correct"] + other["correct"]],
            (first / key_of(one), second / key_of(other)),
            "\n".join(f"{name}: {r['reason']}" for name, r in (("first", one), ("second", other)) if r["reason"]),
            bucket_of(one["reason"] or other["reason"]),
        )
        for one, other in zip(results, others, strict=True)
    ]


def key_of(result: Record) -> str:
    """The place of a result's picture in its folder: results name it as the grader saw it."""
    if "filename" not in result:
        raise ValueError("results without a filename cannot be shown; grade the folder with `eval.geneval grade`")
    return "/".join(Path(result["filename"]).parts[-3:])


def _by_tag(results: Sequence[Record]) -> dict[str, Task]:
    tags = dict.fromkeys(result["tag"] for result in results)
    chosen = {tag: [result for result in results if result["tag"] == tag] for tag in tags}
    return {tag: Task([float(r["correct"]) for r in found], [r["metadata"] for r in found]) for tag, found in chosen.items()}


def _words(folder: Path) -> dict[str, tuple[str, ...]]:
    """What was said before each picture, by the picture's file."""
    path = folder / "geneval.jsonl"
    if not path.exists():
        return {}
    said = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        parts = json.loads(line)["segments"]
        names = [part["image"] for part in parts if "image" in part]
        if names:
            said[names[0]] = tuple(part["text"] for part in parts if "text" in part)
    return said
