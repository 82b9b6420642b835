"""Batches of world pictures for training an autoencoder."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from orthus.data.world.render import render
from orthus.data.world.sampling import sample_scene
from orthus.data.world.scene import WorldConfig
from orthus.image_processing import OrthusImageProcessor

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
