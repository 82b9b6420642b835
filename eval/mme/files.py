"""Answer files in MME's own form: `<subtask>.txt` with a line `image \\t question \\t ground truth \\t answer` per question.

The published script wants exactly four fields in a line and takes the lines two by two, whatever pictures they name. What it
reads is read the same here. Beyond that, answers may hold tabs and newlines, and the two questions of a picture may lie apart.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from eval.mme.grading import SUBTASKS, Pair, Record, read_truth
from eval.whole_files import write_text

FIELDS = "image \\t question \\t ground truth \\t answer"


@dataclass(frozen=True)
class AnswerFiles:
    """Pairs of answers by subtask, in the order of the published data, and what had to be put right to read them."""

    pairs: Mapping[str, list[Pair]]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """A question with its answer, and the number of its line, from 1."""

    number: int
    record: Record


def read_answer_files(folder: Path) -> AnswerFiles:
    """The subtasks of which `folder` holds a file. Other .txt files are named in the warnings and not read.

    Raises `ValueError` with file and line for what cannot be read, and for a folder without any subtask.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the one that holds <subtask>.txt files")
    texts = {path.stem: path for path in sorted(folder.glob("*.txt"))}
    if not texts.keys() & SUBTASKS.keys():
        raise ValueError(f"{folder} holds no answer file; expected some of {', '.join(f'{name}.txt' for name in SUBTASKS)}")
    warnings = [f"{texts[name].name} is no subtask of MME and was not read" for name in texts if name not in SUBTASKS]
    pairs: dict[str, list[Pair]] = {}
    for name in SUBTASKS:
        if name in texts:
            pairs[name], found = read_answer_file(texts[name])
            warnings += found
    return AnswerFiles(pairs, warnings)


def read_answer_file(path: Path) -> tuple[list[Pair], list[str]]:
    """The pairs of one subtask, and warnings. Raises `ValueError` with file and line."""
    warnings: list[str] = []
    lines = _read_lines(path, warnings)
    if not lines:
        raise ValueError(f"{path.name} has 0 questions; expected lines of {FIELDS}")
    pairs = _pair(path, lines, warnings)
    same = [first.image_id for first, second in pairs if read_truth(first.ground_truth) == read_truth(second.ground_truth)]
    if same:
        warnings.append(f"{path.name}: {len(same)} pictures have the same ground truth twice, such as {same[0]!r}")
    return pairs, warnings


def _read_lines(path: Path, warnings: list[str]) -> list[Line]:
    """A line without the four fields belongs to the answer above it; more fields belong to the answer of their line."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path.name}, line {number}: not UTF-8 ({error.reason}); convert the file") from error
    rows = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")  # not splitlines, which knows more line ends
    lines: list[Line] = []
    num_continued = 0
    for number, row in enumerate(rows, start=1):
        fields = row.split("\t", 3)
        if len(fields) == 4:
            lines.append(Line(number, _record(path, number, fields)))
        elif row.strip():
            if not lines or (len(fields) == 3 and fields[2].strip().lower() in ("yes", "no")):
                raise ValueError(f"{path.name}, line {number}: {len(fields)} of 4 fields in {row[:80]!r}; expected {FIELDS}")
            above = lines[-1]
            lines[-1] = Line(above.number, replace(above.record, answer=f"{above.record.answer}\n{row}"))
            num_continued += 1
    if num_continued:
        warnings.append(f"{path.name}: {num_continued} lines without 4 fields were read as part of the answer above them")
    return lines


def _record(path: Path, number: int, fields: Sequence[str]) -> Record:
    image_id, question, truth, answer = fields
    try:
        read_truth(truth)
    except ValueError as error:
        raise ValueError(f"{path.name}, line {number}: {error}") from error
    return Record(image_id.strip(), question, truth, answer)


def _pair(path: Path, lines: Sequence[Line], warnings: list[str]) -> list[Pair]:
    """Neighbouring lines, or lines of the same picture where neighbours differ and each picture has exactly two."""
    if len(lines) % 2:
        last = lines[-1]
        raise ValueError(
            f"{path.name}, line {last.number}: {len(lines)} questions, the last about {last.record.image_id!r}; "
            "each picture needs exactly two"
        )
    neighbours = list(zip(lines[::2], lines[1::2], strict=True))
    apart = [pair for pair in neighbours if pair[0].record.image_id != pair[1].record.image_id]
    if not apart:
        return [(first.record, second.record) for first, second in neighbours]
    first, second = apart[0]
    counts = Counter(line.record.image_id for line in lines)
    odd = next((name for name, count in counts.items() if count != 2), None)
    if odd is not None:
        raise ValueError(
            f"{path.name}, lines {first.number} and {second.number}: they name {first.record.image_id!r} and "
            f"{second.record.image_id!r}, and {odd!r} has {counts[odd]} questions; put the two of a picture on lines that follow"
        )
    warnings.append(
        f"{path.name}: from line {first.number} on, neighbours name other pictures; paired by picture "
        "(the published script would pair them as they lie)"
    )
    groups: dict[str, list[Record]] = {}
    for line in lines:
        groups.setdefault(line.record.image_id, []).append(line.record)
    return [(group[0], group[1]) for group in groups.values()]


def write_answer_files(folder: Path, records: Mapping[str, Iterable[Record]]) -> int:
    """Write `<subtask>.txt` for each subtask; the number of answers in which tabs and newlines became spaces.

    One space for each, so that the first four characters stay four. Raises `ValueError` for a tab or newline in another field.
    """
    num_changed = 0
    texts: dict[str, str] = {}
    for subtask, group in records.items():
        rows = []
        for record in group:
            kept = (record.image_id, record.question, record.ground_truth)
            broken = next((text for text in kept if re.search(r"[\t\r\n]", text)), None)
            if broken is not None:
                raise ValueError(f"{subtask}: {broken!r} holds a tab or newline, which an answer file cannot keep")
            answer = re.sub(r"[\t\r\n]", " ", record.answer)
            num_changed += answer != record.answer
            rows.append("\t".join((*kept, answer)) + "\n")
        texts[subtask] = "".join(rows)
    for subtask, text in texts.items():
        write_text(folder / f"{subtask}.txt", text)
    return num_changed
