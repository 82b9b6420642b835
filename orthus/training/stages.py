"""Base training and post-training of Orthus: the same stage, with a new model or with an earlier one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torchvision.utils import save_image

from orthus.adapters import add_lora, quantization
from orthus.autoencoder import Autoencoder
from orthus.configuration import DiffusionHeadConfig
from orthus.data.dropping import ConditionDropping
from orthus.data.latents import with_latents
from orthus.data.packing import PackedLoader
from orthus.data.schema import BadItem, Example, ExampleSource, Turn
from orthus.data.sources import Mixture, RecordSource, SourceSettings, open_mixture
from orthus.data.world.dataset import WorldDataset
from orthus.data.world.language import CaptionMix
from orthus.data.world.scene import WorldConfig
from orthus.diffusion_head import DiffusionHead, init_layer
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor
from orthus.training.distributed import joined
from orthus.training.fit import fit
from orthus.training.metrics import plot_curves
from orthus.training.optim import freeze
from orthus.training.settings import OptimSettings, RunSettings


@dataclass(frozen=True)
class DataSettings:
    """Examples of the small world, of `sources`, or of both, packed into rows.

    tasks: mixing weights of the small world's tasks; {}: no small world.
    sources: data of your own; see [`SourceSettings`]. `world_weight`: share of the small world beside them.
    latents: folder in which `train.cache_latents` left the latents of the sources' pictures, which are then not read any more.
    drop: share of examples, by task, whose condition is dropped for guidance.
    captions, plans, world: of the small world; `plans`: share of drawn pictures that are described in words first.
    max_dropped_fraction: of examples too long or unusable, before the run ends with an error.
    num_threads: that read and decode ahead, for each lane.
    """

    tasks: dict[str, float] = field(default_factory=dict)
    sources: tuple[SourceSettings, ...] = ()
    world_weight: float = 1.0
    latents: str | None = None
    drop: dict[str, float] = field(default_factory=dict)
    captions: CaptionMix = CaptionMix()
    plans: float = 0.0
    world: WorldConfig = WorldConfig()
    rows_per_batch: int = 32
    row_length: int = 128
    max_dropped_fraction: float = 0.01
    num_threads: int = 0

    def __post_init__(self) -> None:
        if not self.tasks and not self.sources:
            raise ValueError("data has neither tasks of the small world nor sources; give data.tasks={t2i: 1.0} or data.sources")
        if self.latents is not None and not self.sources:
            raise ValueError(f"data.latents={self.latents!r} belongs to data.sources, of which there are none; leave it out")


def first_examples(source: ExampleSource, number: int) -> Iterator[Example]:
    """The usable ones of the first examples."""
    for index in range(number):
        with suppress(BadItem):
            yield source[index]


def open_data(
    data: DataSettings, processor: OrthusProcessor, seed: int, model: nn.Module | None = None
) -> tuple[ExampleSource, int | None]:
    """The examples, and the seed with which a loader is to shuffle them; mixtures shuffle themselves.

    model: whose autoencoder `data.latents` must come from.
    """
    world = WorldDataset("train", data.tasks, data.world, captions=data.captions, plans=data.plans) if data.tasks else None
    if not data.sources:
        return cast(WorldDataset, world), seed
    images = processor.image_processor
    mixture = open_mixture(data.sources, seed, images.prepare, images.max_pixels, processor.interleaved_prompt)
    if data.latents is not None:
        autoencoder = next(part for part in cast(nn.Module, model).modules() if isinstance(part, Autoencoder))
        opened = cast(list[RecordSource], mixture.sources)
        mixture.sources = with_latents(data.latents, data.sources, opened, autoencoder, images, processor._identity)
    if world is None:
        return mixture, None
    weights = [*(source.weight for source in data.sources), data.world_weight]
    return Mixture([*mixture.sources, world], weights, seed), None


@dataclass(frozen=True)
class SampleSettings:
    """Pictures drawn every `run.sample_every` steps, one per prompt."""

    prompts: tuple[str, ...] = ("a photo of a red circle", "a photo of three blue stars", "a photo of a heart above a square")
    guidance: float = 2.0
    num_diffusion_steps: int = 20


@dataclass(frozen=True)
class LoraSettings:
    """Adapters that train in place of the backbone's weights; see [`add_lora`]. `quantize`: keep these as integers (QLoRA)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    quantize: Literal["no", "int8", "int4"] = "no"


def load_model(folder: str, frozen: Sequence[str], lora: LoraSettings | None, seed: int) -> OrthusForConditionalGeneration:
    """The model to start a stage from, without training for the `frozen` parts; then come new adapters if `lora` is given.
    Without adapters the weights are in fp32 whatever they were stored in: small steps are lost in bf16."""
    kind = "no" if lora is None else lora.quantize
    dtype: dict[str, Any] = {"dtype": torch.float32} if lora is None else {}
    model = OrthusForConditionalGeneration.from_pretrained(folder, quantization_config=quantization(kind), **dtype)
    freeze(model, frozen)
    if lora is None:
        return model
    torch.manual_seed(seed)
    return add_lora(model, lora.rank, lora.alpha, lora.dropout, lora.targets)


def replace_head(model: OrthusForConditionalGeneration, fields: dict[str, Any], seed: int) -> None:
    """Give the model a new diffusion head of random weights; what `fields` does not name is as in the old one's config."""
    old = model.config.head_config
    sampler = ("num_diffusion_steps", "solver", "spacing")  # which suits the objective
    kept = {name: getattr(old, name) for name in DiffusionHeadConfig.__annotations__ if name not in sampler}
    model.config.head_config = DiffusionHeadConfig(**{**kept, **fields})
    model.config.check_parts()
    torch.manual_seed(seed)
    weight = model.diffusion_head.input_proj.weight
    model.diffusion_head = DiffusionHead(model.config.head_config).apply(init_layer).to(weight)


def run_stage(
    model: OrthusForConditionalGeneration,
    processor: OrthusProcessor,
    data: DataSettings,
    run: RunSettings,
    optim: OptimSettings,
    samples: SampleSettings,
    settings: dict[str, Any],
) -> None:
    """Train and leave model and processor in `run.output_dir/final`."""
    with joined(run.device) as (rank, _):
        dataset, shuffle_seed = open_data(data, processor, run.seed, model)
        dropping = ConditionDropping(dataset, data.drop, processor.unconditional_prompt, run.seed)

        def make_loader(lane: int, num_lanes: int) -> PackedLoader:
            shard: dict[str, Any] = {"rank": lane, "world_size": num_lanes, "seed": shuffle_seed}
            reading: dict[str, Any] = {"max_dropped_fraction": data.max_dropped_fraction, "num_threads": data.num_threads}
            return PackedLoader(dropping, processor, data.rows_per_batch, data.row_length, **shard, **reading)

        fit(model, make_loader, run, optim, on_sample=sampler(processor, samples, Path(run.output_dir)), settings=settings)
        if rank == 0:
            plot_curves(Path(run.output_dir) / "metrics.jsonl")
            processor.save_pretrained(Path(run.output_dir) / "final")


def sampler(processor: OrthusProcessor, samples: SampleSettings, output_dir: Path) -> Callable[[nn.Module, int], None]:
    """A function that draws the prompts with the model of a given step into `output_dir/samples/step-*.png`."""

    def draw(model: nn.Module, step: int) -> None:
        orthus = cast(OrthusForConditionalGeneration, model)
        turns = [[Turn("user", (prompt,))] for prompt in samples.prompts]
        output = orthus.generate(
            **processor(turns=turns).to(orthus.device),
            **processor.guidance_streams(turns, samples.guidance),
            modality="interleaved",
            max_images=1,
            force_image=True,
            num_diffusion_steps=samples.num_diffusion_steps,
            generator=torch.Generator(orthus.device).manual_seed(0),
        )
        folder = output_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        drawn = torch.cat(cast(list[torch.Tensor], output.pixel_values))
        save_image(drawn, folder / f"step-{step:08d}.png", normalize=True, value_range=(-1, 1), pad_value=1)

    return draw
