"""What stands in a record: its fields under the names of its data set, and pictures as bytes or names of files."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from orthus.data.sources.settings import NAMES
from orthus.image_processing import DECODE_ERRORS, MAX_PIXELS, load_image, to_rgb

Prepare = Callable[[Image.Image], Image.Image]


class Record:
    """The fields of one record. All methods raise ValueError saying what is missing or wrong."""

    def __init__(self, values: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self.values, self.columns = values, columns

    def names(self, field: str) -> tuple[str, ...]:
        return (self.columns[field],) if field in self.columns else NAMES[field]

    def find(self, field: str) -> Any:
        """The value under the first name that has one, or None."""
        return next((self.values[name] for name in self.names(field) if self.values.get(name) is not None), None)

    def need(self, field: str) -> Any:
        value = self.find(field)
        if value is None:
            there = ", ".join(map(str, self.values)) or "nothing"
            raise ValueError(f"no {field} (looked for {', '.join(self.names(field))}; there is {there})")
        return value

    def text(self, field: str) -> str:
        return clean(self.need(field), field)

    def list(self, field: str) -> list[Any]:
        value = self.need(field)
        if not isinstance(value, list):
            raise ValueError(f"{field} is a {type(value).__name__}, not a list")
        return value


def clean(value: Any, what: str) -> str:
    """Text without blanks around it. ValueError for what is no text, is empty, or cannot be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is a {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"empty {what}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half of a character: {error}") from error
    return value.strip()


class Pictures:
    """Values of records -> pictures as `prepare` makes them (upright RGB, or already of the model's size).

    root: the folder that names start from. Calling raises ValueError for a missing, damaged, too large or outside picture.
    """

    def __init__(self, root: str | None, prepare: Prepare = to_rgb, max_pixels: int = MAX_PIXELS) -> None:
        if root is not None and not os.path.isdir(root):
            raise ValueError(f"images={root!r} is no folder; give the one that picture names start from")
        self.root, self.prepare, self.max_pixels = root, prepare, max_pixels

    def __call__(self, value: Any) -> Image.Image:
        if isinstance(value, Mapping):  # as `datasets` stores pictures
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            picture = decode(value, self.max_pixels)
        elif isinstance(value, str):
            picture = self._load(value)
        else:
            raise ValueError(f"a picture is a {type(value).__name__}, neither bytes nor the name of a file")
        prepared = self.prepare(picture)
        prepared.info = {}  # profiles and EXIF data, at times larger than the picture
        return prepared

    def _load(self, name: str) -> Image.Image:
        if self.root is None:
            raise ValueError(f"names the picture {name!r}, but `images` is not set: give the folder that names start from")
        parts = re.split(r"[/\\]", name)
        if not name or os.path.isabs(name) or parts[0] == "" or ".." in parts or ":" in parts[0]:
            raise ValueError(f"picture name {name!r} does not stay inside the folder `images`")
        return load_image(os.path.join(self.root, name), self.max_pixels)


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """As `load_image`, of a picture file in memory."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height <= max_pixels:
            image.load()
            return image.copy()  # without the file and its format
    except DECODE_ERRORS as error:
        raise ValueError(f"picture of {len(data)} bytes is damaged: {error}") from error
    raise ValueError(f"picture of {image.width} x {image.height} pixels exceeds max_pixels = {max_pixels}")
