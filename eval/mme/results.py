"""From answer files to MME's numbers: scores and totals with intervals over pictures, floors, and what is partial about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.mme.files import read_answer_files
from eval.mme.grading import COGNITION, PERCEPTION, SUBTASKS, Pair, grade_pairs, image_scores, score_pairs
from eval.statistics import NUM_RESAMPLES, Task, bootstrap, interval_text

GROUPS: Mapping[str, Mapping[str, int]] = {"perception": PERCEPTION, "cognition": COGNITION}
COIN = 75.0
"""What fair coins get in a subtask: 100 / 2 + 100 / 4."""


def grade_folder(folder: Path, parser: str = "official", num_resamples: int = NUM_RESAMPLES) -> dict[str, Any]:
    """The result of a folder of `<subtask>.txt` files.

    perception, cognition: sums of the scores of the subtasks that are there, 0 where none is; `partial` says whether all
    questions of the benchmark are. other: share of answers that say neither yes nor no.
    Raises `ValueError` for files that cannot be read, and for an unknown parser.
    """
    files = read_answer_files(folder)
    return result_of(files.pairs, parser, num_resamples=num_resamples) | {"warnings": files.warnings}


def result_of(
    pairs: Mapping[str, Sequence[Pair]],
    parser: str,
    cluster: Callable[[str], str] = str,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Any]:
    """As `grade_folder`, of pairs by subtask; `cluster`: from a picture's name to what was drawn independently."""
    scores = {name: score_pairs(group, parser) for name, group in pairs.items()}
    tasks = {
        name: Task(image_scores(grade_pairs(group, parser)), [cluster(a.image_id) for a, _ in group], maximum=200.0)
        for name, group in pairs.items()
    }
    floors = {f"always_{word}": _always(pairs, word) for word in ("yes", "no")}
    floors["coin"] = {group: COIN * len(members & scores.keys()) for group, members in _members().items()}
    intervals = {name: bootstrap(task, num_resamples=num_resamples).as_dict() for name, task in tasks.items()}
    for group, members in _members().items():
        there = {name: task for name, task in tasks.items() if name in members}
        if there:
            intervals[group] = bootstrap(there, num_resamples=num_resamples).scaled(len(there)).as_dict()
    num_questions = {name: score.num_questions for name, score in scores.items()}
    return {
        **{group: float(sum(scores[name].score for name in scores if name in members)) for group, members in _members().items()},
        "subtasks": {name: score.score for name, score in scores.items()},
        "other": sum(score.other_rate * score.num_questions for score in scores.values()) / sum(num_questions.values()),
        "acc": {name: score.acc for name, score in scores.items()},
        "acc_plus": {name: score.acc_plus for name, score in scores.items()},
        "other_by_subtask": {name: score.other_rate for name, score in scores.items()},
        "num_questions": num_questions,
        "partial": num_questions != dict(SUBTASKS),
        "missing": [name for name in SUBTASKS if name not in scores],
        "intervals": intervals,
        "floors": floors,
        "parser": parser,
    }


def _members() -> dict[str, frozenset[str]]:
    return {group: frozenset(subtasks) for group, subtasks in GROUPS.items()}


def _always(pairs: Mapping[str, Sequence[Pair]], word: str) -> dict[str, float]:
    """Totals of answering `word` to everything."""
    same = {name: [(replace(a, answer=word), replace(b, answer=word)) for a, b in group] for name, group in pairs.items()}
    scores = {name: score_pairs(group).score for name, group in same.items()}
    return {group: float(sum(scores[name] for name in scores if name in members)) for group, members in _members().items()}


def table(result: Mapping[str, Any]) -> str:
    """The result for people: a row for each subtask and total, with intervals, and the floors below."""
    lines = [f"{'subtask':<24}{'questions':>9}  {'acc':>6}{'acc+':>7}  score [95 % over pictures]{'other':>12}"]
    for name, score in result["subtasks"].items():
        acc, plus, other = (result[key][name] for key in ("acc", "acc_plus", "other_by_subtask"))
        cell = interval_text(result["intervals"][name] | {"value": score})
        lines.append(f"{name:<24}{result['num_questions'][name]:>9}  {acc:>6.3f}{plus:>7.3f}  {cell:<28}{other:>9.3f}")
    floors = result["floors"]
    for group, members in GROUPS.items():
        there = [name for name in result["subtasks"] if name in members]
        if there:
            knowing_nothing = ", ".join(f"{name.replace('_', ' ')} {floors[name][group]:g}" for name in floors)
            lines.append(
                f"{group}: {interval_text(result['intervals'][group])} of {200 * len(there)} "
                f"({len(there)} of {len(members)} subtasks; floors: {knowing_nothing})"
            )
    part = "; PARTIAL: not all questions of the benchmark" if result["partial"] else ""
    lines.append(f"parser {result['parser']}, answers that say neither {result['other']:.3f}{part}")
    return "\n".join(lines)
