"""Base training of a new model: `python -m train.pretrain configs/small/language.yaml [key=value ...]`.

`--dry-run [--processes N] [--memory GIB] [--tflops X]` prints what the run would take, and reads neither data nor weights.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import torch
from transformers import PreTrainedConfig

from eval.small_tasks import shows
from orthus.autoencoder import Autoencoder
from orthus.autoencoder_loading import OURS, load_autoencoder
from orthus.building import build_orthus
from orthus.configuration import OrthusConfig, as_config
from orthus.conversion import is_published
from orthus.data.pictures import PictureLoader
from orthus.data.schema import Example, ExampleSource, batches, pictures_of
from orthus.data.sources import open_mixture
from orthus.data.world.dataset import WorldDataset
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor, build_processor
from orthus.training import planning
from orthus.training.optim import freeze
from orthus.training.settings import OptimSettings, RunSettings, load_settings, to_dict
from orthus.training.stages import DataSettings, SampleSettings, check_stage, first_examples, run_stage

CODEBOOK_BATCHES, PICTURES_PER_BATCH = 32, 64
MAX_EXAMPLES = 20_000  # in which pictures for the codebook are looked for


@dataclass(frozen=True)
class BaseStage:
    """`backbone`, `head`, `options`: see [`build_orthus`]. The tokenizer learns from the first `tokenizer_examples` examples."""

    run: RunSettings
    data: DataSettings
    autoencoder: str
    backbone: dict[str, Any]
    head: dict[str, Any]
    options: dict[str, Any]
    optim: OptimSettings = OptimSettings()
    samples: SampleSettings = SampleSettings()
    frozen: tuple[str, ...] = ()
    attention: str = "sdpa"
    embedding_std: float | None = None
    tokenizer_vocab_size: int = 512
    tokenizer_examples: int = 3000
    tokenizer_tasks: dict[str, float] = field(default_factory=dict)
    unconditional_prompt: str = "Generate an image."


def main(argv: Sequence[str]) -> None:
    argv, hardware = planning.requested(argv)
    stage = load_settings(BaseStage, argv[0], argv[1:])
    check_stage(stage.run, stage.data, stage.samples)
    if hardware is not None:
        planning.dry_run(planned_model(stage), stage.data, stage.run, stage.optim, stage.attention, hardware)
        return
    torch.manual_seed(stage.run.seed)
    autoencoder = load_autoencoder(stage.autoencoder)
    processor = make_processor(stage, autoencoder)
    pictures = some_pictures(stage, processor)
    latents = torch.cat([autoencoder.encode(batch).detach() for batch in islice(pictures, CODEBOOK_BATCHES)])
    parts = (autoencoder, processor.tokenizer, stage.backbone, stage.head, stage.options, latents)
    model = build_orthus(*parts, embedding_std=stage.embedding_std)
    model.set_attn_implementation(stage.attention)
    freeze(model, stage.frozen)
    run_stage(model, processor, stage.data, stage.run, stage.optim, stage.samples, to_dict(stage), shows)


def planned_model(stage: BaseStage) -> OrthusForConditionalGeneration:
    """The stage's model without storage, its vocabulary as large as the tokenizer may become."""
    autoencoder = planned_autoencoder(stage.autoencoder)
    text = {**stage.backbone, "vocab_size": stage.tokenizer_vocab_size + stage.options["num_codes"]}
    backbone = as_config("backbone", text, "llama")
    head = {**stage.head, "latent_dim": autoencoder.latent_dim, "cond_dim": backbone.hidden_size}
    parts: dict[str, Any] = {"text_config": backbone, "autoencoder_config": autoencoder, "head_config": head}
    model = planning.meta_model(OrthusConfig(code_offset=stage.tokenizer_vocab_size, **parts, **stage.options))
    freeze(model, stage.frozen)
    return model


def planned_autoencoder(folder: str) -> PreTrainedConfig:
    """The autoencoder's config in a folder of ours or of a whole model, from its config.json alone. ValueError without."""
    raw = planning.read_config(folder, "of `train.autoencoder`, or a whole Orthus or Chameleon; make one")
    if is_published(raw) or raw.get("model_type") == OrthusConfig.model_type:
        return cast(PreTrainedConfig, planning.config_in(folder).autoencoder_config)
    if raw.get("model_type") not in OURS:
        raise ValueError(f"--dry-run knows autoencoders that orthus saved; {folder} is of model_type {raw.get('model_type')!r}")
    return as_config("autoencoder", raw, OURS[0])


def make_processor(stage: BaseStage, autoencoder: Autoencoder) -> OrthusProcessor:
    """A processor whose tokenizer has seen the words of every task of the recipe, later stages included."""
    tasks, data = stage.tokenizer_tasks or stage.data.tasks, stage.data
    sources: list[ExampleSource] = []
    if tasks:
        sources.append(WorldDataset("train", tasks, data.world, captions=data.captions, plans=data.plans))
    if data.sources:
        sources.append(open_mixture(data.sources, stage.run.seed))
    examples = (example for source in sources for example in first_examples(source, stage.tokenizer_examples))
    corpus = [text for example in examples for text in texts(example)]
    return build_processor(
        [*corpus, stage.unconditional_prompt],
        stage.tokenizer_vocab_size,
        autoencoder.config.image_size,
        autoencoder.config.num_latents,
        stage.unconditional_prompt,
    )


def some_pictures(stage: BaseStage, processor: OrthusProcessor) -> Iterator[torch.Tensor]:
    """Pixel values `(N, 3, H, W)` of typical pictures: of the small world, or of the sources where there is none of it."""
    images = processor.image_processor
    if stage.data.tasks:
        yield from (batch["pixel_values"] for batch in PictureLoader(stage.data.world, images, PICTURES_PER_BATCH, num_objects=5))
        return
    mixture = open_mixture(stage.data.sources, stage.run.seed, images.prepare, images.max_pixels)
    pictures = (picture for example in first_examples(mixture, MAX_EXAMPLES) for picture in pictures_of(example))
    num_pictures = 0
    for batch in batches(pictures, PICTURES_PER_BATCH):
        num_pictures += len(batch)
        yield images.pixel_values(batch)
    if num_pictures == 0:
        raise ValueError(f"the first {MAX_EXAMPLES} examples of data.sources hold no picture; the codebook is made of some")


def texts(example: Example) -> list[str]:
    """All that is said in an example."""
    return [segment for turn in example.turns for segment in turn.segments if isinstance(segment, str)]


if __name__ == "__main__":
    main(sys.argv[1:])
