"""Base training and post-training of Orthus: the same stage, with a new model or with an earlier one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import save_image

from orthus.adapters import add_lora, quantization
from orthus.autoencoder import Autoencoder
from orthus.configuration import DiffusionHeadConfig
from orthus.data.dropping import ConditionDropping
from orthus.data.latents import with_latents
from orthus.data.packing import PackedLoader
from orthus.data.schema import BadItem, Example, ExampleSource, Turn
from orthus.data.sources import Mixture, RecordSource, SourceSettings, open_mixture
from orthus.data.world.benchmark import small_geneval_items
from orthus.data.world.dataset import WorldDataset
from orthus.data.world.language import CaptionMix
from orthus.data.world.scene import WorldConfig
from orthus.diffusion_head import DiffusionHead, init_layer
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor
from orthus.training import evaluation, operations
from orthus.training.distributed import joined
from orthus.training.evaluation import check_scores
from orthus.training.fit import fit
from orthus.training.metrics import plot_curves
from orthus.training.optim import freeze
from orthus.training.reporting import TrainingFlops, peak_flops
from orthus.training.settings import OptimSettings, RunSettings
from orthus.training.sharding import check_shared_weights

Judge = Callable[[Mapping[str, Any], Image.Image], bool]
"""From an item in GenEval's form and a picture to whether the picture shows it."""
GRADED_TOGETHER = 32  # prompts in one call of `generate`


@dataclass(frozen=True)
class DataSettings:
    """Examples of the small world, of `sources`, or of both, packed into rows.

    tasks: mixing weights of the small world's tasks; {}: no small world.
    sources: data of your own; see [`SourceSettings`]. `world_weight`: share of the small world beside them.
    eval_sources: data of your own that is held out, for `run.eval_every`; of the small world its validation split is. Where there
        is too little for `run.eval_batches` batches, examples repeat.
    latents: folder in which `train.cache_latents` left the latents of the sources' pictures, which are then not read any more.
    drop: share of examples, by task, whose condition is dropped for guidance.
    captions, plans, world: of the small world; `plans`: share of drawn pictures that are described in words first.
    max_dropped_fraction: of examples too long or unusable, before the run ends with an error.
    num_threads: that read and decode ahead, for each lane.
    """

    tasks: dict[str, float] = field(default_factory=dict)
    sources: tuple[SourceSettings, ...] = ()
    world_weight: float = 1.0
    eval_sources: tuple[SourceSettings, ...] = ()
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
        if min(self.rows_per_batch, self.row_length) < 1:
            raise ValueError(
                f"data.rows_per_batch={self.rows_per_batch}, data.row_length={self.row_length}; give at least 1 each"
            )
        for path in {source.path for source in self.sources} & {source.path for source in self.eval_sources}:
            raise ValueError(f"{path!r} is in data.sources and in data.eval_sources; what is held out must not be trained on")


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
    world = world_of(data, "train")
    if not data.sources:
        return cast(WorldDataset, world), seed
    images = processor.image_processor
    mixture = open_mixture(data.sources, seed, images.prepare, images.max_pixels, processor.interleaved_prompt)
    if data.latents is not None:
        autoencoder = next(part for part in cast(nn.Module, model).modules() if isinstance(part, Autoencoder))
        opened = cast(list[RecordSource], mixture.sources)
        mixture.sources = with_latents(data.latents, data.sources, opened, autoencoder, images, processor._identity)
    return _with_world(mixture, data.sources, world, data, seed), None


def open_held_out(data: DataSettings, processor: OrthusProcessor) -> ExampleSource:
    """Examples that no step trains on: the small world's validation split, `data.eval_sources`, or both."""
    world = world_of(data, "validation")
    if not data.eval_sources:
        assert world is not None, "check_stage"
        return world
    images = processor.image_processor
    mixture = open_mixture(data.eval_sources, evaluation.SEED, images.prepare, images.max_pixels, processor.interleaved_prompt)
    return _with_world(mixture, data.eval_sources, world, data, evaluation.SEED)


def world_of(data: DataSettings, split: str) -> WorldDataset | None:
    """The small world as the settings mix it; None without tasks of it."""
    return WorldDataset(split, data.tasks, data.world, captions=data.captions, plans=data.plans) if data.tasks else None


def _with_world(
    mixture: Mixture, sources: Sequence[SourceSettings], world: WorldDataset | None, data: DataSettings, seed: int
) -> Mixture:
    if world is None:
        return mixture
    return Mixture([*mixture.sources, world], [*(source.weight for source in sources), data.world_weight], seed)


@dataclass(frozen=True)
class SampleSettings:
    """Pictures drawn every `run.sample_every` steps, one per prompt. `num_graded`: items of each of the six kinds of the small
    world's benchmark that are drawn and graded every `run.eval_every` steps, as `eval/geneval`."""

    prompts: tuple[str, ...] = ("a photo of a red circle", "a photo of three blue stars", "a photo of a heart above a square")
    guidance: float = 2.0
    num_diffusion_steps: int = 20
    num_graded: int = 0


@dataclass(frozen=True)
class LoraSettings:
    """Adapters that train in place of the backbone's weights; see [`add_lora`]. `quantize`: keep these as integers (QLoRA)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    quantize: Literal["no", "int8", "int4"] = "no"


def check_stage(
    run: RunSettings, data: DataSettings, samples: SampleSettings, lora: LoraSettings | None = None, can_grade: bool = True
) -> None:
    """ValueError for settings that do not go together. A stage asks this before it loads anything, and so does `--dry-run`.

    can_grade: whether the stage knows how to grade pictures.
    """
    check_shared_weights(run, lora is not None, lora is not None and lora.quantize != "no")
    if not run.eval_every:
        return
    if not data.tasks and not data.eval_sources:
        raise ValueError(f"run.eval_every={run.eval_every} needs data that is held out; give data.eval_sources, "
                         "or set run.eval_every=0")  # fmt: skip
    if samples.num_graded:
        check_scores(run)
        if not can_grade or not data.tasks:
            raise ValueError(f"samples.num_graded={samples.num_graded} needs data.tasks of the small world, and a stage that "
                             "grades; set it to 0")  # fmt: skip


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
    model.diffusion_head = DiffusionHead(model.config.head_config).apply(init_layer).to(weight.device)


def run_stage(
    model: OrthusForConditionalGeneration,
    processor: OrthusProcessor,
    data: DataSettings,
    run: RunSettings,
    optim: OptimSettings,
    samples: SampleSettings,
    settings: dict[str, Any],
    judge: Judge | None = None,
) -> None:
    """Train and leave model and processor in `run.output_dir/final`. `judge` grades what `samples.num_graded` asks for.
    ValueError as [`check_stage`]."""
    check_stage(run, data, samples, can_grade=judge is not None)
    with joined(run.device) as (rank, _):
        dataset, shuffle_seed = open_data(data, processor, run.seed, model)
        dropping = ConditionDropping(dataset, data.drop, processor.unconditional_prompt, run.seed)
        limit = data.max_dropped_fraction

        def make_loader(lane: int, num_lanes: int) -> PackedLoader:
            shard: dict[str, Any] = {"rank": lane, "world_size": num_lanes, "seed": shuffle_seed, "num_threads": data.num_threads}
            return PackedLoader(dropping, processor, data.rows_per_batch, data.row_length, **shard, max_dropped_fraction=limit)

        fit(
            model,
            make_loader,
            run,
            optim,
            on_sample=sampler(processor, samples, Path(run.output_dir)),
            evaluation=held_out(model, processor, data, samples, judge) if run.eval_every else None,
            training_flops=training_flops(model, data, run),
            settings=settings,
        )
        if rank == 0:
            plot_curves(Path(run.output_dir) / "metrics.jsonl")
            processor.save_pretrained(Path(run.output_dir) / "final")


def held_out(
    model: nn.Module, processor: OrthusProcessor, data: DataSettings, samples: SampleSettings, judge: Judge | None
) -> evaluation.Evaluation:
    """Batches of held-out examples, packed and with conditions dropped as in training."""
    examples = open_held_out(data, processor)
    dropping = ConditionDropping(examples, data.drop, processor.unconditional_prompt, evaluation.SEED)
    options = {"skip_logits": True} if isinstance(model, OrthusForConditionalGeneration) else {}

    def make_loader(lane: int, num_lanes: int) -> Any:
        shard: dict[str, Any] = {"rank": lane, "world_size": num_lanes, "max_dropped_fraction": data.max_dropped_fraction}
        loader = PackedLoader(dropping, processor, data.rows_per_batch, data.row_length, **shard)
        return ({**batch, **options} for batch in loader)

    return evaluation.Evaluation(make_loader, grader(processor, samples, judge) if judge and samples.num_graded else None)


def training_flops(model: nn.Module, data: DataSettings, run: RunSettings) -> TrainingFlops | None:
    """What `operations.flops` says; None where it would not be used."""
    if not isinstance(model, OrthusForConditionalGeneration) or peak_flops(run) is None:
        return None
    per_unit = operations.flops_by_amount(model, with_encoder=data.latents is None)
    return lambda work: operations.dot(per_unit, work)


def sampler(processor: OrthusProcessor, samples: SampleSettings, output_dir: Path) -> Callable[[nn.Module, int], None]:
    """A function that draws the prompts with the model of a given step into `output_dir/samples/step-*.png`."""

    def save(model: nn.Module, step: int) -> None:
        folder = output_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        drawn = draw(model, processor, samples, samples.prompts)
        save_image(drawn, folder / f"step-{step:08d}.png", normalize=True, value_range=(-1, 1), pad_value=1)

    return save


def grader(processor: OrthusProcessor, samples: SampleSettings, judge: Judge) -> Callable[[nn.Module, int], dict[str, float]]:
    """A function that draws the small world's benchmark with the model of a given step, and returns the share of pictures that
    show what they should as `eval/geneval`."""
    items = small_geneval_items(samples.num_graded)

    def score(model: nn.Module, step: int) -> dict[str, float]:
        drawn = []
        for start in range(0, len(items), GRADED_TOGETHER):
            prompts = [str(item["prompt"]) for item in items[start : start + GRADED_TOGETHER]]
            drawn += processor.image_processor.postprocess(draw(model, processor, samples, prompts))
        return {"eval/geneval": sum(judge(*pair) for pair in zip(items, drawn, strict=True)) / len(items)}

    return score


def draw(model: nn.Module, processor: OrthusProcessor, samples: SampleSettings, prompts: Sequence[str]) -> Tensor:
    """One picture per prompt `(N, 3, H, W)`, about [-1, 1], always from the same noise."""
    orthus = cast(OrthusForConditionalGeneration, model)
    turns = [[Turn("user", (prompt,))] for prompt in prompts]
    output = orthus.generate(
        **processor(turns=turns).to(orthus.device),
        **processor.guidance_streams(turns, samples.guidance),
        modality="interleaved",
        max_images=1,
        force_image=True,
        num_diffusion_steps=samples.num_diffusion_steps,
        generator=torch.Generator(orthus.device).manual_seed(0),
    )
    return torch.cat(cast(list[Tensor], output.pixel_values))
