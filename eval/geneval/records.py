"""JSON lines in and out: pictures with raw detections, their verdicts, and results in the published form.

A record of a picture: `{"id", "options", "metadata", "image_size": [W, H], "detections": {class: [[x0, y0, x1, y1, score], ...]},
"colors": {class: [colour or null of each box]}}`, boxes raw: unsorted, those below the thresholds included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from eval.geneval.prompts import CLASSES
from eval.geneval.verdict import Detection, Verdict, parse_options, verdict
from eval.whole_files import write_text

Record = dict[str, Any]
RESULT_FIELDS = ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")
RANKS = {name: number for number, name in enumerate(CLASSES)}
T = TypeVar("T")


def read_lines(path: Path, parse: Callable[[Record], T]) -> list[T]:
    """`parse` of each line's JSON object. Raises `ValueError` with file and line number for whatever cannot be read."""
    parsed = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"{type(record).__name__} instead of an object")
                parsed.append(parse(record))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                what = f"no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{path}, line {number}: {what}") from error
    return parsed


def write_results(path: Path, results: Iterable[Record]) -> None:
    """The published `results.jsonl`."""
    write_text(path, "".join(f"{result_text(result)}\n" for result in results))


def judge_record(record: Record, options: Mapping[str, Any] | None = None) -> Verdict:
    """The verdict on a record of a picture; `options` (published names) replace the record's own.

    Raises `ValueError` where a box has not five numbers, and where a clause asks for colours that the record does not hold.
    """
    colors: Mapping[str, Sequence[str | None]] = record.get("colors", {})
    detections = []
    for name in sorted(record["detections"], key=lambda name: RANKS.get(name, len(RANKS))):
        rows = record["detections"][name]
        if name in colors and len(colors[name]) != len(rows):
            raise ValueError(f"{len(colors[name])} colours for {len(rows)} boxes of {name}; give one for each raw box")
        names = colors.get(name, [None] * len(rows))
        detections += [Detection(name, *_score_and_box(row), color) for row, color in zip(rows, names, strict=True)]

    def name_colors(name: str, found: Sequence[Detection]) -> list[str | None]:
        if found and name not in colors:
            raise ValueError(f"a clause asks for the colour of {name}, but the record has no colours of {name}")
        return [detection.color for detection in found]

    chosen = parse_options(record.get("options", {}) if options is None else options)
    return verdict(detections, name_colors, record["metadata"], None, chosen)


def _score_and_box(row: Sequence[float]) -> tuple[float, tuple[float, float, float, float]]:
    if len(row) != 5:
        raise ValueError(f"box {row} has {len(row)} numbers instead of x0, y0, x1, y1, score")
    x0, y0, x1, y1, score = (float(value) for value in row)
    return score, (x0, y0, x1, y1)


def verdict_line(record: Record) -> Record:
    judged = judge_record(record)
    return {"id": record["id"], "correct": judged.correct, "reason": judged.reason, "details": judged.details}


def result_of(filename: str, metadata: Mapping[str, Any], judged: Verdict) -> Record:
    """One line of the published `results.jsonl`."""
    values = (filename, metadata["tag"], metadata["prompt"], judged.correct, judged.reason)
    return dict(zip(RESULT_FIELDS, (*values, json.dumps(metadata), json.dumps(judged.details)), strict=True))


def result_text(result: Mapping[str, Any]) -> str:
    """The line as the published scorer writes it: no spaces, slashes escaped."""
    return json.dumps(result, separators=(",", ":")).replace("/", "\\/")


def read_results(path: Path) -> list[Record]:
    """Lines of a `results.jsonl`; of its fields "tag", "correct" and "metadata" must be there, as the published summary asks."""

    def check(record: Record) -> Record:
        for name, kind in (("tag", str), ("correct", bool), ("metadata", str)):
            if not isinstance(record[name], kind):
                raise ValueError(f"{name} is {record[name]!r} instead of a {kind.__name__}")
        return record

    results = read_lines(path, check)
    if not results:
        raise ValueError(f"{path} holds no results; grade a folder first")
    return results
