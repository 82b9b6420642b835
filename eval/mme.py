"""MME's grading (arXiv 2306.13394): yes/no answers to acc, acc+ and the score of a subtask. Pure functions.

Three parsers exist in the field and disagree on odd answers, so the parser's name belongs beside each number.
Pairing is by image id, not by adjacent lines: upstream pairs shuffled lines wrongly without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One question: every `image_id` has exactly two, one with `ground_truth` "yes" and one "no" (any case)."""

    image_id: str
    question: str
    ground_truth: str
    answer: str


@dataclass(frozen=True)
class Subtask:
    """`acc` and `acc_plus` in 0..1; `score` = 100 acc + 100 acc+ in 0..200; `other_rate` = answers that say neither."""

    acc: float
    acc_plus: float
    score: float
    other_rate: float
    num_questions: int
    num_images: int


def parse_official(answer: str) -> str:
    """Read "yes", "no" or "other" from the first four characters, not stripped: "eyes" is yes, "know" is no."""
    lowered = answer.lower()
    if lowered in ("yes", "no"):
        return lowered
    prefix = lowered[:4]
    if "yes" in prefix:
        return "yes"
    return "no" if "no" in prefix else "other"


def parse_lmms(answer: str) -> str:
    """lmms-eval's rule: strip, drop full stops, accept "y" and "n", then as the official parser."""
    cleaned = answer.lower().strip().replace(".", "")
    if cleaned in ("y", "n"):
        return {"y": "yes", "n": "no"}[cleaned]
    return parse_official(cleaned)


def parse_strict(answer: str) -> str:
    """VLMEvalKit's rule: the words yes and no after removing punctuation; exactly one of the two must occur."""
    words = set(re.sub(r"[^\w\s]", " ", answer.lower()).split())
    said = [word for word in ("yes", "no") if word in words]
    return said[0] if len(said) == 1 else "other"


PARSERS: Mapping[str, Callable[[str], str]] = {
    "official": parse_official,
    "lmms": parse_lmms,
    "strict": parse_strict,
}


def grade(records: Iterable[Record], parser: str = "official") -> dict[str, tuple[bool, bool]]:
    """Image id -> whether its two answers are right (in order of appearance). Saying neither yes nor no is wrong.

    Raises `ValueError` for an unknown parser, a ground truth that is not yes/no, or an image without one of each.
    """
    if parser not in PARSERS:
        raise ValueError(f"unknown parser {parser!r}; use one of {', '.join(PARSERS)}")
    truths: dict[str, list[str]] = {}
    rights: dict[str, list[bool]] = {}
    for record in records:
        truth = record.ground_truth.lower()
        if truth not in ("yes", "no"):
            raise ValueError(f"ground truth {record.ground_truth!r} of {record.image_id}; it must be yes or no")
        truths.setdefault(record.image_id, []).append(truth)
        rights.setdefault(record.image_id, []).append(PARSERS[parser](record.answer) == truth)
    for image_id, pair in truths.items():
        if sorted(pair) != ["no", "yes"]:
            raise ValueError(f"image {image_id} has ground truths {pair}; MME needs exactly one yes and one no")
    return {image_id: (pair[0], pair[1]) for image_id, pair in rights.items()}


def score_subtask(records: Sequence[Record], parser: str = "official") -> Subtask:
    """acc over questions, acc+ over images with both right, and their sum times 100."""
    graded = grade(records, parser)
    if not graded:
        raise ValueError("a subtask with 0 records has no score; give at least one image with its two questions")
    acc = sum(sum(pair) for pair in graded.values()) / (2 * len(graded))
    acc_plus = sum(all(pair) for pair in graded.values()) / len(graded)
    others = sum(PARSERS[parser](record.answer) == "other" for record in records)
    return Subtask(acc, acc_plus, 100 * acc + 100 * acc_plus, others / len(records), len(records), len(graded))


def image_scores(graded: Mapping[str, tuple[bool, bool]]) -> list[float]:
    """Each image's own score in 0..200; their mean is the subtask's score, which makes them the unit to resample."""
    return [50.0 * sum(pair) + 100.0 * all(pair) for pair in graded.values()]


def total(subtasks: Mapping[str, Subtask]) -> float:
    """Plain sum of subtask scores, 200 each."""
    return sum(subtask.score for subtask in subtasks.values())
