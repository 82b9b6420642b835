"""What `from_pretrained` adds to `transformers`' own: refusal of incomplete, misshaped, damaged and unsafe weights."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SHOWN_KEYS = 8


def refuse_pickles(name_or_path: str, subfolder: str = "") -> None:
    """ValueError for a local folder whose only weights are pickles, which can run code when they are opened."""
    folder = Path(name_or_path) / subfolder
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    found = f"only {', '.join(pickles)}, which orthus does not open because a pickle can run code" if pickles else "no weights"
    raise ValueError(f"{folder} holds {found}; save the weights as model.safetensors")


def refuse_missing_shards(name_or_path: str, subfolder: str = "") -> None:
    """ValueError for a local folder that lacks some of the weight files which its index names."""
    folder = Path(name_or_path) / subfolder
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(shards)} weight files: {', '.join(missing)}; download again")


def damaged(error: SafetensorError, name_or_path: str) -> ValueError:
    """A ValueError in place of what `safetensors` raises for a file that it cannot read."""
    return ValueError(f"{name_or_path}: a weight file is damaged or is no safetensors file ({error}); download it again")


def check_shapes(name_or_path: str, report: dict[str, Any]) -> None:
    """ValueError naming the tensors whose shapes are not those of the config."""
    wrong = sorted(report["mismatched_keys"])
    if wrong:
        shown = "; ".join(f"{key}: {tuple(found)} in the file, {tuple(wanted)} by the config" for key, found, wanted in wrong)
        raise ValueError(f"{name_or_path}: misshaped tensors ({shown}); weights and config.json do not belong together")


def check_complete(name_or_path: str, report: dict[str, Any]) -> None:
    """ValueError naming the tensors that the checkpoint lacks."""
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - SHOWN_KEYS} more" if len(missing) > SHOWN_KEYS else ""
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} tensors: {', '.join(missing[:SHOWN_KEYS])}{more}; the file is incomplete or "
            "belongs to another config (allow_missing=True starts them from random values)"
        )
