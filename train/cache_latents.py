"""Pictures of `data.sources` encoded once for many runs: `python -m train.cache_latents x.yaml output=DIR [key=value ...]`.

The config is that of train.posttrain (or of train.pretrain), which then trains with `data.latents=DIR`. Under torchrun, processes
share the work. The same command goes on where it was killed, with any number of processes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from orthus.autoencoder_loading import load_autoencoder
from orthus.data.latent_writing import CacheSettings, LatentWriter, make_plan
from orthus.data.sources import RecordSource, open_mixture
from orthus.image_processing import OrthusImageProcessor
from orthus.training.distributed import joined
from orthus.training.settings import load_settings, read
from train.posttrain import PostStage
from train.pretrain import BaseStage


@dataclass(frozen=True, kw_only=True)
class PostCache(CacheSettings, PostStage):
    """The settings of post-training, and those of the cache."""


@dataclass(frozen=True, kw_only=True)
class BaseCache(CacheSettings, BaseStage):
    """The settings of base training, and those of the cache."""


def main(argv: Sequence[str]) -> None:
    is_base = "autoencoder" in read(argv[0])
    stage = load_settings(cast(type[PostCache | BaseCache], BaseCache if is_base else PostCache), argv[0], argv[1:])
    if not stage.data.sources:
        raise ValueError("data.sources is empty, and pictures of the small world are drawn anew: there is nothing to encode once")
    with joined(stage.run.device) as (rank, world_size):
        if isinstance(stage, BaseCache):
            autoencoder = load_autoencoder(stage.autoencoder)
            images = OrthusImageProcessor(size=autoencoder.config.image_size)
        else:
            autoencoder = load_autoencoder(stage.model)
            images = OrthusImageProcessor.from_pretrained(stage.model)
        mixture = open_mixture(stage.data.sources, stage.run.seed, images.prepare, images.max_pixels)
        sources = cast(list[RecordSource], mixture.sources)
        plan = make_plan(stage, stage.data.sources, sources, autoencoder, images)
        autoencoder.to(stage.run.device)  # type: ignore[arg-type]
        manifest = LatentWriter(stage, plan, sources, autoencoder, images).run(rank, world_size, stage.data.num_threads)
    for entry in manifest["sources"] if manifest else ():
        print(f"{entry['name']}: {entry['num_items']} items, {entry['num_pictures']} pictures, {entry['num_bad']} unusable items")


if __name__ == "__main__":
    main(sys.argv[1:])
