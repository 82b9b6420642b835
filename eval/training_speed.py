"""How fast training reads real tokens, packed rows beside a plain padded loop in one run.

`python -m eval.training_speed model=checkpoints/orthus-small [json=runs/training-speed.json steps=20 ...]`: forward and backward
of examples of the same kinds, the two ways in turn, so that whatever else the machine does meets both alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eval.provenance import from_command_line, provenance
from eval.whole_files import write_json
from orthus.configuration import IGNORE_INDEX
from orthus.data.packing import PackedLoader
from orthus.data.world.dataset import DEFAULT_TASKS, WorldDataset
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor

Batch = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """`tasks`, `plans`: of the small world's examples. A padded batch holds as many examples as a packed one does on average."""

    model: str
    json: str | None = None
    tasks: dict[str, float] | None = None
    plans: float = 0.9
    rows_per_batch: int = 12
    row_length: int = 216
    steps: int = 20
    warm_up: int = 3
    attention: str = "eager"
    num_threads: int = 1
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows_per_batch", "row_length", "steps", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; give at least 1")


def padded_batch(processor: OrthusProcessor, examples: Sequence[Any]) -> Batch:
    """The examples in a row each, as long as the longest."""
    rendered = [processor.render(example.turns) for example in examples]
    width = max(len(one.input_ids) for one in rendered)
    rows = [(one.input_ids, [IGNORE_INDEX, *one.labels[1:]], width - len(one.input_ids)) for one in rendered]
    batch = {
        "input_ids": torch.tensor([ids + [processor.pad_token_id] * rest for ids, _, rest in rows]),
        "labels": torch.tensor([labels + [IGNORE_INDEX] * rest for _, labels, rest in rows]),
        "attention_mask": torch.tensor([[1] * (width - rest) + [0] * rest for _, _, rest in rows]),
    }
    images = [image for one in rendered for image in one.images]
    return batch | ({"pixel_values": processor.image_processor.pixel_values(images)} if images else {})


def step(model: OrthusForConditionalGeneration, batch: Batch) -> float:
    """Seconds of a forward and a backward."""
    start = time.perf_counter()
    sums = model(**{name: value.to(model.device) for name, value in batch.items()}).loss_sums
    (sums["text"] + sums["image"]).backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds


def measure(settings: Settings) -> dict[str, Any]:
    """Real tokens per second and shares of real tokens, both ways."""
    torch.set_num_threads(settings.num_threads)
    processor = OrthusProcessor.from_pretrained(settings.model)
    model = OrthusForConditionalGeneration.from_pretrained(settings.model).to(torch.device(settings.device)).train()
    model.set_attn_implementation(settings.attention)
    dataset = WorldDataset("train", settings.tasks or DEFAULT_TASKS, plans=settings.plans)
    loader = PackedLoader(dataset, processor, settings.rows_per_batch, settings.row_length, seed=settings.seed)
    packed = list(islice(loader, settings.warm_up + settings.steps))
    per_batch = max(1, round(loader.examples.total() / len(packed)))
    padded = [padded_batch(processor, [dataset[n * per_batch + i] for i in range(per_batch)]) for n in range(len(packed))]
    seconds: dict[str, list[float]] = {"packed": [], "padded": []}
    for pair in tqdm(zip(packed, padded, strict=True), total=len(packed), unit="step"):
        for name, batch in zip(seconds, pair, strict=True):
            seconds[name].append(step(model, batch))
    real = {"packed": loader.num_real_tokens, "padded": sum(int(batch["attention_mask"].sum()) for batch in padded)}
    size = {"packed": loader.num_tokens, "padded": sum(batch["input_ids"].numel() for batch in padded)}
    speed = {name: real[name] / len(packed) / statistics.median(seconds[name][settings.warm_up :]) for name in seconds}
    return {
        "real_tokens_per_second": speed,
        "ratio": speed["packed"] / speed["padded"],
        "real_share": {name: real[name] / size[name] for name in seconds},
        "examples_per_batch": per_batch,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    settings = from_command_line(Settings, argv, __doc__)
    if settings is None:
        return
    found = measure(settings)
    for name, value in found["real_tokens_per_second"].items():
        print(f"{name}: {value:.0f} real tokens/s, {found['real_share'][name]:.1%} of all tokens are real")
    print(f"packed is {found['ratio']:.2f} times as fast")
    if settings.json is not None:
        write_json(Path(settings.json), {**found, **provenance(settings, "eval.training_speed")})


if __name__ == "__main__":
    main()
