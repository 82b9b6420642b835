"""MME's grading: yes/no answers to acc, acc+ and the score of a subtask. Pure functions.

Three parsers exist in the field and disagree on odd answers, so the parser's name belongs beside each number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

# Subtasks and their numbers of questions in the published data, in its order.
PERCEPTION = {
    "existence": 60,
    "count": 60,
    "position": 60,
    "color": 60,
    "posters": 294,
    "celebrity": 340,
    "scene": 400,
    "landmark": 400,
    "artwork": 400,
    "OCR": 40,
}
COGNITION = {"commonsense_reasoning": 140, "numerical_calculation": 40, "text_translation": 40, "code_reasoning": 40}
SUBTASKS = PERCEPTION | COGNITION

VLMEVALKIT_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
VLMEVALKIT_MAX_STOPS = 32
"""VLMEvalKit passes `re.UNICODE` (32) where `sub` expects the number of replacements."""


@dataclass(frozen=True)
class Record:
    """One question: every `image_id` has exactly two, one with `ground_truth` "yes" and one "no" (any case)."""

    image_id: str
    question: str
    ground_truth: str
    answer: str


Pair = tuple[Record, Record]


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
    prefix = answer.lower()[:4]
    if "yes" in prefix:
        return "yes"
    return "no" if "no" in prefix else "other"


def parse_lmms(answer: str) -> str:
    """lmms-eval's rule: strip, drop full stops, accept "y" and "n", then as the official parser."""
    cleaned = answer.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(cleaned) or parse_official(cleaned)


def parse_strict(answer: str) -> str:
    """VLMEvalKit's rule without a judge: among the words, exactly one of yes and no must occur.

    A mark of punctuation that stands beside a space anywhere is removed, another becomes a space; with a number such as
    1,000 in the answer all are removed. Full stops go where no digit is beside them. Other marks (: * ') stay in the word.
    """
    lowered = answer.lower()
    has_number = re.search(r"\d,\d", lowered) is not None
    table: dict[int, str] = {}
    for mark in VLMEVALKIT_PUNCTUATION:
        is_removed = has_number or f"{mark} " in lowered or f" {mark}" in lowered
        table[ord(mark)] = "" if is_removed else " "
    words = set(re.sub(r"(?<!\d)\.(?!\d)", "", lowered.translate(table), count=VLMEVALKIT_MAX_STOPS).split())
    said = words & {"yes", "no"}
    return said.pop() if len(said) == 1 else "other"


PARSERS: Mapping[str, Callable[[str], str]] = {
    "official": parse_official,
    "lmms": parse_lmms,
    "strict": parse_strict,
}


def find_parser(name: str) -> Callable[[str], str]:
    """Raises `ValueError` for an unknown name."""
    if name not in PARSERS:
        raise ValueError(f"unknown parser {name!r}; use one of {', '.join(PARSERS)}")
    return PARSERS[name]


def read_truth(text: str) -> str:
    """Yes or no from a ground truth as stored (any case, spaces or a full stop around it); `ValueError` for anything else."""
    truth = text.lower().strip().replace(".", "")
    if truth not in ("yes", "no"):
        raise ValueError(f"ground truth {text!r}; it must be yes or no")
    return truth


def pair_by_image(records: Iterable[Record]) -> list[Pair]:
    """The two questions of each image, in order of appearance.

    Raises `ValueError` for a ground truth that is not yes/no, or an image without one of each.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.image_id, []).append(record)
    pairs = []
    for image_id, group in groups.items():
        truths = [read_truth(record.ground_truth) for record in group]
        if sorted(truths) != ["no", "yes"]:
            raise ValueError(f"image {image_id} has ground truths {truths}; MME needs exactly one yes and one no")
        pairs.append((group[0], group[1]))
    return pairs


def grade_pairs(pairs: Iterable[Pair], parser: str = "official") -> list[tuple[bool, bool]]:
    """Whether the two answers of each image are right. Saying neither yes nor no is wrong."""
    parse = find_parser(parser)

    def is_right(record: Record) -> bool:
        return parse(record.answer) == read_truth(record.ground_truth)

    return [(is_right(first), is_right(second)) for first, second in pairs]


def grade(records: Iterable[Record], parser: str = "official") -> dict[str, tuple[bool, bool]]:
    """Image id -> whether its two answers are right (in order of appearance); `ValueError` as in `pair_by_image`."""
    pairs = pair_by_image(records)
    return {pair[0].image_id: rights for pair, rights in zip(pairs, grade_pairs(pairs, parser), strict=True)}


def score_pairs(pairs: Sequence[Pair], parser: str = "official") -> Subtask:
    """acc over questions, acc+ over images with both right, and their sum times 100."""
    graded = grade_pairs(pairs, parser)
    if not graded:
        raise ValueError("a subtask with 0 records has no score; give at least one image with its two questions")
    parse = find_parser(parser)
    acc = sum(sum(rights) for rights in graded) / (2 * len(graded))
    acc_plus = sum(all(rights) for rights in graded) / len(graded)
    num_others = sum(parse(record.answer) == "other" for pair in pairs for record in pair)
    return Subtask(acc, acc_plus, 100 * acc + 100 * acc_plus, num_others / (2 * len(pairs)), 2 * len(pairs), len(pairs))


def score_subtask(records: Iterable[Record], parser: str = "official") -> Subtask:
    """The score of records that are paired by image; `ValueError` as in `pair_by_image`, and for 0 records."""
    return score_pairs(pair_by_image(records), parser)


def image_scores(graded: Iterable[tuple[bool, bool]]) -> list[float]:
    """Each image's own score in 0..200; their mean is the subtask's score, which makes them the unit to resample."""
    return [50.0 * sum(pair) + 100.0 * all(pair) for pair in graded]


def total(subtasks: Mapping[str, Subtask]) -> float:
    """Plain sum of subtask scores, 200 each."""
    return sum(subtask.score for subtask in subtasks.values())
