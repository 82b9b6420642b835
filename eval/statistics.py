"""Intervals for evaluation numbers: cluster bootstrap, stratified by task, and its paired form. numpy only.

A cluster is what was drawn independently: a prompt with its pictures, an image with its questions. Clusters are drawn
with replacement within their task, so that an overall mean keeps its tasks in equal parts. Percentile intervals.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 10_000
CHUNK = 2_000_000
"""Indices drawn at once; bounds the memory at about 50 MB."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """`values` of one task, one per item, and the cluster of each (default: every item is its own)."""

    values: Sequence[float]
    clusters: Sequence[Hashable] | None = None


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile interval; `n` counts items, `num_clusters` what was resampled."""

    value: float
    low: float
    high: float
    n: int
    num_clusters: int

    def scaled(self, factor: float) -> Interval:
        """The same interval in another unit (a total over tasks is the mean times their number)."""
        return Interval(self.value * factor, self.low * factor, self.high * factor, self.n, self.num_clusters)

    def as_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


@dataclass(frozen=True)
class Difference:
    """A minus B on the same items, and the two-sided bootstrap p-value of "no difference"."""

    interval: Interval
    p_value: float


def bootstrap(
    tasks: Task | Mapping[str, Task], level: float = 0.95, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of one task, or unweighted mean of several task means, with a percentile interval at `level`.

    Raises `ValueError` for a task without items, or whose clusters are not one for each value.
    """
    strata = {"": tasks} if isinstance(tasks, Task) else dict(tasks)
    value, means = _resample(strata, num_resamples, seed)
    low, high = _percentiles(means, level)
    num_clusters = sum(len(_cluster_sums(task, name)[0]) for name, task in strata.items())
    return Interval(value, low, high, sum(len(task.values) for task in strata.values()), num_clusters)


def paired_bootstrap(
    a: Task | Mapping[str, Task],
    b: Task | Mapping[str, Task],
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Mean of A minus B where both judged the same items in the same order; both sides draw the same clusters.

    Raises `ValueError` when the tasks, the numbers of items or the clusters differ.
    """
    strata_a = {"": a} if isinstance(a, Task) else dict(a)
    strata_b = {"": b} if isinstance(b, Task) else dict(b)
    if strata_a.keys() != strata_b.keys():
        raise ValueError(f"tasks {sorted(strata_a)} and {sorted(strata_b)} differ; pair runs of the same benchmark")
    differences: dict[str, Task] = {}
    for name, task in strata_a.items():
        other = strata_b[name]
        if len(task.values) != len(other.values) or task.clusters != other.clusters:
            raise ValueError(
                f"task {name!r} has {len(task.values)} and {len(other.values)} items or other clusters; "
                "pair the same items in the same order"
            )
        values = np.asarray(task.values, float) - np.asarray(other.values, float)
        differences[name] = Task(values.tolist(), task.clusters)
    interval = bootstrap(differences, level, num_resamples, seed)
    _, means = _resample(differences, num_resamples, seed)
    tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return Difference(interval, min(1.0, 2 * (tail + 1) / (num_resamples + 1)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: adjusted p-values, to be held against the same level as one test."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = running
    return adjusted


def _cluster_sums(task: Task, name: str) -> tuple[Array, Array]:
    """Sum and number of values in each cluster, both `(G,)`."""
    values = np.asarray(task.values, float)
    if values.size == 0:
        raise ValueError(f"task {name!r} has 0 items; an interval needs at least one")
    if task.clusters is None:
        return values, np.ones_like(values)
    if len(task.clusters) != len(values):
        raise ValueError(f"task {name!r} has {len(values)} values but {len(task.clusters)} clusters; give one for each")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in task.clusters])
    return np.bincount(index, values).astype(np.float64), np.bincount(index).astype(np.float64)


def _resample(strata: Mapping[str, Task], num_resamples: int, seed: int) -> tuple[float, Array]:
    """The unweighted mean of the task means, and the same for each resample `(num_resamples,)`."""
    if not strata:
        raise ValueError("0 tasks have no mean; give at least one")
    rng = np.random.default_rng(seed)
    value, means = 0.0, np.zeros(num_resamples)
    for name, task in strata.items():
        sums, counts = _cluster_sums(task, name)
        value += sums.sum() / counts.sum()
        size = max(1, CHUNK // len(sums))
        for start in range(0, num_resamples, size):
            rows = min(size, num_resamples - start)
            drawn = rng.integers(0, len(sums), (rows, len(sums)))
            means[start : start + rows] += sums[drawn].sum(1) / counts[drawn].sum(1)
    return float(value) / len(strata), means / len(strata)


def _percentiles(means: Array, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level {level}; it must lie between 0 and 1, such as 0.95")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval_text(cell: Mapping[str, Any]) -> str:
    digits = 1 if abs(cell["high"]) > 2 else 3
    return f"{cell['value']:.{digits}f} [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]"
