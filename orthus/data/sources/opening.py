"""Settings -> a source of examples: map-style, with memory that does not grow with its length."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, Protocol

from orthus.data.schema import BadItem, Example
from orthus.data.sources.files import expand, open_all
from orthus.data.sources.forms import Form, fields_in, form_of
from orthus.data.sources.lines import Lines
from orthus.data.sources.parquet import ParquetFiles, column_names
from orthus.data.sources.records import Pictures, Prepare, Record
from orthus.data.sources.settings import TASKS, SourceSettings
from orthus.data.sources.tar import TarShards
from orthus.image_processing import MAX_PIXELS, to_rgb

DOCUMENT_PROMPT = "generate images"  # the published `OrthusProcessor.interleaved_prompt`
ENDINGS: dict[str, tuple[str, ...]] = {
    "webdataset": (".tar", ".parquet"),
    "parquet": (".parquet",),
    "text": (".jsonl", ".json", ".txt", ".parquet"),
}
RECORDS = (".jsonl", ".json", ".parquet")


class Container(Protocol):
    """Files that hold records. `mixed`: of how many blocks items may be mixed without reading anything twice."""

    mixed: int

    def sizes(self, path: str) -> list[int]:
        """Records in each block of a file. ValueError for a damaged one."""
        ...

    def read(self, path: str, row: int) -> Mapping[str, Any]: ...

    def where(self, path: str, row: int) -> str:
        """For messages."""
        ...


class RecordSource:
    """`source[i] -> Example`, in any order, in threads and in other processes.

    Raises BadItem for an item that cannot be used: it names the file and the line or key, and what is wrong. `block_sizes` and
    `mixed` tell a mixture which items lie together.
    """

    def __init__(
        self,
        name: str,
        task: str,
        files: list[str],
        container: Container,
        form: Form,
        pictures: Pictures,
        columns: Mapping[str, str],
        allow_bad_shards: int = 0,
    ) -> None:
        self.name, self.task, self.mixed, self.columns = name, task, container.mixed, dict(columns)
        self._container, self._form, self._pictures = container, form, pictures
        self.files, sizes = open_all(files, container.sizes, allow_bad_shards)
        self.num_bad_shards = len(files) - len(self.files)
        self.block_sizes = [size for blocks in sizes for size in blocks]
        self._starts = [0]
        for blocks in sizes:
            self._starts.append(self._starts[-1] + sum(blocks))

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, index: int) -> tuple[str, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0 to {len(self) - 1} of source {self.name!r}")
        number = bisect_right(self._starts, index) - 1
        return self.files[number], index - self._starts[number]

    def __getitem__(self, index: int) -> Example:
        path, row = self._find(index)
        try:
            record = Record(self._container.read(path, row), self.columns)
            return Example(tuple(self._form(record, self._pictures)), self.task)
        except (ValueError, RecursionError, FileNotFoundError) as error:
            raise BadItem(self.name, f"{self._where(path, row)}: {error}") from error

    def _where(self, path: str, row: int) -> str:
        try:
            return self._container.where(path, row)
        except (ValueError, OSError):  # the file itself is what is wrong
            return f"{path}, item {row}"


def open_source(
    settings: SourceSettings,
    prepare: Prepare = to_rgb,
    max_pixels: int = MAX_PIXELS,
    document_prompt: str = DOCUMENT_PROMPT,
) -> RecordSource:
    """The source that the settings name; files are indexed when they are opened for the first time.

    Args:
        prepare: what is done to each picture at once, so that waiting examples are small and pictures that do not fit are bad
            items: `processor.image_processor.prepare`.
        document_prompt: what the user says before a document: `processor.interleaved_prompt`.

    Raises ValueError for no or damaged files, columns that do not fit the kind, or a setting that would have no effect.
    """
    files = expand(settings.path, ENDINGS.get(settings.kind, RECORDS))
    if len({file.lower().endswith(".parquet") for file in files}) > 1:
        raise ValueError(f"path={settings.path!r} names .parquet files among others; make them a source of their own")
    kind, container = _container(settings, files)
    form = form_of(settings, kind, document_prompt)
    pictures = Pictures(settings.images, prepare, max_pixels)
    task = settings.task or ("describe" if settings.answer == "text" else TASKS[kind])
    return RecordSource(settings.label, task, files, container, form, pictures, settings.columns, settings.allow_bad_shards)


def _container(settings: SourceSettings, files: list[str]) -> tuple[str, Container]:
    """What reads the files, and the form that their records have."""
    if not files[0].lower().endswith(".parquet"):
        return settings.kind, TarShards("caption" in settings.columns) if settings.kind == "webdataset" else Lines()
    tables = ParquetFiles()
    kind, fields = fields_in(_columns(files, settings.allow_bad_shards), settings.columns, settings.kind)
    tables.columns = {name for field in fields for name in Record({}, settings.columns).names(field)}
    return kind, tables


def _columns(files: list[str], allow_bad_shards: int) -> list[str]:
    """The columns of the first file that can be read."""
    for file in files[:allow_bad_shards]:
        try:
            return column_names(file)
        except ValueError:
            continue
    return column_names(files[min(allow_bad_shards, len(files) - 1)])
