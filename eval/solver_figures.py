"""The figure of `eval.solver_curves`: errors on top, scores below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from orthus.diffusion import SPACINGS

Point = dict[str, Any]
COLORS = {"ddim": "tab:gray", "dpm++2m": "tab:blue", "heun": "tab:orange", "linear": "tab:green", "cosine": "tab:purple"}
STYLES = dict(zip(SPACINGS, ("--", "-", ":"), strict=False))
EVALUATIONS = "evaluations of the head per latent"
PANEL = (4.6, 3.5)  # inches


def write_figure(path: Path, errors: Sequence[Point], scores: Sequence[Point], guidance: float, title: str) -> None:
    """Draw all that was measured as one PNG; `guidance` is the weight of use. Needs matplotlib (`pip install orthus[eval]`)."""
    from matplotlib.figure import Figure

    guidances = list(dict.fromkeys(point["guidance"] for point in errors))
    rows = bool(errors) + bool(scores)
    columns = max(len(guidances), 3 if scores else 1)
    if not rows:
        raise ValueError("there is nothing to draw; let parts= name error or score")
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    for number, weight in enumerate(guidances, 1):
        axes = figure.add_subplot(rows, columns, number)
        draw_errors(axes, [point for point in errors if point["guidance"] == weight])
        axes.set_title(f"error at guidance {weight:g}")
    if scores:
        first = columns * (rows - 1) + 1
        draw_solvers(figure.add_subplot(rows, columns, first), scores)
        draw_guidance(figure.add_subplot(rows, columns, first + 1), scores)
        draw_annealing(figure.add_subplot(rows, columns, first + 2), scores, guidance)
    figure.suptitle(title)
    figure.savefig(path, dpi=75)


def draw_errors(axes: Any, errors: Sequence[Point]) -> None:
    """RMS error against evaluations, a line for each solver and spacing, with that of the last DDIM point across."""
    for solver, spacing in dict.fromkeys((point["solver"], point["spacing"]) for point in errors):
        line = [p for p in errors if (p["solver"], p["spacing"]) == (solver, spacing) and p.get("rms")]
        x, y = [p["num_diffusion_steps"] for p in line], [p["rms"] for p in line]
        axes.plot(x, y, STYLES[spacing], color=COLORS[solver], marker=".", label=f"{solver}, {spacing}")
        if line and (solver, spacing) == ("ddim", "trailing"):
            axes.axhline(line[-1]["rms"], color="black", linewidth=0.6)
    axes.set(xscale="log", yscale="log", xlabel=EVALUATIONS, ylabel="RMS error, scaled latents")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=7)


def _bars(axes: Any, points: Sequence[Point], x: str, style: str, color: str, label: str | None = None) -> None:
    """Scores with their intervals, in the order of `x`."""
    line = sorted(points, key=lambda point: point[x])
    values = [point["score"]["value"] for point in line]
    below = [value - point["score"]["low"] for value, point in zip(values, line, strict=True)]
    above = [point["score"]["high"] - value for value, point in zip(values, line, strict=True)]
    axes.errorbar([point[x] for point in line], values, [below, above], fmt=style, color=color, capsize=2, label=label)


def _frame(axes: Any, scores: Iterable[Point], x_label: str, title: str) -> None:
    exact = next(point["score"] for point in scores if point["key"] == "score/exact")
    axes.axhspan(exact["low"], exact["high"], color="black", alpha=0.08, label="exact sampler, 95 %")
    axes.set(xlabel=x_label, ylabel="SmallGenEval", title=title, ylim=(0, 1))
    axes.grid(True, alpha=0.2)
    axes.legend(fontsize=7, loc="lower right")


def draw_solvers(axes: Any, scores: Sequence[Point]) -> None:
    """Score against evaluations, each solver with its better spacing, and the exact sampler's interval."""
    points = [point for point in scores if point["group"] == "steps"]
    for solver in dict.fromkeys(point["solver"] for point in points):
        _bars(axes, [p for p in points if p["solver"] == solver], "num_diffusion_steps", ".-", COLORS[solver], solver)
    axes.set_xscale("log")
    _frame(axes, scores, EVALUATIONS, "score, better spacing of each")


def draw_guidance(axes: Any, scores: Sequence[Point]) -> None:
    """Score of the model's own sampler against guidance."""
    _bars(axes, [point for point in scores if point["group"] == "guidance"], "guidance", ".-", "tab:red", "own sampler")
    _frame(axes, scores, "guidance", "score of the model's own sampler")


def draw_annealing(axes: Any, scores: Sequence[Point], guidance: float) -> None:
    """Score where evaluations fall over an image, against their mean; the constant own sampler beside it."""
    points = [point for point in scores if point["group"] == "annealing"]
    for schedule in dict.fromkeys(point["step_schedule"] for point in points):
        line = [point for point in points if point["step_schedule"] == schedule]
        _bars(axes, line, "mean_evaluations", ".-", COLORS[schedule], schedule)
    own = next(point for point in scores if point["group"] == "guidance" and point["guidance"] == guidance)
    constant = [p for p in scores if p["group"] == "steps" and p["solver"] == own["solver"] and p["key"] != "score/exact"]
    _bars(axes, [*constant, own], "mean_evaluations", ".--", "tab:gray", f"{own['solver']}, constant")
    _frame(axes, scores, f"mean {EVALUATIONS}", "score of step schedules")
