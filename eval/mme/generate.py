"""Answering MME's questions, or the small world's in the same form, into answer files `answers/<subtask>.txt`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eval.answers import Decoding, Request, ask, num_answers
from eval.loading import ModelSettings
from eval.mme.files import write_answer_files
from eval.mme.grading import PARSERS, Record
from eval.mme.items import PROMPT_STYLES, Item, blank, open_items, small_world_items
from eval.provenance import keep_manifest, model_folder, model_hash, record_provenance
from orthus.training.distributed import barrier, rank
from orthus.training.settings import to_dict

TASK, ANSWERS = "mme", "answers"
SMALL_WORLD = "small-world"


@dataclass(frozen=True)
class Settings:
    """What is asked and how.

    data: small-world, a folder in the official layout, or a parquet file or folder as on the hub.
    templates: folder of eval_tool/Your_Results, where the order of questions is to be that one.
    num_images: pictures per subtask of the small world. blank: show an empty picture instead, the text-only baseline.
    style: of the prompt: official (as stored), lmms, internvl. parser: official, lmms or strict; both belong beside each number.
    answer_after: only what follows these words is the answer; for models that describe before they answer.
    """

    model: str
    output: str
    data: str = SMALL_WORLD
    templates: str | None = None
    num_images: int = 100
    blank: bool = False
    style: str = "official"
    parser: str = "official"
    answer_after: str | None = None
    seed: int = 0
    batch_size: int = 64
    decoding: Decoding = Decoding("text", max_new_tokens=128)
    loading: ModelSettings = ModelSettings()

    @property
    def device(self) -> str:
        return self.loading.device

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; give at least 1")
        for name, known in (("style", PROMPT_STYLES), ("parser", PARSERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)} is unknown; use one of {', '.join(known)}")


def items_of(settings: Settings) -> list[Item]:
    if settings.data == SMALL_WORLD:
        return small_world_items(settings.num_images)
    return open_items(Path(settings.data), None if settings.templates is None else Path(settings.templates))


def key_of(item: Item, number: int) -> str:
    return f"{item.picture_key}/{number % 2}"


def requests_of(items: Sequence[Item], settings: Settings) -> list[Request]:
    """A request for each question, in order: picture, then words."""
    return [
        Request(
            key_of(item, number), (partial(blank, item.picture) if settings.blank else item.picture, item.prompt(settings.style))
        )
        for number, item in enumerate(items)
    ]


def questions_hash(items: Sequence[Item], style: str) -> str:
    """sha256 over pictures' names, prompts and truths, in order."""
    asked = json.dumps([[item.picture_key, item.prompt(style), item.truth] for item in items])
    return hashlib.sha256(asked.encode()).hexdigest()


def final_answer(text: str, after: str | None) -> str:
    """What follows the last `after`, or all of it where that does not occur."""
    return text if after is None else text.rpartition(after)[2].strip()


def answer(model: Any, processor: Any, items: Sequence[Item], settings: Settings, task: str = TASK) -> dict[str, list[Record]]:
    """Records by subtask, written to `answers/<subtask>.txt` once all questions are answered. Every process calls this.

    Raises ValueError for a folder of another run.
    """
    folder = Path(settings.output)
    keep_manifest(
        folder,
        {
            "questions_sha256": questions_hash(items, settings.style),
            "num_questions": len(items),
            "data": SMALL_WORLD if settings.data == SMALL_WORLD else Path(settings.data).name,
            **{name: getattr(settings, name) for name in ("style", "blank", "answer_after", "seed", "batch_size")},
            "decoding": to_dict(settings.decoding),
            "dtype": settings.loading.dtype,
            "quantize": settings.loading.quantize,
            "model_sha256": model_hash(model_folder(settings.model)),
        },
    )
    barrier()
    requests, known = requests_of(items, settings), num_answers(folder, task)
    answers = ask(model, processor, task, requests, settings.decoding, folder, settings.seed, settings.batch_size)
    records: dict[str, list[Record]] = {}
    for request, item in zip(requests, items, strict=True):
        said = final_answer(answers[request.key].text, settings.answer_after)
        records.setdefault(item.subtask, []).append(item.record(said))
    if rank() == 0:
        record_provenance(folder, settings, "eval.mme", len(answers) - known)
        num_changed = write_answer_files(folder / ANSWERS, records)
        if num_changed:
            print(f"{num_changed} answers held tabs or line ends, which are spaces in {folder / ANSWERS}")
    barrier()
    return records
