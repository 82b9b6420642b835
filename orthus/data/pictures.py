"""Batches of pictures: of the small world, for training an autoencoder, and out of a folder, for measuring latents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from orthus.data.world.render import render
from orthus.data.world.sampling import sample_scene
from orthus.data.world.scene import WorldConfig
from orthus.image_processing import OrthusImageProcessor, load_image

SPLITS = ("train", "validation")


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
