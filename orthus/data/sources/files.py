"""Files of a source: which they are, reading at an offset, and indices that are built once and kept beside them."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

K = TypeVar("K")
V = TypeVar("V")
INDEX_VERSION = 1
OPEN_FILES = 48
BRACES = re.compile(r"\{([^{}]+)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Recent(Generic[K, V]):
    """The `size` values made last. Safe in threads without a lock: at worst a value is made twice. Pickles empty."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: dict[K, V] = {}

    def get(self, key: K, make: Callable[[], V]) -> V:
        if (known := self._values.get(key)) is not None:
            return known
        value = self._values[key] = make()
        for oldest in list(self._values)[: -self.size]:
            self._values.pop(oldest, None)
        return value

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple[type[Recent], tuple[int]]:
        return Recent, (self.size,)


class Reader:
    """Reads bytes at an offset of any of many files, of which a few are open. For threads, forks and pickling."""

    def __init__(self) -> None:
        self._open: Recent[str, FileIO] = Recent(OPEN_FILES)

    def __call__(self, path: str, offset: int, size: int) -> bytes:
        """Raises ValueError where the file ends before."""
        file = self._open.get(path, lambda: open(path, "rb", buffering=0))  # closes when its last user lets it go
        number = file.fileno()
        data = os.pread(number, size, offset)
        while len(data) < size:  # a read of over 2 GB, or a network file system
            more = os.pread(number, size - len(data), offset + len(data))
            if not more:
                raise ValueError(f"{path} ends at byte {offset + len(data)}, inside an item: it changed after it was indexed")
            data += more
        return data


# -- which files ---------------------------------------------------------------------------------------------------


def expand(path: str, endings: Sequence[str]) -> list[str]:
    """The files that a path, folder, glob or brace pattern names, sorted. ValueError if it names none."""
    if os.path.isdir(path):
        found = sorted(str(file) for file in Path(path).rglob("*") if file.suffix.lower() in endings and file.is_file())
        if not found:
            raise ValueError(f"folder {path} holds no {' or '.join(endings)} file; check path and kind")
        return found
    patterns = [path] if os.path.exists(path) else _braces(path)
    found = []
    for pattern in patterns:
        found += sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not os.path.exists(pattern) else [pattern]
    if not found:
        raise ValueError(f"path={path!r} matches no file; check it")
    for file in found:
        if Path(file).suffix.lower() not in endings:
            raise ValueError(f"{file} does not end in {' or '.join(endings)}; check path and kind, unpack compressed files")
    return list(dict.fromkeys(found))


def _braces(path: str) -> list[str]:
    choices: list[list[str]] = []
    last = 0
    for match in BRACES.finditer(path):
        span = RANGE.fullmatch(match[1])
        options = match[1].split(",")
        if span:
            first, final, width = int(span[1]), int(span[2]), len(span[1])
            if final < first:
                raise ValueError(f"path={path!r}: the range {match[0]} counts down; write the smaller number first")
            options = [f"{number:0{width}d}" for number in range(first, final + 1)]
        choices += [[path[last : match.start()]], options]
        last = match.end()
    return ["".join(parts) for parts in itertools.product(*choices, [path[last:]])]


def open_all(files: Sequence[str], measure: Callable[[str], list[int]], allowed: int) -> tuple[list[str], list[list[int]]]:
    """The good ones of `files` and what `measure` says of each.

    Raises ValueError when it raises ValueError or OSError for more than `allowed` of them; up to there it is a warning.
    """
    good, sizes, bad = [], [], []
    for file in files:
        try:
            sizes.append(measure(file))
            good.append(file)
        except (ValueError, OSError) as error:
            bad.append(str(error))
            if len(bad) > allowed:
                more = f"{len(bad)} damaged files are more than allow_bad_shards = {allowed}; " if allowed else ""
                hint = "replace the file or take it out of path, or raise allow_bad_shards to leave it out"
                raise ValueError(f"{more}{error}; {hint}") from error
    if bad:
        warnings.warn(f"left out {len(bad)} of {len(files)} files: {'; '.join(bad)}", stacklevel=2)
    if not good:
        raise ValueError(f"all {len(files)} files are damaged: {bad[0]}")
    return good, sizes


# -- indices -------------------------------------------------------------------------------------------------------


def index_of(path: str, layout: int, num_columns: int, build: Callable[[str], np.ndarray]) -> np.ndarray:
    """What `build(path)` returns, `(items, num_columns)` int64, from a file beside `path` if that is up to date.

    The index is mapped into memory, not read. It belongs to a size and time of change of `path`, and is written in one move, so
    that processes may build it at once. Where it cannot stand beside `path` it stands in the user's cache folder.
    """
    stamp = _stamp(path, layout, num_columns)
    places = _places(path)
    for place in places:
        values = _load(place, stamp)
        if values is not None:
            return values
    values = build(path)
    assert values.ndim == 2 and values.shape[1] == num_columns, values.shape
    if _stamp(path, layout, num_columns) != stamp:
        raise ValueError(f"{path} changed while it was indexed; wait until it is written")
    for place in places:
        if _save(place, stamp, values):
            return values if (loaded := _load(place, stamp)) is None else loaded
    warnings.warn(f"cannot keep the index of {path} in {places[0]} or {places[1]}: it stays in memory", stacklevel=2)
    return values


class Indices:
    """Rows of the indices of many files, of which some are mapped at a time; see `index_of`."""

    def __init__(self, layout: int, num_columns: int, build: Callable[[str], np.ndarray]) -> None:
        self.layout, self.num_columns, self.build = layout, num_columns, build
        self._recent: Recent[str, np.ndarray] = Recent(OPEN_FILES)

    def length(self, path: str) -> int:
        return len(index_of(path, self.layout, self.num_columns, self.build))

    def row(self, path: str, row: int) -> list[int]:
        index = self._recent.get(path, lambda: index_of(path, self.layout, self.num_columns, self.build))
        if row >= len(index):
            raise ValueError(f"{path} holds {len(index)} items now, fewer than when it was opened")
        return index[row].tolist()


def _stamp(path: str, layout: int, num_columns: int) -> list[int]:
    status = os.stat(path)
    return [INDEX_VERSION, layout, num_columns, status.st_size, status.st_mtime_ns]


def _places(path: str) -> list[Path]:
    full = os.path.realpath(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "orthus" / "indices"
    return [Path(f"{full}.index.npy"), cache / f"{hashlib.blake2b(full.encode(), digest_size=16).hexdigest()}.npy"]


def _load(place: Path, stamp: list[int]) -> np.ndarray | None:
    try:
        values = np.load(place, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_ours = values.dtype == np.int64 and values.ndim == 1 and values[: len(stamp)].tolist() == stamp
    num_columns = stamp[2]
    if not is_ours or (len(values) - len(stamp)) % num_columns:
        return None
    return values[len(stamp) :].reshape(-1, num_columns)


def _save(place: Path, stamp: list[int], values: np.ndarray) -> bool:
    temporary = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=f".{place.name}.", delete=False) as file:
            temporary = file.name
            np.save(file, np.concatenate([np.asarray(stamp, np.int64), values.ravel()]))
        os.chmod(temporary, 0o644)
        os.replace(temporary, place)
    except OSError:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        return False
    return True
