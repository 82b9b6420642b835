"""Latents of the pictures of sources, encoded once and kept in files: how they are laid out, and reading them in training.

A cache is a folder that `train.cache_latents` writes. `plan.json` says what is to be in it, `manifest.json` the same with counts,
once all is there. Source n has its shards in the folder `n`, each of the same number of items; a shard holds `latents (P, L, C)`
of all pictures of these items in reading order, `starts (items + 1,)`, the row where the pictures of each item begin, and in its
metadata the items that cannot be used, with the reason.
"""

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from orthus.autoencoder import Autoencoder
from orthus.data.schema import BadItem, Example, ExampleSource, pictures_of
from orthus.data.sources import RecordSource, SourceSettings
from orthus.data.sources.files import Recent
from orthus.image_processing import OrthusImageProcessor, remember_latents

FORMAT_VERSION = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # in the headers of safetensors
PLAN, MANIFEST, NOTES = "plan.json", "manifest.json", "orthus"
OPEN_SHARDS = 128
ANOTHER = "write a cache for this model and data (python -m train.cache_latents, another output), or leave data.latents out"
AGAIN = "run the command that wrote the cache again: it goes on with what is missing"


@dataclass(frozen=True)
class Shard:
    """Items `first` to `stop` (excluded) of a source."""

    path: Path
    first: int
    stop: int


# -- what a cache is of --------------------------------------------------------------------------------------------


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and values of all tensors; the same whether 16-bit weights were loaded in 16 or 32 bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def identity(autoencoder: Autoencoder, images: OrthusImageProcessor) -> dict[str, Any]:
    """What latents depend on besides the pictures."""
    config = autoencoder.config
    return {
        "format_version": FORMAT_VERSION,
        "image_size": config.image_size,
        "num_latents": config.num_latents,
        "latent_dim": config.latent_dim,
        "autoencoder_sha256": weights_hash(autoencoder),
        "image_processor": {
            "size": images.size, "crop_size": images.crop_size, "resample": images.resample, "max_pixels": images.max_pixels,
            "rescale_factor": images.rescale_factor, "image_mean": images.image_mean, "image_std": images.image_std,
        },
    }  # fmt: skip


def describe(settings: SourceSettings, source: RecordSource) -> dict[str, Any]:
    """What tells a source from another one, its files included. Pictures that lie beside the records are not looked at."""
    files = [(os.path.abspath(file), os.stat(file)) for file in source.files]
    return {
        "name": source.name,
        "kind": settings.kind,
        "path": os.path.abspath(settings.path),
        "images": None if settings.images is None else os.path.abspath(settings.images),
        "columns": dict(settings.columns),
        "answer": settings.answer,
        "files": [[file, status.st_size, status.st_mtime_ns] for file, status in files],
        "num_items": len(source),
    }


def refuse_other(there: Mapping[str, Any], here: Mapping[str, Any], where: str, remedy: str = ANOTHER) -> None:
    """Raises ValueError naming the first of the values of `here` that is another one in the cache."""
    for key, value in here.items():
        found = there.get(key)
        if found == value:
            continue
        if key == "files":
            pairs = zip_longest(found or [], value)
            found, value = next(pair for pair in pairs if pair[0] != pair[1])
        raise ValueError(f"{where} was written for {key} = {found!r}, and here it is {value!r}; {remedy}")


# -- files ---------------------------------------------------------------------------------------------------------


def read_plan(path: Path) -> dict[str, Any]:
    """A plan or manifest. ValueError for one that is damaged, or of a version or dtype that this code does not know."""
    try:
        plan = json.loads(path.read_bytes())
        version, dtype = plan["format_version"], plan["dtype"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove its folder and write the cache again") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version = {version!r}, this code reads {FORMAT_VERSION}; write the cache again")
    if dtype not in DTYPES:
        raise ValueError(f"{path} has dtype = {dtype!r}; known are {', '.join(DTYPES)}: write the cache again")
    return cast(dict[str, Any], plan)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache. ValueError where there is none, and as `read_plan`."""
    if not (folder / MANIFEST).is_file():
        state = f"is not finished: {AGAIN}" if (folder / PLAN).is_file() else f"is no cache of latents: {ANOTHER}"
        raise ValueError(f"data.latents = {str(folder)!r} {state}")
    return read_plan(folder / MANIFEST)


def shards_of(folder: Path, plan: Mapping[str, Any], number: int) -> list[Shard]:
    """All shards of source `number`."""
    num_items, size = plan["sources"][number]["num_items"], plan["items_per_shard"]
    starts = range(0, num_items, size)
    place = folder / f"{number:03d}"
    return [Shard(place / f"{n:06d}.safetensors", first, min(first + size, num_items)) for n, first in enumerate(starts)]


def check_shard(shard: Shard, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a shard notes of itself, from its header. ValueError for one that is missing, truncated or of another cache."""
    if not shard.path.is_file():
        raise ValueError(f"shard {shard.path} of the latents is missing; {AGAIN}")
    try:
        with safe_open(shard.path, "pt") as file:
            notes = json.loads(file.metadata()[NOTES])
            slices = {name: file.get_slice(name) for name in ("latents", "starts")}
            found = {name: [part.get_dtype(), *part.get_shape()] for name, part in slices.items()}
            num_pictures = notes["num_pictures"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        size = shard.path.stat().st_size
        raise ValueError(f"shard {shard.path} of {size} bytes is truncated or damaged: {error}; {AGAIN}") from error
    here = {"first": shard.first, "stop": shard.stop, "autoencoder_sha256": plan["autoencoder_sha256"]}
    refuse_other(notes, here, f"shard {shard.path}", f"it is of another cache: delete it and {AGAIN}")
    latents = [STORED[plan["dtype"]], num_pictures, plan["num_latents"], plan["latent_dim"]]
    tensors = {"latents": latents, "starts": ["I64", shard.stop - shard.first + 1]}
    refuse_other(found, tensors, f"shard {shard.path}", f"delete it and {AGAIN}")
    return cast(dict[str, Any], notes)


class _OpenShard:
    """A mapped shard: `shard[k]` are the latents `(n, L, C)` of its item k, or the reason why it cannot be used."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, "pt")
        self._bad = json.loads(self._file.metadata()[NOTES])["bad"]
        self._starts = self._file.get_tensor("starts").tolist()

    def __getitem__(self, place: int) -> torch.Tensor | str:
        if (reason := self._bad.get(str(place))) is not None:
            return cast(str, reason)
        return cast(torch.Tensor, self._file.get_slice("latents")[self._starts[place] : self._starts[place + 1]])


# -- in training ---------------------------------------------------------------------------------------------------


def undecoded(value: Any) -> Image.Image:
    """Stands in for a picture whose latents are known. It has no pixels, so that nothing can encode it by mistake."""
    return Image.new("RGB", (0, 0))


class CachedSource:
    """A source whose pictures are not decoded: each is a stand-in with its latents, for the processor whose word `owner` is.

    Items that could not be used when the cache was written are BadItem without being looked at. Raises ValueError for an
    item that has more or fewer pictures now.
    """

    def __init__(self, source: RecordSource, shards: Sequence[Shard], owner: str) -> None:
        self.name, self.block_sizes, self.mixed = source.name, source.block_sizes, source.mixed
        self._texts, self._shards, self._owner = copy.copy(source), list(shards), owner
        self._texts._pictures = cast(Any, undecoded)
        self._open: Recent[Path, _OpenShard] = Recent(OPEN_SHARDS)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0 to {len(self) - 1} of source {self.name!r}")
        shard = self._shards[index // self._shards[0].stop]
        found = self._open.get(shard.path, lambda: _OpenShard(shard.path))[index - shard.first]
        if isinstance(found, str):
            raise BadItem(self.name, found)
        example = self._texts[index]
        pictures = pictures_of(example)
        if len(pictures) != len(found):
            raise ValueError(
                f"item {index} of source {self.name!r} has {len(pictures)} pictures, its latents are of {len(found)}; {ANOTHER}"
            )
        for picture, latents in zip(pictures, found, strict=True):
            remember_latents(picture, latents, self._owner)
        return example


def with_latents(
    folder: str | Path,
    settings: Sequence[SourceSettings],
    sources: Sequence[RecordSource],
    autoencoder: Autoencoder,
    images: OrthusImageProcessor,
    owner: str,
) -> list[ExampleSource]:
    """The sources, with pictures that bring the latents in `folder`; see [`CachedSource`].

    Raises ValueError where the cache is unfinished or damaged, or of another autoencoder, image size or data.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    refuse_other(manifest, identity(autoencoder, images), str(place))
    numbers = {entry["name"]: number for number, entry in enumerate(manifest["sources"])}
    cached: list[ExampleSource] = []
    for one, source in zip(settings, sources, strict=True):
        if source.name not in numbers:
            raise ValueError(f"{place} has no source {source.name!r}, only {', '.join(numbers)}; {ANOTHER}")
        number = numbers[source.name]
        refuse_other(manifest["sources"][number], describe(one, source), f"{place}, source {source.name!r},")
        shards = shards_of(place, manifest, number)
        for shard in shards:
            check_shard(shard, manifest)
        cached.append(CachedSource(source, shards, owner))
    return cached
