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
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

from eval.whole_files import write_json
from orthus.data.world.splits import fingerprint
from orthus.training.distributed import rank
from orthus.training.settings import differences, load_settings, to_dict

T = TypeVar("T")


def provenance(settings: Any, module: str = "eval.small_world") -> dict[str, Any]:
    """Where a result of `python -m module` comes from: command, commit, weights, held-out split, versions and hardware."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "command": f"python -m {module} " + " ".join(sys.argv[1:]),
        "commit": git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "seed": settings.seed,
        "settings": to_dict(settings),
        "weights_sha256": weights_hash(model_folder(settings.model)),
        "held_out_fingerprint": fingerprint(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "pillow")}
        | {"python": platform.python_version()},
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, device {settings.device}",
    }


def model_folder(name: str) -> Path:
    """The folder of a model: itself, or where the hub's files of that name lie (they are fetched if need be)."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name))


def weights_hash(folder: Path) -> str:
    """sha256 over the weight files of a model folder, in name order."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def check_manifest(folder: Path, settings: Any, free: Sequence[str] = ("output", "device", "mme_parser")) -> None:
    """Refuse to mix answers of other weights or settings in one folder; `free` may differ. Raises ValueError with what does."""
    kept = {name: value for name, value in to_dict(settings).items() if name not in free}
    keep_manifest(folder, {"settings": kept, "weights_sha256": weights_hash(model_folder(settings.model))})


def read_provenance(folder: Path) -> dict[str, Any]:
    """Where the answers in a folder come from; {} where nothing says so, as in folders of other programs."""
    path = folder / "provenance.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


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
