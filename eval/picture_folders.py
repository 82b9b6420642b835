"""Folders of pictures with or without prompts: a flat folder, or GenEval's (00000/metadata.jsonl, 00000/samples/*.png)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from orthus.image_processing import load_image, to_rgb

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class PictureFile:
    path: Path
    prompt: str | None

    def open(self) -> Image.Image:
        """Upright RGB. Raises ValueError, naming the file, for a damaged one."""
        try:
            return to_rgb(load_image(self.path))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}; replace it, a mean over the other pictures is another number") from error


def opened(files: Sequence[PictureFile]) -> Iterator[Image.Image]:
    for file in files:
        yield file.open()


def read_folder(folder: str | Path, prompts: str | Path | None = None) -> list[PictureFile]:
    """The pictures of a folder in the order of their names.

    prompts: of a flat folder: a text file with one line per picture, in the order of the names, or a JSON object from file name
        to prompt. In GenEval's layout each metadata.jsonl names the prompt.
    Raises FileNotFoundError for a missing folder or file, and ValueError, naming the place, if there is no picture, if prompts
    and pictures do not match one to one, or if GenEval's folders do not all hold the same number of pictures.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {str(folder)!r}")
    numbered = sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name.isdigit())
    flat = _pictures(folder)
    if numbered and flat:
        raise ValueError(f"{folder} holds both pictures and numbered folders; keep one layout to a folder")
    if numbered:
        if prompts is not None:
            raise ValueError(f"{folder} names its prompts itself (metadata.jsonl); leave the prompt file {prompts} out")
        return _geneval(numbered)
    if not flat:
        raise ValueError(f"{folder} holds no picture ({', '.join(SUFFIXES)}) and no numbered folder of GenEval's layout")
    texts: Sequence[str | None] = [None] * len(flat) if prompts is None else _prompts(Path(prompts), flat)
    return [PictureFile(path, text) for path, text in zip(flat, texts, strict=True)]


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def _geneval(numbered: Sequence[Path]) -> list[PictureFile]:
    files: list[PictureFile] = []
    counts: dict[int, str] = {}
    for place in numbered:
        metadata, samples = place / "metadata.jsonl", place / "samples"
        if not metadata.is_file() or not samples.is_dir():
            raise ValueError(f"{place} lacks metadata.jsonl or samples/; finish it or take the folder away")
        record = json.loads(metadata.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ValueError(f'{metadata} has no "prompt"; write the line of evaluation_metadata.jsonl there')
        found = _pictures(samples)
        counts.setdefault(len(found), place.name)
        files += [PictureFile(path, record["prompt"]) for path in found]
    if len(counts) > 1 or 0 in counts:
        shown = ", ".join(f"{number} in {name}" for number, name in sorted(counts.items()))
        raise ValueError(f"the folders of {numbered[0].parent} hold different numbers of pictures ({shown}); finish the run")
    return files


def _prompts(path: Path, pictures: Sequence[Path]) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        by_name = json.loads(text)
        if not isinstance(by_name, dict) or not all(isinstance(value, str) for value in by_name.values()):
            raise ValueError(f"{path} is not a JSON object from file name to prompt")
        names = {picture.name for picture in pictures}
        if set(by_name) != names:
            odd = sorted(set(by_name) ^ names)
            raise ValueError(f"{path} and the folder differ in {len(odd)} names, such as {odd[0]!r}; name each picture once")
        return [by_name[picture.name] for picture in pictures]
    lines = text.splitlines()
    empty = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    if empty:
        raise ValueError(f"{path}: line {empty[0]} is empty; give one prompt a line")
    if len(lines) != len(pictures):
        raise ValueError(f"{path} has {len(lines)} prompts for {len(pictures)} pictures; give one a picture, in name order")
    return lines
