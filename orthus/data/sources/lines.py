"""Records in text files: a JSON object per line, a JSON list of objects, or a document per line; read at random."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from orthus.data.sources.files import Indices, Reader

LAYOUT = 2
COLUMNS = 3  # offset, size, and number of the line (0-based) or -1 - number of the entry of a list
BLANKS = re.compile(r"[ \t\r\n]*")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Lines:
    """`.jsonl` and `.json` (a list, or lines); of `.txt` each line is a record `{"text": line}`. Blank lines are no records."""

    mixed = 16

    def __init__(self) -> None:
        self._read = Reader()
        self._indices = Indices(LAYOUT, COLUMNS, build_index)

    def sizes(self, path: str) -> list[int]:
        return [self._indices.length(path)]

    def read(self, path: str, row: int) -> dict[str, Any]:
        offset, size, _ = self._indices.row(path, row)
        data = self._read(path, offset, size)
        if path.lower().endswith(".txt"):
            return {"text": data.decode()}
        record = json.loads(data)
        if not isinstance(record, dict):
            raise ValueError(f"a JSON {type(record).__name__}, not an object")
        return record

    def where(self, path: str, row: int) -> str:
        line = self._indices.row(path, row)[2]
        return f"{path}, line {line + 1}" if line >= 0 else f"{path}, entry {-1 - line}"


def build_index(path: str) -> np.ndarray:
    """A row of `COLUMNS` numbers per record. ValueError for a file without records or a damaged JSON list."""
    with open(path, "rb") as file:
        start = len(BYTE_ORDER_MARK) if file.read(3) == BYTE_ORDER_MARK else 0
        file.seek(start)
        while (first := file.read(1)) and first.isspace():
            pass
    is_list = first == b"[" and not path.lower().endswith(".txt")
    values = array("q")
    for offset, size, number in _entries(path) if is_list else _lines(path, start):
        values.extend((offset, size, number))
    if not values:
        raise ValueError(f"{path} holds no records; download or write it again")
    return np.frombuffer(values, np.int64).reshape(-1, COLUMNS)


def _lines(path: str, start: int) -> Iterator[tuple[int, int, int]]:
    with open(path, "rb") as file:
        offset = file.seek(start)
        for number, line in enumerate(file):
            if size := len(line.rstrip()):
                yield offset, size, number
            offset += len(line)


def _entries(path: str) -> Iterator[tuple[int, int, int]]:
    """Where the entries of a JSON list stand. In Latin-1 a character is a byte, and JSON's own signs are the same in UTF-8."""
    with open(path, "rb") as file:
        text = file.read().decode("latin-1")
    decode = json.JSONDecoder().raw_decode
    position, number = _skip(text, text.index("[") + 1), 0
    try:
        while text[position] != "]":
            _, end = decode(text, position)
            yield position, end - position, -1 - number
            position, number = _skip(text, end), number + 1
            if text[position] == ",":
                position = _skip(text, position + 1)
            elif text[position] != "]":
                raise ValueError("no comma")
    except (ValueError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON list after entry {number - 1}, near byte {position} of {len(text)}; "
                         "download or write it again") from error  # fmt: skip


def _skip(text: str, position: int) -> int:
    blanks = BLANKS.match(text, position)
    assert blanks is not None
    return blanks.end()
