"""Tables in .parquet files, as `datasets` writes them, read by row group."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from typing import Any

from orthus.data.sources.files import Recent


class ParquetFiles:
    """A record is a row. A few row groups are held in memory: files with groups of some hundred rows keep that small.

    columns: those to read, of which a file may lack some; None for all.
    """

    mixed = 4

    def __init__(self, columns: Collection[str] | None = None) -> None:
        _pyarrow()
        self.columns = columns
        self._bounds: dict[str, list[int]] = {}  # per file: the row that each group begins with
        self._groups: Recent[tuple[str, int], Any] = Recent(2 * self.mixed)

    def sizes(self, path: str) -> list[int]:
        """Rows of each row group. ValueError for a file that is damaged or has no rows."""
        metadata = _open(path).metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        if not sum(sizes):
            raise ValueError(f"{path} holds no rows")
        bounds = [0]
        for size in sizes:
            bounds.append(bounds[-1] + size)
        self._bounds[path] = bounds[:-1]
        return sizes

    def read(self, path: str, row: int) -> dict[str, Any]:
        bounds = self._bounds[path]
        number = bisect_right(bounds, row) - 1
        group = self._groups.get((path, number), lambda: self._load(path, number))
        return group.slice(row - bounds[number], 1).to_pylist()[0]

    def where(self, path: str, row: int) -> str:
        return f"{path}, row {row}"

    def _load(self, path: str, number: int) -> Any:
        file = _open(path)
        names = [name for name in file.schema_arrow.names if self.columns is None or name in self.columns]
        try:
            return file.read_row_group(number, columns=names, use_threads=False)  # pyarrow's threads do not survive a fork
        except OSError as error:  # pyarrow's own errors of damaged pages
            raise ValueError(f"row group {number} of {path} is damaged: {error}") from error


def column_names(path: str) -> list[str]:
    """The columns of a file. ValueError if it cannot be read."""
    return list(_open(path).schema_arrow.names)


def _open(path: str) -> Any:
    try:
        return _pyarrow().ParquetFile(path)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"{path} cannot be read as parquet: {error}; download or write it again") from error


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("reading .parquet files needs pyarrow; pip install 'orthus[data]'") from error
    return pyarrow.parquet
