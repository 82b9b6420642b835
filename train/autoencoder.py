"""Train an autoencoder on world pictures: `python -m train.autoencoder configs/small/autoencoder.yaml [key=value ...]`."""

import dataclasses
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch

from orthus.autoencoder import Autoencoder, CalibratedAutoencoder, PatchAutoencoder, PatchAutoencoderConfig
from orthus.autoencoder_loading import load_autoencoder
from orthus.configuration import as_config
from orthus.data.pictures import PictureLoader, SourcePictures
from orthus.data.sources import SourceSettings, open_mixture
from orthus.data.world.scene import WorldConfig
from orthus.image_processing import OrthusImageProcessor
from orthus.training.checkpoint import Loader
from orthus.training.distributed import joined
from orthus.training.evaluation import Evaluation
from orthus.training.fit import fit
from orthus.training.folders import write_model
from orthus.training.optim import freeze
from orthus.training.settings import OptimSettings, RunSettings, load_settings

CALIBRATION_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class AutoencoderStage:
    """`model`: fields of [`PatchAutoencoderConfig`] or, given `start`, options of [`load_autoencoder`].
    `sources`: pictures of your own in place of scenes of the world, resized to `image_size` (default: the world's).
    Calibration scenes hold `calibration_objects`, as typical pictures do."""

    run: RunSettings
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: str = ""  # folder or hub name of any autoencoder to go on from; "": a new PatchAutoencoder
    frozen: tuple[str, ...] = ()  # parts that do not train, such as encoder
    sources: tuple[SourceSettings, ...] = ()
    image_size: int | None = None
    world: WorldConfig = WorldConfig()
    optim: OptimSettings = OptimSettings()
    batch_size: int = 128
    num_objects: int = 6
    calibration_objects: int = 3

    def __post_init__(self) -> None:
        if self.image_size is not None and not self.sources:
            raise ValueError(f"image_size={self.image_size} is of sources, and there are none; set world.image_size")

    @property
    def size(self) -> int:
        """Of the pictures, in pixels."""
        return self.image_size or self.world.image_size


def main(argv: Sequence[str]) -> None:
    stage = load_settings(AutoencoderStage, argv[0], argv[1:])
    torch.manual_seed(stage.run.seed)
    model = first_model(stage)
    freeze(model, stage.frozen)
    processor = OrthusImageProcessor(size=stage.size)

    mixture = open_mixture(stage.sources, stage.run.seed, processor.prepare, processor.max_pixels) if stage.sources else None

    def pictures(num_objects: int, lane: int = 0, num_lanes: int = 1, split: str = "train") -> Loader:
        """Batches of one lane: of the sources, or scenes of `num_objects` objects."""
        if mixture is not None:
            return SourcePictures(mixture, processor, stage.batch_size, lane, num_lanes)
        return PictureLoader(stage.world, processor, stage.batch_size, num_objects, split, lane, num_lanes)

    def make_loader(lane: int, num_lanes: int) -> Loader:
        return pictures(stage.num_objects, lane, num_lanes)

    held_out = Evaluation(lambda lane, num_lanes: pictures(stage.num_objects, lane, num_lanes, "validation"))
    with joined(stage.run.device) as (rank, _):
        if stage.start:  # noise on the latents is in units of their standard deviation
            cast(torch.nn.Module, model).to(stage.run.device)
            calibrate(model, pictures(stage.calibration_objects))
        fit(model, make_loader, stage.run, stage.optim, evaluation=held_out if mixture is None else None)
        if rank == 0:
            final = Path(stage.run.output_dir) / "final"
            trained = load_autoencoder(final)
            if calibrate(trained, pictures(stage.calibration_objects)):
                write_model(trained, final)


def first_model(stage: AutoencoderStage) -> Autoencoder:
    """The autoencoder before the first step, in fp32."""
    if stage.start:
        return load_autoencoder(stage.start, stage.size, dtype=torch.float32, **stage.model)
    fields = {**stage.model, "image_size": stage.size}
    return PatchAutoencoder(cast(PatchAutoencoderConfig, as_config("model", fields, PatchAutoencoderConfig.model_type)))


def calibrate(model: Autoencoder, loader: Loader) -> bool:
    """Give the latents of a loader's pictures zero mean and unit variance, once; whether it was needed."""
    if not isinstance(model, CalibratedAutoencoder) or bool((model.latent_std != 1).any()):
        return False
    model.calibrate(torch.cat([batch["pixel_values"] for batch in islice(loader, CALIBRATION_BATCHES)]))
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
