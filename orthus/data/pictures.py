"""Batches of pictures: of the small world, for training an autoencoder, and out of a folder, for measuring latents."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from orthus.data.schema import BadItem, ExampleSource, pictures_of
from orthus.data.world.render import render
from orthus.data.world.sampling import sample_scene
from orthus.data.world.scene import WorldConfig
from orthus.image_processing import OrthusImageProcessor, load_image

SPLITS = ("train", "validation")
MAX_WITHOUT_PICTURES = 10_000
MIN_READ = 100  # examples before a fraction of unusable ones means anything


class PictureLoader:
    """Endless batches `{"pixel_values": (N, 3, H, W)}` of scenes with `num_objects` objects; picture i is a function of i."""

    def __init__(
        self,
        world: WorldConfig,
        processor: OrthusImageProcessor,
        batch_size: int,
        num_objects: int,
        split: str = "train",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
        self.world, self.processor, self.batch_size, self.num_objects = world, processor, batch_size, num_objects
        self.split_id, self.rank, self.world_size, self.next_batch = SPLITS.index(split), rank, world_size, 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            first = (self.next_batch * self.world_size + self.rank) * self.batch_size
            scenes = [self._scene(first + i) for i in range(self.batch_size)]
            self.next_batch += 1
            yield {"pixel_values": self.processor(scenes, return_tensors="pt")["pixel_values"]}

    def _scene(self, index: int) -> np.ndarray:
        rng = np.random.default_rng([self.world.world_seed, 7, self.split_id, index])
        return render(sample_scene(rng, self.world, num_objects=self.num_objects))

    def state_dict(self) -> dict[str, Any]:
        return {"next_batch": self.next_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next_batch = int(state["next_batch"])


class SourcePictures:
    """Endless batches `{"pixel_values": (N, 3, H, W)}` of all pictures in the examples of an endless source, in order.

    Lane `rank` of `world_size` reads every `world_size`-th example. Unusable ones are left out, warned about once and counted;
    ValueError when they are more than `max_bad_fraction`.
    """

    def __init__(
        self,
        source: ExampleSource,
        processor: OrthusImageProcessor,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self.source, self.processor, self.batch_size, self.world_size = source, processor, batch_size, world_size
        self.max_bad_fraction = max_bad_fraction
        self.next_example, self.num_used = rank, 0  # pictures of that example that earlier batches took
        self.num_read = self.num_bad = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            batch: list[Image.Image] = []
            num_without = 0
            while len(batch) < self.batch_size:
                pictures = self._pictures(self.next_example)
                num_without = 0 if pictures else num_without + 1
                if num_without > MAX_WITHOUT_PICTURES:
                    raise ValueError(f"{num_without} examples on end hold no picture; give sources of pictures")
                taken = pictures[self.num_used : self.num_used + self.batch_size - len(batch)]
                batch += taken
                self.num_used += len(taken)
                if self.num_used >= len(pictures):
                    self.next_example, self.num_used = self.next_example + self.world_size, 0
            yield {"pixel_values": self.processor.pixel_values(batch)}

    def _pictures(self, position: int) -> list[Image.Image]:
        self.num_read += 1
        try:
            example = self.source[position]
        except BadItem as bad:
            self.num_bad += 1
            if self.num_bad == 1:
                warnings.warn(f"{bad}: left out, and more like it will be counted", stacklevel=2)
            if self.num_bad > self.max_bad_fraction * max(self.num_read, MIN_READ):
                raise ValueError(f"{self.num_bad} of {self.num_read} examples cannot be used; the last: {bad}") from bad
            return []
        return pictures_of(example)

    def counts(self) -> dict[str, int]:
        """Examples that were read and that could not be used."""
        return {"examples": self.num_read, "bad": self.num_bad}

    def state_dict(self) -> dict[str, Any]:
        names = ("next_example", "num_used", "num_read", "num_bad")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, int(value))


class FolderPictures:
    """Batches `{"pixel_values": (N, 3, H, W)}` of at most `limit` pictures found in a folder and all folders below it.

    Which ones, and their order, is drawn by `seed`. Files that cannot be read or used are left out: `num_unreadable` counts them,
    `num_read` the others. Raises ValueError for no folder, and at the end of an iteration that found no picture.
    """

    def __init__(
        self, folder: str | Path, processor: OrthusImageProcessor, limit: int, batch_size: int = 8, seed: int = 0
    ) -> None:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is no folder; give one with pictures")
        self.folder, self.processor, self.limit, self.batch_size, self.seed = Path(folder), processor, limit, batch_size, seed
        self.num_read = self.num_unreadable = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.num_read = self.num_unreadable = 0
        endings = Image.registered_extensions()
        files = sorted(file for file in self.folder.rglob("*") if file.suffix.lower() in endings and file.is_file())
        order = np.random.default_rng(self.seed).permutation(len(files))
        batch: list[Image.Image] = []
        for place in order:
            if self.num_read == self.limit:
                break
            try:
                batch.append(self.processor.prepare(load_image(files[place], self.processor.max_pixels)))
                self.num_read += 1
            except ValueError:
                self.num_unreadable += 1
            if len(batch) == self.batch_size:
                yield {"pixel_values": self.processor.pixel_values(batch)}
                batch = []
        if batch:
            yield {"pixel_values": self.processor.pixel_values(batch)}
        if not self.num_read:
            raise ValueError(f"{self.folder} holds no readable picture among {len(files)} picture files; give another folder")
