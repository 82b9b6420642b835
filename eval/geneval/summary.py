"""What a run scores: task scores over pictures, their unweighted mean, and what is missing for it to count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval.geneval.verdict import TAGS
from eval.statistics import Interval, Task, bootstrap, interval_text

Results = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Protocol:
    """What a complete run holds: `prompts_per_tag` and `images_per_prompt`."""

    prompts_per_tag: Mapping[str, int]
    images_per_prompt: int


OFFICIAL = Protocol(dict(zip(TAGS, (80, 99, 80, 94, 100, 100), strict=True)), images_per_prompt=4)


@dataclass
class _Tally:
    verdicts: list[bool] = field(default_factory=list)
    prompts: dict[Hashable, list[bool]] = field(default_factory=dict)

    @property
    def score(self) -> float:
        return sum(self.verdicts) / len(self.verdicts)


def _tally(results: Results) -> dict[str, _Tally]:
    """Verdicts of each tag, tags in the order of their first result."""
    tallies: dict[str, _Tally] = {}
    for result in results:
        tally = tallies.setdefault(result["tag"], _Tally())
        tally.verdicts.append(bool(result["correct"]))
        tally.prompts.setdefault(result["metadata"], []).append(bool(result["correct"]))
    return tallies


def summarise(results: Results, protocol: Protocol = OFFICIAL, allow_partial: bool = False) -> dict[str, Any]:
    """Scores of a run from its results ("tag", "correct" and "metadata", a JSON string or anything hashable, each).

    "overall" is the unweighted mean of the task scores, the number that papers quote. A run that lacks prompts,
    pictures or tags of `protocol` raises `ValueError`; with `allow_partial` its mean is called "overall_partial" and
    what is missing is listed, since the mean over a part of the prompts is another benchmark.
    """
    tallies = _tally(results)
    missing = _missing(tallies, protocol)
    if missing and not allow_partial:
        raise ValueError(f"no overall score for a partial run ({'; '.join(missing)}); finish it or allow a partial one")
    tasks = {tag: tally.score for tag, tally in tallies.items()}
    prompts = _prompts(results)
    return {
        "overall_partial" if missing else "overall": float(np.mean(list(tasks.values()))) if tasks else 0.0,
        "tasks": tasks,
        "num_images": len(results),
        "num_prompts": len(prompts),
        "image_accuracy": sum(bool(result["correct"]) for result in results) / len(results) if results else 0.0,
        "prompt_accuracy": sum(prompts) / len(prompts) if prompts else 0.0,
        "missing": missing,
    }


def published_summary(results: Results, allow_partial: bool = False) -> dict[str, Any]:
    """What the published `summary_scores.py` prints, all shares as fractions of 1 (it shows some of them as per cent).

    "partial" says that the results are not four distinct pictures of each of the 553 prompts; without `allow_partial` that
    raises `ValueError`. Results without "filename" are partial, since a picture may be there twice.
    """
    partial = _partial(results)
    if partial and not allow_partial:
        raise ValueError(f"no overall score for a partial run ({'; '.join(partial)}); finish it or pass --allow-partial")
    whole = summarise(results, allow_partial=True)
    tasks = {
        tag: {"pct": tally.score, "correct": sum(tally.verdicts), "total": len(tally.verdicts)}
        for tag, tally in _tally(results).items()
    }
    return {
        "total_images": whole["num_images"],
        "total_prompts": whole["num_prompts"],
        "pct_correct_images": whole["image_accuracy"],
        "pct_correct_prompts": whole["prompt_accuracy"],
        "overall": whole.get("overall", whole.get("overall_partial")),
        "tasks": tasks,
        "partial": bool(partial),
    }


def intervals(results: Results) -> dict[str, Interval]:
    """95 % bootstrap intervals over prompts (all pictures of a prompt together), of each task and of "overall"."""
    tasks = {
        tag: Task(
            [float(result["correct"]) for result in results if result["tag"] == tag],
            [result["metadata"] for result in results if result["tag"] == tag],
        )
        for tag in _tally(results)
    }
    return {**{tag: bootstrap(task) for tag, task in tasks.items()}, "overall": bootstrap(tasks)}


def summary_table(results: Results, summary: Mapping[str, Any]) -> str:
    """The summary for readers, with intervals over prompts."""
    whole = "partial run: not comparable" if summary["partial"] else "complete run"
    rows = [
        f"{summary['total_images']} images, {summary['total_prompts']} prompts ({whole})",
        f"correct images {summary['pct_correct_images']:.2%}, correct prompts {summary['pct_correct_prompts']:.2%}",
        "",
    ]
    for name, interval in intervals(results).items():
        task = summary["tasks"].get(name)
        count = f"  {task['correct']} / {task['total']}" if task else "  mean over tasks" + (", partial" * summary["partial"])
        rows.append(f"{name:<14} {interval_text(interval.as_dict()):<24}{count}")
    return "\n".join(rows)


def _prompts(results: Results) -> list[bool]:
    """For each prompt, whether any of its pictures is correct."""
    prompts: dict[Hashable, bool] = {}
    for result in results:
        prompts[result["metadata"]] = prompts.get(result["metadata"], False) or bool(result["correct"])
    return list(prompts.values())


def _partial(results: Results) -> list[str]:
    names = Counter(result.get("filename") for result in results)
    problems = _missing(_tally(results), OFFICIAL)
    if None in names:
        problems.append(f"{names.pop(None)} results without a filename")
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        problems.append(f"{len(twice)} pictures more than once, such as {twice[0]}")
    return problems


def _missing(tallies: Mapping[str, _Tally], protocol: Protocol) -> list[str]:
    """What a run has too little or too much of, in words."""
    problems = [f"unknown tag {tag!r}" for tag in tallies if tag not in protocol.prompts_per_tag]
    for tag, num_prompts in protocol.prompts_per_tag.items():
        prompts = tallies[tag].prompts if tag in tallies else {}
        if len(prompts) != num_prompts:
            problems.append(f"{tag}: {len(prompts)} of {num_prompts} prompts")
        uneven = sum(len(verdicts) != protocol.images_per_prompt for verdicts in prompts.values())
        if uneven:
            problems.append(f"{tag}: {uneven} prompts without exactly {protocol.images_per_prompt} pictures")
    return problems
