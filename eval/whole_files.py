"""Writing files so that they are there whole or not at all. Imports nothing heavy, so that graders start fast."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


def write_bytes(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, after a kill as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """UTF-8, newlines as given."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Raises `ValueError` for what JSON cannot hold, such as NaN."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """A line of JSON for each record."""
    write_text(path, "".join(f"{json.dumps(record)}\n" for record in records))


def write_picture(path: Path, picture: Image) -> None:
    """As PNG."""
    write_bytes(path, png(picture))


def png(picture: Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
