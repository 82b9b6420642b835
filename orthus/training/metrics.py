"""Metrics of a run: one JSON object per logged step, appended to `metrics.jsonl`, and a picture of its curves."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

NOT_CURVES = ("step", "seconds")


class MetricsLog:
    """Appends to a JSON-lines file; each line reaches the operating system at once, so a kill loses at most one. Where
    TensorBoard is installed, its files are written beside, in `tensorboard/`."""

    def __init__(self, path: str | os.PathLike[str], *, resumed_step: int = 0) -> None:
        """Open `path` for a run that goes on from `resumed_step`: later lines, and a half-written one, are dropped."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.board: Any = None
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=resumed_step + 1)
        if self.path.exists():
            kept = [record for record in read_metrics(self.path) if record["step"] <= resumed_step]
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            os.replace(temporary, self.path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it must hold `step`."""
        assert "step" in record, record
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.board is not None:
            for name, value in record.items():
                self.board.add_scalar(name, value, record["step"])
            self.board.flush()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every whole record of the file. Raises ValueError for a broken line that is not the last one."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for i, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if i < len(lines) - 1:
                raise ValueError(f"{path}, line {i + 1} is not JSON: {line[:80]!r}; repair or delete it") from error
    return records


def plot_curves(path: str | os.PathLike[str]) -> Path:
    """Draw every metric of `path` (a metrics.jsonl) against the step; returns the PNG beside it.

    Needs matplotlib (`pip install orthus[train]`). Raises ValueError if there is nothing to draw.
    """
    from matplotlib.figure import Figure

    records = read_metrics(path)
    names = list(dict.fromkeys(name for record in records for name in record if name not in NOT_CURVES))
    if not names:
        raise ValueError(f"{path} holds {len(records)} records and no metric; let the run reach its first log step")
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        points = [(record["step"], record[name]) for record in records if name in record]
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set_title(name)
        axes.set_xlabel("step")
        if name.startswith("loss") and min(value for _, value in points) > 0:
            axes.set_yscale("log")
    target = Path(path).with_suffix(".png")
    figure.savefig(target, dpi=110)
    return target
