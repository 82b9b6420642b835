"""Asking a model many prompts, resumably: requests in, one line per answer out, pictures as PNG files beside it.

Each request has its own seed, a hash of the run's seed and its key, so that an answer's noise depends neither on the batch
nor on resumption. (Batched matrix products still round differently from single ones.)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from orthus.data.schema import Segment, Turn
from orthus.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """One prompt: `segments` of the user's turn. `key` names it within its task."""

    key: str
    segments: tuple[Segment, ...]


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
class Answer:
    """What the model said: text and pictures, and whether it ended by itself (with the separator)."""

    key: str
    segments: tuple[Segment, ...]
    has_ended: bool

    @property
    def text(self) -> str:
        return " ".join(segment for segment in self.segments if isinstance(segment, str))

    @property
    def picture_number(self) -> int | None:
        """Place of the first picture among the segments, which its file name carries."""
        return next((i for i, segment in enumerate(self.segments) if isinstance(segment, Image.Image)), None)

    @property
    def pictures(self) -> list[Image.Image]:
        return [segment for segment in self.segments if isinstance(segment, Image.Image)]


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
) -> dict[str, Answer]:
    """Answers by key; those already in `folder/<task>.jsonl` are read, not generated again."""
    path = folder / f"{task}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    done = read_records(path)
    open_requests = [request for request in requests if request.key not in done]
    with tqdm(total=len(requests), initial=len(requests) - len(open_requests), desc=task, unit="prompt") as bar:
        for start in range(0, len(open_requests), batch_size):
            batch = open_requests[start : start + batch_size]
            seeds = [item_seed(seed, task, request.key) for request in batch]
            records = [
                _record(answer, folder, f"{task}-{answer.key.replace('/', '_')}")
                for answer in _answer_batch(model, processor, batch, decoding, seeds)
            ]
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
            done.update({record["key"]: record for record in records})
            bar.update(len(batch))
    return {request.key: _restore(done[request.key], folder) for request in requests}


def _answer_batch(model: Any, processor: Any, batch: Sequence[Request], decoding: Decoding, seeds: Sequence[int]) -> list[Answer]:
    turns = [[Turn("user", request.segments)] for request in batch]
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
    said = processor.decode_segments(output)
    return [
        Answer(request.key, tuple(segments), has_ended) for request, segments, has_ended in zip(batch, said, ended, strict=True)
    ]


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Records by key; a last line that a kill cut short is dropped from the file."""
    if not path.exists():
        return {}
    whole, _, rest = path.read_text(encoding="utf-8").rpartition("\n")
    if rest:
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    records = [json.loads(line) for line in whole.splitlines()]
    return {record["key"]: record for record in records}


def _record(answer: Answer, folder: Path, name: str) -> dict[str, Any]:
    segments: list[Mapping[str, str]] = []
    for number, segment in enumerate(answer.segments):
        if isinstance(segment, str):
            segments.append({"text": segment})
            continue
        file_name = f"images/{name}-{number}.png"
        target = folder / file_name
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_suffix(".tmp")
        segment.save(temporary, format="PNG")
        os.replace(temporary, target)
        segments.append({"image": file_name})
    return {"key": answer.key, "segments": segments, "has_ended": answer.has_ended}


def _restore(record: Mapping[str, Any], folder: Path) -> Answer:
    segments: list[Segment] = []
    for segment in record["segments"]:
        if "text" in segment:
            segments.append(segment["text"])
        else:
            with Image.open(folder / segment["image"]) as picture:
                segments.append(picture.convert("RGB"))
    return Answer(record["key"], tuple(segments), record["has_ended"])
