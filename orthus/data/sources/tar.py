"""Tar shards of pictures with captions, as webdataset and img2dataset write them, read at random."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from orthus.data.sources.files import Indices, Reader

BLOCK = 512
LAYOUT = 1
COLUMNS = 7  # header of the sample's first member; offset and size of picture, text, JSON (offset 0: there is none)
PICTURES, TEXTS = ("jpg", "jpeg", "png", "webp"), ("txt", "caption")
LARGEST_NAME = 1 << 20
Member = tuple[str, int, int, int]  # name, offset of its first header, offset and size of its data


class TarShards:
    """Samples are the members with the same folder and name before the first dot: `.jpg`, `.jpeg`, `.png` or `.webp` with the
    caption in `.txt`, `.caption` or `.json`.

    needs_json: the caption is under a name of the JSON's own, so that a text file does not do.
    """

    mixed = 16

    def __init__(self, needs_json: bool = False) -> None:
        self.needs_json = needs_json
        self._read = Reader()
        self._indices = Indices(LAYOUT, COLUMNS, build_index)

    def sizes(self, path: str) -> list[int]:
        return [self._indices.length(path)]

    def read(self, path: str, row: int) -> dict[str, Any]:
        _, picture, picture_size, text, text_size, data, data_size = self._indices.row(path, row)
        record: dict[str, Any] = {}
        if data and (self.needs_json or not text):
            record = json.loads(self._read(path, data, data_size))
            if not isinstance(record, dict):
                raise ValueError(f"its .json holds a {type(record).__name__}, not an object with a caption")
        record.pop("image", None)
        if picture:
            record["image"] = self._read(path, picture, picture_size)
        if text:
            record["caption" if not self.needs_json else "txt"] = self._read(path, text, text_size).decode("utf-8-sig")
        return record

    def where(self, path: str, row: int) -> str:
        with open(path, "rb") as file:
            file.seek(self._indices.row(path, row)[0])
            try:
                member = tarfile.TarFile(fileobj=file).next()  # knows all ways in which long names are written
            except tarfile.TarError:
                member = None
        return f"shard {path}, key {sample_key(member.name)[0] if member else f'number {row}'}"


def sample_key(name: str) -> tuple[str, str]:
    """`a/b.seg.png` -> `("a/b", "seg.png")`."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


def build_index(path: str) -> np.ndarray:
    """One row of `COLUMNS` numbers per sample, from the headers alone. ValueError for an archive that is damaged or empty."""
    rows: dict[str, list[int]] = {}
    with open(path, "rb", buffering=0) as file:
        for name, header, offset, size in members(file.fileno(), path):
            key, ending = sample_key(name)
            if not key or key.endswith("/") or not ending:
                continue  # hidden files and files without an ending are no part of a sample
            row = rows.setdefault(key, [header, 0, 0, 0, 0, 0, 0])
            column = 1 if ending in PICTURES else 3 if ending in TEXTS else 5 if ending == "json" else 0
            if column and not row[column]:
                row[column : column + 2] = offset, size
    if not any(row[1] for row in rows.values()):
        raise ValueError(f"shard {path} holds no sample: there is no {', '.join(PICTURES)} member in it")
    return np.array(list(rows.values()), np.int64)


def members(number: int, path: str) -> Iterator[Member]:
    """The regular files of an uncompressed tar archive, by reading its headers only.

    The standard library's reader takes a damaged header in the middle for the end; here that is a ValueError.
    """
    length = os.fstat(number).st_size
    if length == 0:
        raise ValueError(f"shard {path} is empty (0 bytes); download or write it again")
    position, first, name, size_in_pax = 0, 0, "", -1
    while True:
        header = os.pread(number, BLOCK, position)
        if len(header) < BLOCK:
            raise ValueError(f"shard {path} is truncated: no end mark before byte {length}; download or write it again")
        if not header.rstrip(b"\0"):
            return _check_rest(number, path, position, length)
        kind, size = _checked(header, path, position)
        offset = position + BLOCK
        size = _data_size(kind, size, size_in_pax)
        if offset + size > length:
            raise ValueError(f"shard {path} is truncated: a member at byte {position} ends at {offset + size} of {length}; "
                             "download or write it again")  # fmt: skip
        position = offset + -(-size // BLOCK) * BLOCK
        if kind in b"Lx":
            long_name, size_in_pax = _extended(os.pread(number, min(size, LARGEST_NAME), offset), kind)
            name = long_name or name
        elif kind not in b"gK":
            if kind in b"07\0":
                yield name or _short_name(header), first, offset, size
            first, name, size_in_pax = position, "", -1


def _checked(header: bytes, path: str, position: int) -> tuple[bytes, int]:
    """Kind and size of a member."""
    try:
        size = _number(header[124:136])
        is_whole = _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * 32
    except ValueError:
        is_whole = False
    if not is_whole:
        raise ValueError(f"shard {path} is damaged: no valid tar header at byte {position} (a compressed archive must be "
                         "unpacked to .tar); download or write it again")  # fmt: skip
    return header[156:157], size


def _data_size(kind: bytes, size: int, size_in_pax: int) -> int:
    if kind in b"123456":  # links, folders and devices have no data
        return 0
    return size if kind in b"LxgK" or size_in_pax < 0 else size_in_pax


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # base 256, for sizes from 8 GB on
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _short_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0].decode("utf-8", "replace")
    prefix = header[345:500].split(b"\0")[0].decode("utf-8", "replace") if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _extended(data: bytes, kind: bytes) -> tuple[str, int]:
    """Name and size (-1: not said) in a GNU or pax header."""
    if kind == b"L":
        return data.split(b"\0")[0].decode("utf-8", "replace"), -1
    name, size, stream = "", -1, io.BytesIO(data)
    while digits := stream.read(1):
        while not digits.endswith(b" ") and len(digits) < 20:
            digits += stream.read(1) or b" "
        if not digits.strip().isdigit():
            break
        key, _, value = stream.read(int(digits) - len(digits)).rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "replace")
        elif key == b"size":
            size = int(value)
    return name, size


def _check_rest(number: int, path: str, position: int, length: int) -> None:
    """After the end mark come zeros only; the members of an archive appended by `cat` would be lost."""
    while position < length:
        chunk = os.pread(number, 1 << 20, position)
        if chunk.strip(b"\0"):
            raise ValueError(f"shard {path} goes on after its end mark at byte {position}: several archives in one file; "
                             "split it, or join archives with tar --concatenate")  # fmt: skip
        position += len(chunk) or length
