"""How far confidence can be trusted: calibration measures, temperature scaling and the reliability diagram.

    python -m eval.calibration IN.jsonl --json OUT.json        lines {"confidence": c, "correct": 0 | 1}

| measure | definition |
|---|---|
| ECE | sum over 15 bins of equal width of (share of answers) x abs(accuracy - mean confidence) |
| ACE | the same over 15 bins of equal numbers, in order of confidence (arXiv 1904.01685; ties share their mean) |
| Brier | mean of (c - correct)^2 |
| NLL | mean of -log of the probability given to what happened, c kept within 1e-12 of 0 and 1 |

Bins of equal width are [a, b), the last one [a, 1], as numpy's histograms and netcal have them. torchmetrics gives c = 1 a bin of
its own; Guo et al. (2017) take (a, b], which leaves c = 0 out. Without confidences on an edge all agree.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.whole_files import write_json

NUM_BINS = 15
SMALLEST = 1e-12
"""Confidences are kept this far from 0 and 1 where a logarithm is taken."""
COLDEST, HOTTEST = 1e-2, 1e2
"""Temperatures between which the best one is looked for."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Answers with a confidence between `low` and `high`: their number, mean confidence and accuracy (0 for none)."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Scaling:
    """What a temperature fitted on one half does to the measures of the other half."""

    temperature: float
    before: dict[str, float]
    after: dict[str, float]


def reliability_bins(confidence: Sequence[float], correct: Sequence[float], num_bins: int = NUM_BINS) -> list[Bin]:
    """Bins of equal width over 0..1, empty ones too."""
    c, y = _arrays(confidence, correct)
    edges = np.linspace(0, 1, num_bins + 1)
    index = np.searchsorted(edges[1:-1], c, side="right")
    return [_bin(c[index == k], y[index == k], edges[k], edges[k + 1]) for k in range(num_bins)]


def adaptive_bins(confidence: Sequence[float], correct: Sequence[float], num_bins: int = NUM_BINS) -> list[Bin]:
    """Bins of equal numbers (give or take one) in order of confidence; none is empty, so there may be fewer. Where an edge falls
    among equal confidences, each of these counts with their mean correctness: the order of the answers changes nothing."""
    c, y = _arrays(confidence, correct)
    same = np.unique(c, return_inverse=True)[1]
    y = (np.bincount(same, y) / np.bincount(same))[same]
    order = np.argsort(c, kind="stable")
    parts = [part for part in np.array_split(order, num_bins) if len(part)]
    return [_bin(c[part], y[part], c[part[0]], c[part[-1]]) for part in parts]


def measures(confidence: Sequence[float], correct: Sequence[float], num_bins: int = NUM_BINS) -> dict[str, float]:
    """ece, ace, brier, nll and accuracy, as this module's table defines them.

    Raises `ValueError` for no answers, confidences outside 0..1 and `correct` other than 0 and 1.
    """
    c, y = _arrays(confidence, correct)
    kept = np.clip(c, SMALLEST, 1 - SMALLEST)
    return {
        "ece": _gap(reliability_bins(confidence, correct, num_bins)),
        "ace": _gap(adaptive_bins(confidence, correct, num_bins)),
        "brier": float(np.mean((c - y) ** 2)),
        "nll": float(-np.mean(y * np.log(kept) + (1 - y) * np.log1p(-kept))),
        "accuracy": float(y.mean()),
    }


def fit_temperature(logits: npt.ArrayLike, labels: Sequence[int]) -> float:
    """The T that minimises the cross-entropy of softmax(logits / T), `logits` `(N, K)` (Guo et al. 2017).

    The cross-entropy is convex in 1 / T, so the sign of its slope is bisected. Raises `ValueError` where no T between
    COLDEST and HOTTEST is best: all answers right (T would go to 0), or confidence that says nothing about them.
    """
    values = np.asarray(logits, float)
    target = np.asarray(labels, int)
    if values.ndim != 2 or len(values) != len(target) or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"logits of shape {values.shape} with {len(target)} labels; give finite (N, K) and N of them")
    if target.min() < 0 or target.max() >= values.shape[1]:
        raise ValueError(f"labels reach from {target.min()} to {target.max()}, but there are {values.shape[1]} logits")

    def slope(log_inverse: float) -> float:
        scaled = values * math.exp(log_inverse)
        weights = np.exp(scaled - scaled.max(1, keepdims=True))
        expected = (weights * values).sum(1) / weights.sum(1)
        return float(np.mean(expected - values[np.arange(len(target)), target]))

    low, high = -math.log(HOTTEST), -math.log(COLDEST)
    if not slope(low) < 0 < slope(high):
        why = "every answer is right" if slope(high) <= 0 else "confidence says nothing about the answers"
        raise ValueError(f"no temperature between {COLDEST:g} and {HOTTEST:g} is best: {why}; fit on more answers")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def rescaled(confidence: Sequence[float], temperature: float) -> list[float]:
    """Confidences whose log-odds are divided by `temperature`."""
    return [float(value) for value in 1 / (1 + np.exp(-_log_odds(confidence) / temperature))]


def temperature_scaling(confidence: Sequence[float], correct: Sequence[float], seed: int = 0) -> Scaling:
    """Fit on a random half of the answers, measure on the other. `ValueError` for fewer than 2, and as in `fit_temperature`."""
    c, y = _arrays(confidence, correct)
    if len(c) < 2:
        raise ValueError("1 answer cannot be halved; temperature scaling needs at least 2")
    order = np.random.default_rng(seed).permutation(len(c))
    fitted, rest = order[: len(c) // 2], order[len(c) // 2 :]
    odds = _log_odds(c[fitted])
    temperature = fit_temperature(np.stack([np.zeros_like(odds), odds], 1), [int(value) for value in y[fitted]])
    left, right = list(c[rest]), list(y[rest])
    return Scaling(temperature, measures(left, right), measures(rescaled(left, temperature), right))


def reliability_diagram(bins: Sequence[Bin], title: str, size: int = 320) -> str:
    """An SVG element: accuracy by confidence, the diagonal of perfect calibration, and what share of answers lies where."""
    margin, plot = 44, size - 60
    total = max(1, sum(part.count for part in bins))

    def x(value: float) -> float:
        return round(margin + value * plot, 2)

    def y(value: float) -> float:
        return round(16 + (1 - value) * plot, 2)

    def bar(part: Bin, height: float, color: str, hint: str = "") -> str:
        box = f'x="{x(part.low)}" y="{y(height)}" width="{x(part.high) - x(part.low):.2f}" height="{y(0) - y(height):.2f}"'
        return f'<rect {box} fill="{color}" stroke="#fff"><title>{hint}</title></rect>'

    drawn = []
    for part in bins:
        if part.count:
            hint = f"{part.count} answers: confidence {part.confidence:.3f}, accuracy {part.accuracy:.3f}"
            drawn += [bar(part, part.accuracy, "#4477aa", hint), bar(part, part.count / total, "#cc6677aa", hint)]
            drawn.append(f'<circle cx="{x(part.confidence)}" cy="{y(part.accuracy)}" r="2.5" fill="#222"/>')
    ticks = [
        f'<text x="{x(value)}" y="{y(0) + 14}" text-anchor="middle">{value:g}</text>'
        f'<text x="{margin - 5}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>'
        for value in (0, 0.5, 1)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" width="{size}" height="{size}" role="img" '
        f'font-family="sans-serif" font-size="11"><title>{escape(title)}</title>{"".join(drawn)}'
        f'<path d="M{x(0)} {y(1)}V{y(0)}H{x(1)}" fill="none" stroke="#222"/>'
        f'<path d="M{x(0)} {y(0)}L{x(1)} {y(1)}" stroke="#222" stroke-dasharray="4 3"/>{"".join(ticks)}'
        f'<text x="{x(0.5)}" y="{size - 12}" text-anchor="middle">confidence</text>'
        f'<text x="12" y="{y(0.5)}" text-anchor="middle" transform="rotate(-90 12 {y(0.5)})">accuracy; red: share</text></svg>'
    )


def read_lines(path: Path) -> tuple[list[float], list[float]]:
    """Confidences and correctness. Raises `ValueError` naming the line that is wrong, and for a file without lines."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason}") from error
    if lines == [""]:
        raise ValueError(f'{path} holds 0 answers; expected lines {{"confidence": 0.9, "correct": 1}}')
    pairs = [_read_line(path, number, line) for number, line in enumerate(lines, start=1)]
    return [confidence for confidence, _ in pairs], [correct for _, correct in pairs]


def _read_line(path: Path, number: int, line: str) -> tuple[float, float]:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}): {line[:80]!r}") from error
    if not isinstance(record, dict) or not {"confidence", "correct"} <= record.keys():
        raise ValueError(f'{where}: {line[:80]!r}; expected {{"confidence": 0.9, "correct": 1}}')
    confidence, correct = record["confidence"], record["correct"]
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 <= confidence <= 1:
        raise ValueError(f"{where}: confidence {confidence!r}; it must be a number from 0 to 1")
    if not isinstance(correct, (bool, int, float)) or correct not in (0, 1):
        raise ValueError(f"{where}: correct {correct!r}; it must be 0 or 1")
    return float(confidence), float(correct)


def _arrays(confidence: Sequence[float], correct: Sequence[float]) -> tuple[Array, Array]:
    c, y = np.asarray(confidence, float), np.asarray(correct, float)
    if c.ndim != 1 or c.shape != y.shape or not len(c):
        raise ValueError(f"{c.size} confidences and {y.size} answers; give at least one and as many of each")
    if not ((c >= 0) & (c <= 1)).all():
        raise ValueError(f"confidence {c[~((c >= 0) & (c <= 1))][0]}; it must be a number from 0 to 1")
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"correct {y[~np.isin(y, (0, 1))][0]}; it must be 0 or 1")
    return c, y


def _bin(c: Array, y: Array, low: float, high: float) -> Bin:
    if not len(c):
        return Bin(float(low), float(high), 0, 0.0, 0.0)
    return Bin(float(low), float(high), len(c), float(c.mean()), float(y.mean()))


def _gap(bins: Sequence[Bin]) -> float:
    total = sum(part.count for part in bins)
    return sum(part.count / total * abs(part.accuracy - part.confidence) for part in bins)


def _log_odds(confidence: Sequence[float] | Array) -> Array:
    kept = np.clip(np.asarray(confidence, float), SMALLEST, 1 - SMALLEST)
    return np.asarray(np.log(kept) - np.log1p(-kept))


def grade_file(path: Path) -> dict[str, Any]:
    """The measures of a file of answers, with their number, mean confidence and bins."""
    confidence, correct = read_lines(path)
    bins = [vars(part) for part in reliability_bins(confidence, correct)]
    return {**measures(confidence, correct), "n": len(correct), "mean_confidence": float(np.mean(confidence)), "bins": bins}


def table(result: Mapping[str, Any]) -> str:
    names = ("ece", "ace", "brier", "nll", "accuracy", "mean_confidence")
    return "\n".join([f"{name:<16}{result[name]:.4f}" for name in names] + [f"{'answers':<16}{result['n']}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2, and nothing written, for a file that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m eval.calibration", description="Calibration of answers with confidences.")
    parser.add_argument("answers", type=Path, help='lines {"confidence": 0..1, "correct": 0 or 1}')
    parser.add_argument("--json", type=Path, help="where the result goes")
    arguments = parser.parse_args(argv)
    try:
        result = grade_file(arguments.answers)
        if arguments.json:
            write_json(arguments.json, result)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
