"""Folders that appear on the disk as a whole, and go as a whole: checkpoints and models."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from orthus.training.distributed import barrier, rank
from orthus.training.optim import averaged
from orthus.training.sharding import whole


def save_model(model: nn.Module, ema: dict[str, Tensor], path: str | os.PathLike[str], group: Any = None) -> None:
    """Write the model with its averaged weights through `model.save_pretrained` (safetensors), atomically; every process calls
    this, and the first one writes while the others wait, on `group` (None: all)."""
    with averaged(model, ema), whole(model) as options:
        if rank() == 0:
            write_model(model, path, **options)
    barrier(group)


def write_model(model: nn.Module, path: str | os.PathLike[str], **options: Any) -> None:
    """`model.save_pretrained(path, **options)` in this process, atomically."""
    final = Path(path)
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    cast(Any, model).save_pretrained(temporary, **options)
    publish(temporary, final)


def publish(temporary: Path, final: Path) -> None:
    """Flush a finished folder to the disk and give it its name; a folder of that name is replaced."""
    for path in (*temporary.rglob("*"), temporary):
        _fsync(path)
    if final.exists():
        replaced = _old_name(final)
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
        os.rename(temporary, final)
        shutil.rmtree(replaced)
    else:
        os.rename(temporary, final)
    _fsync(final.parent)


def discard(folder: Path) -> None:
    """Take a folder's name away, then delete it: what a kill leaves in between is not taken for a whole one. It warns where that
    fails, since nothing is lost by it."""
    try:
        os.rename(folder, _old_name(folder))
        shutil.rmtree(_old_name(folder))
    except OSError as error:
        warnings.warn(f"{folder}, which is not needed any more, could not be deleted ({error}); delete it by hand", stacklevel=2)


def remove_leftovers(parent: Path, pattern: str) -> None:
    """Delete what an earlier process began to write or to delete under names like `pattern`."""
    for ending in ("tmp", "old"):
        for leftover in parent.glob(f".{pattern}.{ending}"):
            shutil.rmtree(leftover)


def _old_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
