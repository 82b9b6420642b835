"""Metrics of a run: one JSON object per logged step, appended to `metrics.jsonl`, and a picture of its curves."""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NOT_CURVES = ("step", "seconds", "eval/seconds")


class MetricsLog:
    """Appends to a JSON-lines file; each line reaches the operating system at once, so a kill loses at most one. Where
    TensorBoard is installed, its files are written beside, in `tensorboard/`. To be closed, as a context, when the run ends;
    wandb is told where an error has ended it."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resumed_step: int = 0,
        tracker: str = "no",
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Open `path` for a run that goes on from `resumed_step`: later lines, and a half-written one, are dropped. `tracker`
        gets all lines too, and `settings` once; see [`open_tracker`]."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.board: Any = None
        if self.path.exists():
            kept = [record for record in read_metrics(self.path) if record["step"] <= resumed_step]
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            with self._disk():
                temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
                os.replace(temporary, self.path)
        self.tracker = open_tracker(tracker, self.path.parent, settings or {})
        self.failure = {"exit_code": 1} if tracker == "wandb" else {}  # for `finish`
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it must hold `step`. OSError on a full disk."""
        assert "step" in record, record
        with self._disk(), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.board is not None:
            for name, value in record.items():
                self.board.add_scalar(name, value, record["step"])
            self.board.flush()
        if self.tracker is not None:
            self.tracker.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.board is not None:
            self.board.close()
        if self.tracker is not None:
            self.tracker.finish(**(self.failure if error is not None else {}))

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """In which an OSError says what could not be written, and what helps."""
        try:
            yield
        except OSError as error:
            raise OSError(f"{self.path} could not be written ({error}); if its disk is full, free space; the same command goes "
                          "on from the newest checkpoint") from error  # fmt: skip


def open_tracker(name: str, folder: Path, settings: dict[str, Any]) -> Any:
    """The package "wandb" or "trackio" with a run begun in it, or gone on with where `folder` has one; None for "no".

    The project is that of WANDB_PROJECT or TRACKIO_PROJECT in the environment, else "orthus". ImportError without the package.
    After a crash a run goes on from its newest checkpoint, and the tracker gets the steps since then once more.
    """
    if name == "no":
        return None
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"run.tracker={name} needs the package: pip install {name}, or set run.tracker=no") from error
    mark = folder / f"{name}-run"
    if not mark.exists():
        mark.write_text(uuid.uuid4().hex, encoding="utf-8")
    identity = mark.read_text(encoding="utf-8")
    options = {"id": identity, "dir": str(folder)} if name == "wandb" else {}
    project = os.environ.get(f"{name.upper()}_PROJECT", "orthus")
    run_name = f"{folder.resolve().name}-{identity[:8]}"
    package.init(project=project, name=run_name, config=settings, resume="allow", **options)
    return package


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
    """Draw every metric of `path` (a metrics.jsonl) against the step, held-out losses beside their own; returns the PNG.

    Needs matplotlib (`pip install orthus[train]`). Raises ValueError if there is nothing to draw.
    """
    from matplotlib.figure import Figure

    records = read_metrics(path)
    found = list(dict.fromkeys(name for record in records for name in record if name not in NOT_CURVES))
    names = [name for name in found if name.removeprefix("eval/") == name or name.removeprefix("eval/") not in found]
    if not names:
        raise ValueError(f"{path} holds {len(records)} records and no metric; let the run reach its first log step")
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        curves = [curve for curve in (name, f"eval/{name}") if curve in found]
        for curve in curves:
            points = [(record["step"], record[curve]) for record in records if curve in record]
            axes.plot(*zip(*points, strict=True), linewidth=1, label=curve, marker="." if curve.startswith("eval/") else None)
        if len(curves) > 1:
            axes.legend()
        axes.set_title(name)
        axes.set_xlabel("step")
        values = [record[curve] for record in records for curve in curves if curve in record]
        if name.startswith(("loss", "eval/loss")) and min(values) > 0:
            axes.set_yscale("log")
    target = Path(path).with_suffix(".png")
    figure.savefig(target, dpi=110)
    return target
