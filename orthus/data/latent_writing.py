"""Encoding every picture of sources once; `latents.py` says how the files are laid out."""

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import save
from tqdm import tqdm

from orthus.autoencoder import Autoencoder
from orthus.data.latents import (
    AGAIN,
    DTYPES,
    MANIFEST,
    NOTES,
    PLAN,
    Shard,
    check_shard,
    describe,
    identity,
    read_plan,
    refuse_other,
    shards_of,
)
from orthus.data.schema import BadItem, batches, pictures_of
from orthus.data.sources import RecordSource, SourceSettings
from orthus.image_processing import OrthusImageProcessor

Found = list[Image.Image] | BadItem
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """output: folder of the cache. dtype: what latents are rounded to.
    items_per_shard: of a source; a shard is held in memory. batch_size: pictures that are encoded at once."""

    output: str
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    items_per_shard: int = 512
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        if min(self.items_per_shard, self.batch_size) < 1:
            raise ValueError(f"{self.items_per_shard=}, {self.batch_size=}; each must be at least 1")


def make_plan(
    settings: CacheSettings,
    chosen: Sequence[SourceSettings],
    sources: Sequence[RecordSource],
    autoencoder: Autoencoder,
    images: OrthusImageProcessor,
) -> dict[str, Any]:
    """What is to be in the cache; the same in every process."""
    entries = [describe(one, source) for one, source in zip(chosen, sources, strict=True)]
    options = {"dtype": settings.dtype, "items_per_shard": settings.items_per_shard}
    return {**identity(autoencoder, images), **options, "sources": entries}


class LatentWriter:
    """Writes shards `rank, rank + world_size, ...` of all shards that the plan names, those that are there already left out.

    A shard is a pure function of its items, whichever process writes it, and stands there whole or not at all: processes may be
    killed at any time and started again in any number.
    """

    def __init__(
        self,
        settings: CacheSettings,
        plan: dict[str, Any],
        sources: Sequence[RecordSource],
        autoencoder: Autoencoder,
        images: OrthusImageProcessor,
    ) -> None:
        self.folder, self.plan, self.sources = Path(settings.output), plan, list(sources)
        self.autoencoder, self.images, self.batch_size = autoencoder.eval(), images, settings.batch_size
        self.dtype = DTYPES[plan["dtype"]]
        self.shards = [
            (source, shard) for number, source in enumerate(self.sources) for shard in shards_of(self.folder, plan, number)
        ]

    def run(self, rank: int = 0, world_size: int = 1, num_threads: int = 0) -> dict[str, Any] | None:
        """The manifest, if all shards are there at the end: those of slower processes may not be.

        Raises ValueError if the folder has another plan, or for latents that `dtype` cannot hold, OSError when the disk is full.
        """
        self._begin()
        mine = self.shards[rank::world_size]
        remove_leftovers([shard.path for _, shard in mine])
        missing = [(source, shard) for source, shard in mine if not self._is_written(shard)]
        num_items = sum(shard.stop - shard.first for _, shard in missing)
        threads = ThreadPoolExecutor(num_threads) if num_threads else None
        with threads or nullcontext(), tqdm(total=num_items, desc="items", unit="", disable=rank > 0) as bar:
            read_all = map if threads is None else threads.map
            num_bad = 0
            for source, shard in missing:
                data, found_bad = self._encoded(source, shard, read_all, bar)
                write(shard.path, data)
                num_bad += found_bad
                bar.set_postfix({"bad": num_bad}, refresh=False)
        return self._finish()

    def _begin(self) -> None:
        """Leave the plan in the folder, or compare it with the one that is there."""
        path = self.folder / PLAN
        if not path.exists():
            others = [name for name in os.listdir(self.folder) if name[0] != "."] if self.folder.is_dir() else []
            if others and not path.exists():  # which another process may have written by now
                raise ValueError(f"output = {str(self.folder)!r} holds {others[0]!r} but no {PLAN}; give a new folder")
            write(path, as_json(self.plan))
        there = read_plan(path)
        where, remedy = f"{path}: the cache", "go on with the same settings and data, or give another output"
        names = [[entry["name"] for entry in plan["sources"]] for plan in (there, self.plan)]
        refuse_other({**there, "sources": names[0]}, {**self.plan, "sources": names[1]}, where, remedy)
        for old, new in zip(there["sources"], self.plan["sources"], strict=True):
            refuse_other(old, new, f"{where} of source {new['name']!r}", remedy)

    def _is_written(self, shard: Shard) -> bool:
        try:
            check_shard(shard, self.plan)
        except ValueError as error:
            if shard.path.exists():
                tqdm.write(f"writing a shard again: {error}")
            return False
        return True

    def _encoded(self, source: RecordSource, shard: Shard, read_all: Any, bar: Any) -> tuple[bytes, int]:
        """A shard as the bytes of its file, and how many of its items cannot be used."""
        bad: dict[str, str] = {}
        starts = [0]

        def pictures() -> Iterator[Image.Image]:
            for first in range(shard.first, shard.stop, self.batch_size):
                chunk = range(first, min(first + self.batch_size, shard.stop))
                for index, found in zip(chunk, read_all(reader(source), chunk), strict=True):
                    if isinstance(found, BadItem):
                        bad[str(index - shard.first)] = found.reason
                        found = []
                    starts.append(starts[-1] + len(found))
                    yield from found
                bar.update(len(chunk))

        parts = [self._encode(batch, shard) for batch in batches(pictures(), self.batch_size)]
        empty = torch.empty(0, self.plan["num_latents"], self.plan["latent_dim"], dtype=self.dtype)
        notes = {"first": shard.first, "stop": shard.stop, "num_pictures": starts[-1], "bad": bad}
        notes["autoencoder_sha256"] = self.plan["autoencoder_sha256"]
        # A single entry of metadata: safetensors writes several in an order that changes.
        tensors = {"latents": torch.cat([empty, *parts]), "starts": torch.tensor(starts)}
        return save(tensors, {NOTES: json.dumps(notes)}), len(bad)

    @torch.no_grad()
    def _encode(self, pictures: list[Image.Image], shard: Shard) -> torch.Tensor:
        latents = self.autoencoder.encode(self.images.pixel_values(pictures)).to("cpu", self.dtype)  # (N, L, C)
        if not latents.isfinite().all():
            name = self.plan["dtype"]
            raise ValueError(f"latents of items {shard.first} to {shard.stop - 1} for {shard.path} are not finite as {name}; "
                             "use dtype=bfloat16 or float32, or look at the autoencoder's weights")  # fmt: skip
        return latents

    def _finish(self) -> dict[str, Any] | None:
        entries = [{**entry, "num_pictures": 0, "num_bad": 0} for entry in self.plan["sources"]]
        for number, entry in enumerate(entries):
            for shard in shards_of(self.folder, self.plan, number):
                try:
                    notes = check_shard(shard, self.plan)
                except ValueError:  # another process is to write it
                    return None
                entry["num_pictures"] += notes["num_pictures"]
                entry["num_bad"] += len(notes["bad"])
        manifest = {**self.plan, "sources": entries}
        write(self.folder / MANIFEST, as_json(manifest))
        return manifest


def reader(source: RecordSource) -> Callable[[int], Found]:
    """Index -> the pictures of an item in reading order, or what is wrong with it."""

    def read(index: int) -> Found:
        try:
            return pictures_of(source[index])
        except BadItem as bad:
            return bad

    return read


# -- files ---------------------------------------------------------------------------------------------------------


def as_json(plan: dict[str, Any]) -> bytes:
    return json.dumps(plan, indent=1).encode()


def write(path: Path, data: bytes) -> None:
    """All of a file in one move. Raises OSError, with nothing left behind, where the disk is full or cannot be written."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            message = f"the disk is full: {len(data)} bytes for {path} do not fit; make room and {AGAIN}"
            raise OSError(error.errno, message) from error
        raise


def remove_leftovers(paths: Sequence[Path]) -> None:
    """Parts of these files that a killed process left behind."""
    names = {str(path) for path in paths}
    for folder in {path.parent for path in paths}:
        for part in folder.glob(".*.tmp") if folder.is_dir() else ():
            whole = part.name[1:].rsplit(".", 2)[0]
            if str(folder / whole) in names:
                part.unlink(missing_ok=True)
