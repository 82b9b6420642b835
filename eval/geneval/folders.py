"""The published folder of generated pictures: `00000/metadata.jsonl`, `00000/samples/00000.png`, ... for each prompt.

`manifest.json`, where there is one, says what it must hold: {"prompt_set", "prompts_sha256", "num_samples"}.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from eval.geneval.detectors import load_picture
from eval.geneval.prompts import lines_sha256, official_lines

MANIFEST = "manifest.json"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


@dataclass(frozen=True)
class Picture:
    """`key` is the path inside the folder, such as "00000/samples/00000.png"."""

    key: str
    path: Path
    metadata: dict[str, Any]


@dataclass(frozen=True)
class PictureFolder:
    """A complete folder; `prompt_set` is "official", what the manifest says, or "unrecorded"."""

    path: Path
    pictures: Sequence[Picture]
    prompts_sha256: str
    prompt_set: str
    num_samples: int


def read_folder(folder: Path) -> PictureFolder:
    """What `folder` holds. Raises `ValueError` when prompts or pictures are missing, too many, or not those of the manifest."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one that holds 00000, 00001, ...")
    manifest = _manifest(folder)
    prompt_folders = _numbered(folder)
    lines, pictures = [], []
    num_samples = manifest.get("num_samples")
    for prompt_folder in prompt_folders:
        line, metadata = _metadata(prompt_folder / "metadata.jsonl")
        lines.append(line)
        paths = _samples(prompt_folder / "samples")
        num_samples = len(paths) if num_samples is None else num_samples
        if len(paths) != num_samples:
            raise ValueError(f"{prompt_folder} holds {len(paths)} pictures instead of {num_samples}; generate the folder again")
        pictures += [Picture(f"{prompt_folder.name}/samples/{path.name}", path, metadata) for path in paths]
    digest, official = lines_sha256(lines), lines_sha256(official_lines())
    if manifest and manifest["prompts_sha256"] != digest:
        raise ValueError(
            f"the {len(lines)} metadata.jsonl of {folder} are not those of its {MANIFEST} (sha256 {digest[:12]} instead of "
            f"{manifest['prompts_sha256'][:12]}): prompts are missing, added or changed"
        )
    prompt_set = manifest.get("prompt_set", "official" if digest == official else "unrecorded")
    if prompt_set == "official" and digest != official:
        raise ValueError(f"{folder / MANIFEST} says official, but the metadata are not those of the published prompts")
    return PictureFolder(folder, pictures, digest, prompt_set, num_samples or 0)


def check_pictures(pictures: Sequence[Picture]) -> dict[str, str]:
    """sha256 of every picture by key. Raises `ValueError` that names those that cannot be read to their end, and those that the
    run did not draw, where its answers lie beside them."""
    drawn = recorded_hashes(pictures[0].path.parents[2]) if pictures else {}
    digests, broken = {}, []
    for picture in pictures:
        try:
            content = picture.path.read_bytes()
            if not content.endswith(PNG_END):
                raise ValueError("cut short")
            load_picture(BytesIO(content))
        except (OSError, SyntaxError, ValueError) as error:
            broken.append(f"{picture.key} ({error})")
            continue
        digests[picture.key] = hashlib.sha256(content).hexdigest()
        if drawn.get(picture.key, digests[picture.key]) != digests[picture.key]:
            broken.append(f"{picture.key} (not the picture that the run drew)")
    if broken:
        raise ValueError(f"{len(broken)} damaged pictures, such as {broken[0]}; generate again, which mends them")
    return digests


def recorded_hashes(folder: Path) -> dict[str, str]:
    """sha256 of the pictures of a run of ours, by key; {} for folders of other programs. Raises `ValueError` for a run that has
    not finished."""
    if list(folder.glob("geneval*.rank*.jsonl")):
        raise ValueError(f"{folder} holds answers of an unfinished run; let the same `generate` finish it")
    found = {}
    for path in folder.glob("geneval*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            found.update({part["image"]: part["sha256"] for part in json.loads(line)["segments"] if "image" in part})
    return found


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = {name: manifest[name] for name in ("prompt_set", "prompts_sha256", "num_samples")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest ({error!r}); generate the folder again") from error
    return known


def _numbered(folder: Path) -> list[Path]:
    """The prompts' folders in order; their names must be 00000, 00001, ... without a gap."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name.isdigit())
    expected = [f"{number:05d}" for number in range(len(names))]
    if not names:
        raise ValueError(f"{folder} holds no folders 00000, 00001, ...")
    if names != expected:
        missing, other = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
        raise ValueError(f"{folder}: no folder {missing[0]}, but {other[-1]}; prompts count from 00000 without a gap")
    return [folder / name for name in names]


def _metadata(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        line = path.read_text(encoding="utf-8").rstrip("\n")
        metadata = json.loads(line)
        missing = {"tag", "prompt"} - set(metadata)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it holds one line of the prompts' metadata") from error
    if missing or not isinstance(metadata, dict):
        raise ValueError(f"{path} has no {sorted(missing)}; it holds one line of the prompts' metadata")
    return line, metadata


def _samples(folder: Path) -> list[Path]:
    """Pictures 0, 1, ... in order; anything else in the folder is refused."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing; generate the folder again")
    paths = sorted(folder.iterdir())
    strange = [path.name for path in paths if not re.fullmatch(r"[0-9]+\.png", path.name)]
    if strange:
        raise ValueError(f"{folder} holds {strange[0]!r}, which is no numbered picture; move it away")
    paths.sort(key=lambda path: int(path.stem))
    numbers = [int(path.stem) for path in paths]
    if numbers != list(range(len(paths))):
        raise ValueError(f"{folder} holds pictures {numbers} instead of 0 to {len(paths) - 1}; missing or extra ones")
    return paths
