"""Two runs on the same items, side by side: paired intervals, corrected p-values."""

from __future__ import annotations

from collections.abc import Mapping

from eval.page import Table
from eval.statistics import Task, bootstrap, holm, interval_text, paired_bootstrap


def differences(first: Mapping[str, Task], second: Mapping[str, Task]) -> dict[str, dict[str, float | int]]:
    """First minus second, overall (tasks in equal parts) and of each task: value, interval, p; p_holm corrects over the tasks.

    Raises ValueError where the two did not judge the same items.
    """
    by_task = {name: paired_bootstrap(task, second[name]) for name, task in first.items() if name in second}
    overall = paired_bootstrap(first, second)
    adjusted = holm({name: found.p_value for name, found in by_task.items()})
    shown: dict[str, dict[str, float | int]] = {"overall": {**overall.interval.as_dict(), "p": overall.p_value}}
    for name, found in by_task.items():
        shown[name] = {**found.interval.as_dict(), "p": found.p_value, "p_holm": adjusted[name]}
    return shown


def table(names: tuple[str, str], first: Mapping[str, Task], second: Mapping[str, Task], unit: str) -> Table:
    """The differences for people; `unit`: what was resampled."""
    rows = [["task", *names, f"difference [95 %, paired over {unit}]", "p", "p (Holm)"]]
    for name, cell in differences(first, second).items():
        sides = [bootstrap(side if name == "overall" else side[name], num_resamples=1).value for side in (first, second)]
        corrected = f"{cell['p_holm']:.4f}" if "p_holm" in cell else ""
        means = [f"{value:.3f}" for value in sides]
        rows.append([name.replace("_", " "), *means, interval_text(cell), f"{cell['p']:.4f}", corrected])
    return Table(f"Difference, {names[0]} minus {names[1]}", rows)
