"""Where a result comes from and what a folder of answers belongs to: settings from a command line, manifest, provenance."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

from eval.loading import require_model
from eval.whole_files import write_json
from orthus.data.world.splits import fingerprint
from orthus.training.distributed import rank
from orthus.training.settings import differences, load_settings, to_dict

T = TypeVar("T")
FileState = tuple[Path, int, int]  # and its size, and when it changed
PROVENANCE = "provenance.json"
WEIGHTS = (".safetensors", ".bin", ".pt")
DECIDING = (".json", ".model", ".txt", ".jinja", ".py")  # besides weights: configs, tokenizer, processor, code


def provenance(settings: Any, module: str = "eval.small_world") -> dict[str, Any]:
    """Where a result of `python -m module` comes from: command, commit, weights, held-out split, versions and hardware."""
    return {
        "command": f"python -m {module} " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "seed": settings.seed,
        "settings": to_dict(settings),
        "weights_sha256": weights_hash(model_folder(settings.model)),
        "held_out_fingerprint": fingerprint(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "pillow")}
        | {"python": platform.python_version()},
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, device {settings.device}",
    }


def commit() -> str:
    """Of this project's checkout, with "-dirty" where tracked files are changed; its version where it is no checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "HEAD") or f"unknown, version {version('orthus')}"
    return head + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def model_folder(name: str) -> Path:
    """The folder of a model: itself, or where the hub's files of that name lie (they are fetched if need be)."""
    if Path(name).is_dir():
        return Path(name)
    require_model(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name))


def weights_hash(folder: Path) -> str:
    """sha256 over the weight files of a model folder, in name order. Raises ValueError where there is none."""
    return _hash(_states(folder, WEIGHTS), with_names=False)


def model_hash(folder: Path) -> str:
    """sha256 over names and contents of all files that decide what a model answers: weights, configs, tokenizer, processor.
    Raises as [`weights_hash`]."""
    return _hash(_states(folder, (*WEIGHTS, *DECIDING)), with_names=True)


def _states(folder: Path, suffixes: Sequence[str]) -> tuple[FileState, ...]:
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in suffixes and path.name != "results.json"]
    if not any(path.suffix in WEIGHTS for path in paths):
        raise ValueError(f"{folder} holds no weights (*.safetensors); give the folder of a model")
    return tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


@cache
def _hash(states: tuple[FileState, ...], with_names: bool) -> str:
    """Several runs of one command are of the same model: its files are read again only when they have changed."""
    digest = hashlib.sha256()
    for path, _, _ in states:
        digest.update(f"{path.name}\n".encode() if with_names else b"")
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def check_manifest(folder: Path, settings: Any, free: Sequence[str] = ("output", "device", "mme_parser")) -> None:
    """Refuse to mix answers of other weights or settings in one folder; `free` may differ. Raises ValueError with what does."""
    kept = {name: value for name, value in to_dict(settings).items() if name not in free}
    keep_manifest(folder, {"settings": kept, "model_sha256": model_hash(model_folder(settings.model))})


def record_provenance(folder: Path, settings: Any, module: str, num_new: int) -> None:
    """Add this command to those that gave the answers in `folder`, `num_new` of them; nothing where there is none."""
    if num_new:
        write_json(folder / PROVENANCE, [*read_provenance(folder), {**provenance(settings, module), "num_answers": num_new}])


def read_provenance(folder: Path) -> list[dict[str, Any]]:
    """The commands that gave the answers in a folder; [] where nothing says so, as in folders of other programs."""
    path = folder / PROVENANCE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def source_lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Where answers come from, a line for each command that gave some."""
    lines = []
    for entry in entries:
        versions = ", ".join(f"{name} {number}" for name, number in entry["versions"].items())
        source = f"commit {entry['commit'][:12]}, weights {entry['weights_sha256'][:12]}, seed {entry['seed']}"
        lines.append(f"{entry['num_answers']} answers: {entry['command']} ({source}; {versions}; {entry['hardware']})")
    return lines


def keep_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `folder/manifest.json` in the first process. Raises ValueError, naming what differs, if there is another one."""
    path = folder / "manifest.json"
    if path.exists():
        changed = differences(json.loads(path.read_text(encoding="utf-8")), manifest)
        if changed:
            raise ValueError(f"{folder} holds answers of another run ({'; '.join(changed)}); give another output=")
    elif rank() == 0:
        write_json(path, manifest)


def from_command_line(cls: Callable[..., T], argv: Sequence[str] | None, description: str | None) -> T | None:
    """The settings of `[FILE.yaml] key=value ...`; None where help was asked for, which is printed then."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or "--help" in arguments or "-h" in arguments:
        fields = dataclasses.fields(cast("Any", cls))
        required = {field.name: "" for field in fields if field.default is dataclasses.MISSING}
        print(f"{description}\n{cls.__doc__}\n" + "\n".join(f"  {k}: {v}" for k, v in to_dict(cls(**required)).items()))
        return None
    file = os.devnull if "=" in arguments[0] else arguments.pop(0)
    return load_settings(cast("type[T]", cls), file, arguments)
