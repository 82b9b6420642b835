"""Train an autoencoder on world pictures: `python -m train.autoencoder configs/small/autoencoder.yaml [key=value ...]`."""

import dataclasses
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch

from orthus.autoencoder import PatchAutoencoder, PatchAutoencoderConfig
from orthus.configuration import as_config
from orthus.data.pictures import PictureLoader
from orthus.data.world.scene import WorldConfig
from orthus.image_processing import OrthusImageProcessor
from orthus.training.checkpoint import save_model
from orthus.training.distributed import joined
from orthus.training.fit import fit
from orthus.training.settings import OptimSettings, RunSettings, load_settings

CALIBRATION_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class AutoencoderStage:
    """`model`: fields of [`PatchAutoencoderConfig`]. Calibration scenes hold `calibration_objects`, as typical pictures do."""

    run: RunSettings
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    world: WorldConfig = WorldConfig()
    optim: OptimSettings = OptimSettings()
    batch_size: int = 128
    num_objects: int = 6
    calibration_objects: int = 3


def main(argv: Sequence[str]) -> None:
    stage = load_settings(AutoencoderStage, argv[0], argv[1:])
    torch.manual_seed(stage.run.seed)
    fields = {**stage.model, "image_size": stage.world.image_size}
    model = PatchAutoencoder(cast(PatchAutoencoderConfig, as_config("model", fields, PatchAutoencoderConfig.model_type)))
    processor = OrthusImageProcessor(size=stage.world.image_size)
    with joined(stage.run.device) as (rank, world_size):
        loader = PictureLoader(stage.world, processor, stage.batch_size, stage.num_objects, "train", rank, world_size)
        fit(model, loader, stage.run, stage.optim)
        if rank == 0:
            calibrate(stage, processor)


def calibrate(stage: AutoencoderStage, processor: OrthusImageProcessor) -> None:
    """Give the latents of typical scenes zero mean and unit variance, once."""
    final = Path(stage.run.output_dir) / "final"
    model = PatchAutoencoder.from_pretrained(final)
    if bool((model.latent_std != 1).any()):
        return
    loader = PictureLoader(stage.world, processor, stage.batch_size, stage.calibration_objects)
    model.calibrate(torch.cat([batch["pixel_values"] for batch in islice(loader, CALIBRATION_BATCHES)]))
    save_model(model, {}, final)


if __name__ == "__main__":
    main(sys.argv[1:])
