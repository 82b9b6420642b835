"""A graded GenEval run for people: scores with intervals and floors, kinds of failure, samples; and two runs side by side."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.comparison import differences, table
from eval.geneval.records import Record, read_results
from eval.geneval.summary import intervals, published_summary
from eval.page import Sample, Table, first_of_each, page
from eval.provenance import read_provenance
from eval.statistics import Task, interval_text
from eval.whole_files import write_json, write_text

RESULTS, REPORT = "results.jsonl", "report.json"
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


def benchmark_of(manifest: Mapping[str, Any]) -> str:
    """What the numbers may be called: another prompt set is another benchmark."""
    name = str(manifest.get("prompt_set", "unknown prompts"))
    if name == "official":
        return "GenEval"
    return f"SmallGenEval, {name}" if name.startswith("small") else f"GenEval with other prompts ({name})"


def report(folder: Path) -> dict[str, Any]:
    """Scores of a graded folder, with the baselines of the small world if its prompts are asked.

    Raises ValueError for a folder without whole results.
    """
    manifest, results = _read(folder)
    scores = published_summary(results, allow_partial=True)
    cells = {name: interval.as_dict() for name, interval in intervals(results).items()}
    kinds = Counter((result["tag"], bucket_of(result["reason"])) for result in results if not result["correct"])
    named = {"benchmark": benchmark_of(manifest), "is_official_set": not scores.pop("partial")}
    failures: dict[str, dict[str, int]] = {}
    for (tag, kind), number in sorted(kinds.items()):
        failures.setdefault(tag, {})[kind] = number
    floors = floors_of(results) if str(manifest.get("prompt_set")).startswith("small") else {}
    found = {"intervals": cells, "failures": failures, "floors": floors}
    return {**named, **scores, **found, "manifest": manifest, "provenance": read_provenance(folder)}


def floors_of(results: Sequence[Record]) -> dict[str, dict[str, float]]:
    """What pictures score that ignore a part of the prompt, by kind and task."""
    from eval.floors import geneval_floors

    items = [json.loads(metadata) for metadata in dict.fromkeys(result["metadata"] for result in results)]
    return geneval_floors(items)


def write_report(folder: Path, command: str, per_kind: int = 24) -> Path:
    """`report.json` and `report.html` of a graded folder; returns the page."""
    result = report(folder)
    write_json(folder / REPORT, result)
    target = folder / "report.html"
    samples = first_of_each(samples_of(folder), per_kind)
    write_text(target, page(f"{result['benchmark']}: {folder.name}", command, tables(result), [], samples))
    return target


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Scores with intervals and floors, and how often each kind of failure occurs."""
    floors: Mapping[str, Mapping[str, float]] = result["floors"]
    names = ["overall", *(name for name in result["intervals"] if name != "overall")]
    rows = [["task", "score [95 %, over prompts]", "pictures", *(name.replace("_", " ") for name in floors)]]
    for name in names:
        cell = result["intervals"][name]
        lowest = [f"{floor[name]:.3f}" if name in floor else "" for floor in floors.values()]
        rows.append([name.replace("_", " "), interval_text(cell), str(cell["n"]), *lowest])
    judge = result["manifest"].get("grader", "unknown")
    part = "" if result["is_official_set"] else " Not the official 553 prompts with 4 pictures each: no published score compares."
    note = (
        f"{result['total_images']} pictures of {result['total_prompts']} prompts: {result['pct_correct_images']:.1%} right, "
        f"{result['pct_correct_prompts']:.1%} of prompts with at least one right. Judged by {judge}.{part}"
        + (" The columns on the right are what pictures score that ignore a part of the prompt." if floors else "")
    )
    kinds = [kind for kind in (*BUCKETS, "other") if any(kind in tag for tag in result["failures"].values())]
    failures = [["task", *kinds]]
    failures += [
        [tag.replace("_", " "), *(str(found.get(kind, 0)) for kind in kinds)] for tag, found in result["failures"].items()
    ]
    return [Table(result["benchmark"], rows, note), *([Table("Failures by kind", failures)] if kinds else [])]


def samples_of(folder: Path) -> list[Sample]:
    """Every judged picture, with the words that the model said before it drew."""
    said = _words(folder)
    return [
        Sample(
            result["tag"].replace("_", " "),
            result["prompt"],
            "right" if result["correct"] else "wrong",
            (*said.get(key_of(result), ()), folder / key_of(result)),
            result["reason"],
            bucket_of(result["reason"]),
        )
        for result in read_results(folder / RESULTS)
    ]


def compare(first: Path, second: Path, command: str, target: Path, per_kind: int = 24) -> dict[str, Any]:
    """Two runs on the same prompts: differences with paired intervals, as a page and beside it as JSON.

    Raises ValueError for runs of other prompts, other numbers of pictures or other graders.
    """
    (manifest, results), (other_manifest, other_results) = _read(first), _read(second)
    for name in ("prompts_sha256", "num_samples", "grader"):
        values = [found.get(name) for found in (manifest, other_manifest)]
        if values[0] != values[1]:
            raise ValueError(f"{name} is {values[0]} in {first} and {values[1]} in {second}; only the model may differ")
    one, other = (sorted(found, key=key_of) for found in (results, other_results))
    tasks = _by_tag(one), _by_tag(other)
    found = differences(*tasks)
    samples = first_of_each(_both(first, second, one, other), per_kind)
    title = f"{benchmark_of(manifest)}: {first.name} and {second.name}"
    shown = [table((first.name, second.name), *tasks, unit="prompts")]
    write_text(target, page(title, command, shown, [], samples))
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
    return "/".join(Path(result["filename"]).parts[-3:])


def _by_tag(results: Sequence[Record]) -> dict[str, Task]:
    tags = dict.fromkeys(result["tag"] for result in results)
    chosen = {tag: [result for result in results if result["tag"] == tag] for tag in tags}
    return {tag: Task([float(r["correct"]) for r in found], [r["metadata"] for r in found]) for tag, found in chosen.items()}


def _read(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """Manifest and results of a graded folder."""
    results = read_results(folder / RESULTS)
    manifest: dict[str, Any] = {}
    for name in ("manifest.json", "grading.json"):
        if (folder / name).exists():
            manifest |= json.loads((folder / name).read_text(encoding="utf-8"))
    return manifest, results


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
