"""What the benchmark commands share. Imports nothing heavy before a model is needed, so that graders start fast."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def command_of(module: str) -> str:
    """The command line as a user would repeat it."""
    return f"python -m {module} " + " ".join(sys.argv[1:])


def shard() -> tuple[int, int]:
    """This process's number and how many there are, from torchrun's environment."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def with_default_command(argv: Sequence[str]) -> list[str]:
    """`run` before arguments that begin with settings: a YAML file or `key=value`."""
    is_settings = bool(argv) and not argv[0].startswith("-") and (argv[0].endswith((".yaml", ".yml")) or "=" in argv[0])
    return ["run", *argv] if is_settings else list(argv)


def from_command_line(cls: Callable[..., T], argv: Sequence[str], description: str | None) -> T | None:
    """As [`eval.provenance.from_command_line`]."""
    from eval import provenance

    return provenance.from_command_line(cls, argv, description)


def generate(
    cls: Callable[..., T],
    argv: Sequence[str],
    description: str,
    ask: Callable[[Any, Any, T], Any],
    then: Callable[[T], Any] | None = None,
) -> T | None:
    """Read the settings of `argv`, load their model, `ask` it, and do what comes `then`, in every process that torchrun started;
    returns when all are done. None after --help."""
    settings: Any = from_command_line(cls, argv, description)
    if settings is None:
        return None
    from eval.loading import load
    from orthus.training.distributed import barrier, joined

    with joined(settings.loading.device):
        ask(*load(settings.model, settings.loading), settings)
        if then is not None:
            then(settings)
        barrier()
    return settings
