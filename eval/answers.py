"""Asking a model many prompts: resumable, shared by processes, and the same to the byte however it was run.

Requests are cut into batches once; process r of W (torchrun) takes batches r, r + W, ..., and a batch of which anything lacks is
answered whole. The seed of a request is a hash of the run's seed, its task and its key. So neither the number of processes nor a
kill changes what stands beside an answer in its batch, or its noise. Files, in the run's folder:

    <task>.rank00000.jsonl   one line per answer, appended batch by batch and flushed to the disk
    <task>.jsonl             all answers in the order of the requests, once every process is done
    images/...png            written whole or not at all; a record holds the sha256 of each
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from eval.whole_files import png, write_bytes, write_text
from orthus.data.schema import Segment, Turn
from orthus.sampling import Sampling
from orthus.training.distributed import barrier, rank, world_size

Part = Segment | Callable[[], Image.Image]
"""A piece of a prompt: text, a picture or what reads it."""
Place = Callable[[str, int], str]
"""From a request's key and the number of a segment to the file of its picture, in the run's folder."""


@dataclass(frozen=True)
class Request:
    """One prompt: `segments` of the user's turn, pictures or functions that read them. `key` is its name in the task."""

    key: str
    segments: tuple[Part, ...]

    def read(self) -> tuple[Segment, ...]:
        """The segments with all pictures read."""
        return tuple(segment() if callable(segment) else segment for segment in self.segments)


@dataclass(frozen=True)
class Decoding:
    """How a task is decoded. `guidance` weighs the text; `image_guidance` (editing) the picture in the prompt; `text_guidance`
    the prompt where words are written before a picture. The others down to `guidance_rescale` are those of
    [`orthus.sampling.Sampling`], None: as the model's own config says."""

    modality: str
    guidance: float = 1.0
    text_guidance: float = 1.0
    image_guidance: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    num_diffusion_steps: int | None = None
    solver: str | None = None
    spacing: str | None = None
    step_schedule: str = "constant"
    last_diffusion_steps: int | None = None
    guidance_schedule: str = "constant"
    guidance_rescale: float = 0.0
    max_new_tokens: int | None = None
    max_images: int | None = None
    force_image: bool = False


@dataclass(frozen=True)
class StoredPicture:
    """A picture on the disk and the sha256 of its file."""

    path: Path
    sha256: str

    def is_whole(self) -> bool:
        return self.path.is_file() and hashlib.sha256(self.path.read_bytes()).hexdigest() == self.sha256

    def open(self) -> Image.Image:
        """The picture in RGB. Raises ValueError if the file is missing, cut short or another one."""
        if not self.is_whole():
            raise ValueError(f"{self.path} is missing, cut short or was changed since it was drawn; generate again to mend it")
        with Image.open(self.path) as picture:
            return picture.convert("RGB")


@dataclass(frozen=True)
class Answer:
    """What the model said: text and pictures, and whether it ended by itself (with the separator)."""

    key: str
    segments: tuple[str | StoredPicture, ...]
    has_ended: bool

    @property
    def text(self) -> str:
        return " ".join(segment for segment in self.segments if isinstance(segment, str))

    @property
    def stored(self) -> list[StoredPicture]:
        return [segment for segment in self.segments if isinstance(segment, StoredPicture)]

    @property
    def pictures(self) -> list[Image.Image]:
        """Read from the disk at each call."""
        return [stored.open() for stored in self.stored]


def item_seed(seed: int, task: str, key: str) -> int:
    """Seed of one item, independent of batch, order and resumption."""
    digest = hashlib.sha256(f"{seed}/{task}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def ask(
    model: Any,
    processor: Any,
    task: str,
    requests: Sequence[Request],
    decoding: Decoding,
    folder: Path,
    seed: int = 0,
    batch_size: int = 64,
    place: Place | None = None,
) -> dict[str, Answer]:
    """Answers by key; those that `folder` holds already are not generated again. Every process calls this and gets them all.

    place: where pictures lie; default `images/<task>-<key>-<segment>.png`.
    Raises ValueError if `folder` holds answers to other requests of this task, and for keys whose pictures would be one file.
    """
    place = place or (lambda key, number: f"images/{task}-{key.replace('/', '_')}-{number}.png")
    order = [request.key for request in requests]
    if decoding.modality != "text":
        _require_own_files(order, place)
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.rglob(".*.tmp"):  # of a killed run
            unfinished.unlink()
        _merge(folder, task, order)
    barrier()
    answers = _read_answers(folder, task)
    done = {key for key, answer in answers.items() if all(stored.is_whole() for stored in answer.stored)}
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    mine = [batch for batch in batches[rank() :: world_size()] if any(request.key not in done for request in batch)]
    num_open = sum(len(batch) for batch in mine)
    num_here = sum(len(batch) for batch in batches[rank() :: world_size()])
    shard = folder / f"{task}.rank{rank():05d}.jsonl"
    with tqdm(total=num_here, initial=num_here - num_open, desc=task, unit="prompt", disable=rank() > 0) as bar:
        for batch in mine:
            seeds = [item_seed(seed, task, request.key) for request in batch]
            said = _answer_batch(model, processor, batch, decoding, seeds)
            pairs = list(zip(batch, said, strict=True))
            records = [_record(r.key, *answer, folder, place) for r, answer in pairs if r.key not in done]
            _append(shard, records)
            bar.update(len(batch))
    barrier()
    if rank() == 0:
        _merge(folder, task, order)
    barrier()
    return _read_answers(folder, task)


def stored_answers(folder: Path, task: str, requests: Sequence[Request]) -> dict[str, Answer]:
    """The answers of a finished run. Raises ValueError, naming what lacks, if it is not finished."""
    if list(folder.glob(f"{task}.rank*.jsonl")):
        raise ValueError(f"{folder} holds {task} answers of an unfinished run; let the same command finish it")
    answers = _read_answers(folder, task)
    lacking = [request.key for request in requests if request.key not in answers]
    if lacking or len(answers) != len(requests):
        shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise ValueError(
            f"{folder / task}.jsonl has {len(answers)} answers to {len(requests)} requests ({len(lacking)} lack: {shown}); "
            "generate again, which adds what lacks"
        )
    return answers


def num_answers(folder: Path, task: str) -> int:
    """How many answers a folder holds, those of an unfinished run included."""
    return len({key for path in (folder / f"{task}.jsonl", *folder.glob(f"{task}.rank*.jsonl")) for key in read_records(path)})


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Records by key; a last line that a kill cut short does not count. Raises ValueError for another broken line."""
    if not path.exists():
        return {}
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            records[record["key"]] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not an answer: {line[:80]!r}; delete the line, generate again") from error
    return records


def _require_own_files(keys: Sequence[str], place: Place) -> None:
    files: dict[str, str] = {}
    for key in keys:
        file = place(key, 0)
        if file in files:
            raise ValueError(f"answers to {files[file]!r} and {key!r} would share the file {file}; give one of them another key")
        files[file] = key


def _merge(folder: Path, task: str, order: Sequence[str]) -> None:
    """Bring the records of all processes, of this run and of a killed one, into one file in the order of the requests."""
    final, shards = folder / f"{task}.jsonl", sorted(folder.glob(f"{task}.rank*.jsonl"))
    records = read_records(final)
    for shard in shards:
        records |= read_records(shard)
    places = {key: number for number, key in enumerate(order)}
    unknown = [key for key in records if key not in places]
    if unknown:
        raise ValueError(f"{folder} answers other {task} requests ({unknown[0]!r} is not asked now); give another output=")
    lines = [json.dumps(records[key]) + "\n" for key in sorted(records, key=places.__getitem__)]
    write_text(final, "".join(lines))
    for shard in shards:
        shard.unlink()


def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def _answer_batch(
    model: Any, processor: Any, batch: Sequence[Request], decoding: Decoding, seeds: Sequence[int]
) -> list[tuple[list[Segment], bool]]:
    """Segments of each answer, and whether it ended by itself."""
    turns = [[Turn("user", request.read())] for request in batch]
    device = model.device
    inputs = processor(turns=turns).to(device)
    weights = (decoding.guidance, decoding.text_guidance, decoding.image_guidance or 1.0)
    is_guided = decoding.modality != "text" and any(weight != 1.0 for weight in weights)
    streams = (
        processor.guidance_streams(turns, decoding.guidance, decoding.image_guidance, decoding.text_guidance) if is_guided else {}
    )
    output = model.generate(
        **inputs,
        **{name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in streams.items()},
        modality=decoding.modality,
        **{field.name: getattr(decoding, field.name) for field in fields(Sampling)},
        max_new_tokens=decoding.max_new_tokens,
        max_images=decoding.max_images,
        force_image=decoding.force_image,
        generator=[torch.Generator(device).manual_seed(seed) for seed in seeds],
    )
    ended = [processor.separator_token_id in row.tolist() for row in output.sequences]
    return list(zip(processor.decode_segments(output), ended, strict=True))


def _record(key: str, segments: Sequence[Segment], has_ended: bool, folder: Path, place: Place) -> dict[str, Any]:
    """One line of the answers' file; pictures are written before it."""
    stored: list[Mapping[str, str]] = []
    for number, segment in enumerate(segments):
        if isinstance(segment, str):
            stored.append({"text": segment})
            continue
        content, name = png(segment), place(key, number)
        write_bytes(folder / name, content)
        stored.append({"image": name, "sha256": hashlib.sha256(content).hexdigest()})
    return {"key": key, "segments": stored, "has_ended": has_ended}


def _read_answers(folder: Path, task: str) -> dict[str, Answer]:
    answers = {}
    for key, record in read_records(folder / f"{task}.jsonl").items():
        parts = [s["text"] if "text" in s else StoredPicture(folder / s["image"], s["sha256"]) for s in record["segments"]]
        answers[key] = Answer(key, tuple(parts), record["has_ended"])
    return answers
