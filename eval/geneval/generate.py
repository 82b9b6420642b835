"""Drawing the pictures of a GenEval run into the official folders: `00000/metadata.jsonl`, `00000/samples/00000.png`, ..."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.answers import Answer, Decoding, Request, ask, num_answers
from eval.geneval.prompts import Item, lines_sha256, metadata_lines, official_lines
from eval.geneval.verdict import check_metadata, check_positions
from eval.loading import ModelSettings
from eval.provenance import keep_manifest, model_folder, model_hash, record_provenance
from eval.whole_files import write_text
from orthus.data.world.benchmark import small_geneval_items
from orthus.training.distributed import barrier, rank
from orthus.training.settings import to_dict

TASK = "geneval"


@dataclass(frozen=True)
class Settings:
    """What is drawn, how, and what judges it.

    prompts: official (553 prompts), small (the small world's), or a file in the form of evaluation_metadata.jsonl: rewritten
        prompts are another benchmark and are recorded as such.
    num_samples: pictures of each prompt. num_per_task, held_out: of the small world's prompts.
    decoding: a forced picture (modality image), or words first (interleaved with force_image).
    detector: hf (Mask2Former and CLIP through transformers) or world (the small world's).
    """

    model: str
    output: str
    prompts: str = "official"
    num_samples: int = 4
    num_per_task: int = 50
    held_out: bool = True
    seed: int = 0
    batch_size: int = 64
    decoding: Decoding = Decoding("image", guidance=5.0, max_images=1)
    loading: ModelSettings = ModelSettings()
    detector: Literal["hf", "world"] = "hf"

    @property
    def device(self) -> str:
        return self.loading.device

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_per_task", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; give at least 1")
        how = self.decoding
        if how.max_images != 1 or (how.modality != "image" and not (how.modality == "interleaved" and how.force_image)):
            raise ValueError(
                f"decoding has modality={how.modality}, max_images={how.max_images}, force_image={how.force_image}; GenEval "
                "judges one picture an answer: give max_images=1 and modality=image, or modality=interleaved and force_image=true"
            )


def prompt_set(prompts: str, num_per_task: int = 50, held_out: bool = True) -> tuple[str, list[Item]]:
    """Name and items of a set of prompts. A file with other lines than the published one is called `rewritten:<sha256>`.

    Raises ValueError for a line that is not in the form of evaluation_metadata.jsonl, with its number.
    """
    if prompts == "official":
        return "official", [json.loads(line) for line in official_lines()]
    if prompts == "small":
        return f"small ({num_per_task} a task, {'held out' if held_out else 'seen'})", small_geneval_items(num_per_task, held_out)
    items = []
    for number, line in enumerate(Path(prompts).read_text(encoding="utf-8-sig").strip("\n").split("\n"), start=1):
        try:
            item = json.loads(line)
            if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
                raise ValueError("it is no object with a prompt")
            check_metadata(item)
            check_positions(item)
        except ValueError as error:
            raise ValueError(f"{prompts}, line {number}: {error}; give the fields of evaluation_metadata.jsonl") from error
        items.append(item)
    if not items:
        raise ValueError(f"{prompts} holds no prompt; give a file in the form of evaluation_metadata.jsonl")
    lines = metadata_lines(items)
    return ("official" if tuple(lines) == official_lines() else f"rewritten:{lines_sha256(lines)[:16]}"), items


def requests_of(items: Sequence[Item], num_samples: int) -> list[Request]:
    """A request for each picture: sample s of prompt n has the key `n/s`, and with it a seed of its own."""
    return [Request(f"{n:05d}/{s:05d}", (str(item["prompt"]),)) for n, item in enumerate(items) for s in range(num_samples)]


def place(key: str, number: int) -> str:
    """The official place of a picture."""
    prompt, sample = key.split("/")
    return f"{prompt}/samples/{sample}.png"


def write_metadata(folder: Path, lines: Sequence[str]) -> None:
    """The prompt of each folder. Raises ValueError where another one stands."""
    for number, line in enumerate(lines):
        path = folder / f"{number:05d}" / "metadata.jsonl"
        if not path.exists():
            write_text(path, line)
        elif path.read_text(encoding="utf-8").strip() != line:
            raise ValueError(f"{path} holds another prompt than {line}; restore it, or give another output=")


def draw(model: Any, processor: Any, name: str, items: Sequence[Item], settings: Settings, task: str = TASK) -> dict[str, Answer]:
    """The pictures of the prompts `items`, called `name`, in `settings.output`; what is there already is not drawn again.

    task: names the file of the answers, and goes into the seeds. Every process calls this.
    Raises ValueError for a folder of another run, and for an answer without a picture.
    """
    folder, lines = Path(settings.output), metadata_lines(items)
    keep_manifest(
        folder,
        {
            "prompt_set": name,
            "prompts_sha256": lines_sha256(lines),
            "num_samples": settings.num_samples,
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "decoding": to_dict(settings.decoding),
            "dtype": settings.loading.dtype,
            "quantize": settings.loading.quantize,
            "model_sha256": model_hash(model_folder(settings.model)),
        },
    )
    if rank() == 0:
        write_metadata(folder, lines)
    barrier()
    requests, known = requests_of(items, settings.num_samples), num_answers(folder, task)
    answers = ask(model, processor, task, requests, settings.decoding, folder, settings.seed, settings.batch_size, place)
    bare = [key for key, answer in answers.items() if len(answer.stored) != 1]
    if bare:
        raise ValueError(f"{len(bare)} answers hold no picture (the first: {bare[0]}); look at {folder / task}.jsonl")
    if rank() == 0:
        record_provenance(folder, settings, "eval.geneval", len(answers) - known)
    return answers
