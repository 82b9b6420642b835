"""Prompt files and answer folders of public benchmarks whose own scripts grade: one reader and one writer for each.

Read from the repositories that `LAYOUTS` names, at the commits given there. InterleavedBench is not here: its repository holds
neither a grading script nor the form of its answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from eval.answers import Answer, Part, Request, StoredPicture
from orthus.image_processing import load_image, to_rgb

DPG_PICTURES, T2I_PICTURES = 4, 10
MAX_NAME_BYTES = 255
JPEG: dict[str, Any] = {"format": "JPEG", "quality": 95, "subsampling": 0}
CommTask = Literal["task1", "task2", "task3", "task4"]
COMM_OPENINGS: dict[CommTask, tuple[str, str]] = {
    "task1": (
        "Here are step-by-step instructions images sequence about {}:",
        "According to the above images, can you generate text for each step?",
    ),
    "task2": (
        "Here are step-by-step instructions without images about {}:",
        "According to the above steps, can you generate images for each step?",
    ),
    "task3": (
        "Here are step-by-step instructions with images about {}:",
        "According to the above steps, can you generate the rest steps?",
    ),
    "task4": ("Can you generate step-by-step instructions with images about {}?", ""),
}
COMM_STEP = re.compile(r"\(\d+\)\s")
COMM_PICTURE = "<IMAGE>"


@dataclass(frozen=True)
class Source:
    """The user's files of a benchmark: its prompts, its pictures ("" where it has none), and CoMM's task."""

    prompts: Path
    images: Path | None
    comm_task: CommTask


@dataclass(frozen=True)
class Item:
    """A prompt with the requests whose answers its file holds (as many as pictures are wanted), and what the writer needs."""

    name: str
    requests: tuple[Request, ...]
    record: Any = None


Answers = Mapping[str, Answer]


@dataclass(frozen=True)
class Layout:
    """read: prompts to items; write: their answers into an empty folder, whose name must end in `suffix`. `then`: what grades."""

    repository: str
    modality: Literal["image", "interleaved"]
    read: Callable[[Source], list[Item]]
    write: Callable[[Path, Sequence[Item], Answers], None]
    then: str
    suffix: str = ""


def _picture(path: Path) -> Image.Image:
    try:
        return to_rgb(load_image(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _shown(path: Path) -> Callable[[], Image.Image]:
    """Reads the picture when the prompt is asked. Raises ValueError at once if it is missing."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; the prompts show it")
    return partial(_picture, path)


def _folder(source: Source) -> Path:
    if source.images is None or not source.images.is_dir():
        raise ValueError(
            f"images={str(source.images or '')!r} is no folder; give the benchmark's pictures, which its prompts show"
        )
    return source.images


def only_picture(answer: Answer) -> Image.Image:
    """The one picture of an answer, whatever words stand beside it. ValueError for none or several."""
    if len(answer.stored) != 1:
        raise ValueError(f"answer {answer.key!r} has {len(answer.stored)} pictures, the benchmark takes one; generate it again")
    return answer.pictures[0]


def steps(answer: Answer) -> list[tuple[str, list[StoredPicture]]]:
    """An answer as texts, each with the pictures that follow it; "" where pictures come first."""
    found: list[tuple[str, list[StoredPicture]]] = []
    for segment in answer.segments:
        if isinstance(segment, str):
            found.append((segment.strip(), []))
        elif found:
            found[-1][1].append(segment)
        else:
            found.append(("", [segment]))
    return found


# ---------------------------------------------------------------------- DPG-Bench


def read_dpg(source: Source) -> list[Item]:
    """A folder of <name>.txt, one prompt each."""
    files = sorted(source.prompts.glob("*.txt")) if source.prompts.is_dir() else []
    if not files:
        raise ValueError(f"prompts={source.prompts} is no folder of .txt files; give dpg_bench/prompts of the repository")
    items = []
    for file in files:
        if "." in file.stem:
            raise ValueError(f"{file.name} has a dot in its name, which the grading script cuts there; rename it")
        text = file.read_text(encoding="utf-8").strip()
        requests = tuple(Request(f"{file.stem}/{number}", (text,)) for number in range(DPG_PICTURES))
        items.append(Item(file.stem, requests))
    return items


def write_dpg(output: Path, items: Sequence[Item], answers: Answers) -> None:
    """<name>.png, a grid of 2 x 2 in reading order; the script crops it at its RESOLUTION, the side of one picture."""
    sides = set()
    for item in items:
        pictures = [only_picture(answers[request.key]) for request in item.requests]
        sides |= {picture.size for picture in pictures}
        if len(sides) > 1 or pictures[0].width != pictures[0].height:
            raise ValueError(f"pictures of sizes {sorted(sides)} at {item.name!r}; the script crops squares of one size")
        side = pictures[0].width
        grid = Image.new("RGB", (2 * side, 2 * side))
        for number, picture in enumerate(pictures):
            grid.paste(picture, (number % 2 * side, number // 2 * side))
        grid.save(output / f"{item.name}.png")


# ---------------------------------------------------------------------- T2I-CompBench


def read_t2i(source: Source) -> list[Item]:
    """Lines of <category>_val.txt; a tab ends the prompt. Ten pictures each, as the script 3_in_1.py takes."""
    items = []
    for number, line in enumerate(source.prompts.read_text(encoding="utf-8").splitlines()):
        prompt = line.split("\t")[0]
        name = f"{prompt}_000000.png"
        if not prompt.strip() or "_" in prompt or "/" in prompt or len(name.encode()) > MAX_NAME_BYTES:
            raise ValueError(
                f"{source.prompts}, line {number + 1}: {prompt!r} cannot be read back from a file name, as the scripts do: it is "
                "empty, too long, or holds _ or /"
            )
        requests = tuple(Request(f"{number:05d}/{sample}", (prompt,)) for sample in range(T2I_PICTURES))
        items.append(Item(prompt, requests))
    return items


def write_t2i(output: Path, items: Sequence[Item], answers: Answers) -> None:
    """samples/<prompt>_<number>.png, numbered through the whole file."""
    (output / "samples").mkdir()
    pairs = [(item.name, request.key) for item in items for request in item.requests]
    for number, (prompt, key) in enumerate(pairs):
        only_picture(answers[key]).save(output / "samples" / f"{prompt}_{number:06d}.png")


# ---------------------------------------------------------------------- ImgEdit


def read_imgedit(source: Source) -> list[Item]:
    """basic_edit.json or UGE_edit.json: {key: {"id": file in the pictures' folder, "prompt": instruction}}."""
    folder = _folder(source)
    records = json.loads(source.prompts.read_text(encoding="utf-8"))
    if not isinstance(records, dict):
        raise ValueError(f"{source.prompts} is not a JSON object from key to edit; give basic_edit.json or UGE_edit.json")
    return [Item(key, (Request(key, (_shown(folder / record["id"]), record["prompt"])),)) for key, record in records.items()]


def write_imgedit(output: Path, items: Sequence[Item], answers: Answers) -> None:
    """<key>.png."""
    for item in items:
        only_picture(answers[item.name]).save(output / f"{item.name}.png")


# ---------------------------------------------------------------------- OpenING


def read_opening(source: Source) -> list[Item]:
    """Lines of test_data.jsonl; pictures are named relative to the folder OpenING-Benchmark."""
    folder = _folder(source)
    items = []
    for line in source.prompts.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        segments: list[Part] = []
        for part in record["conversations"][0]["input"]:
            segments.append(part["text"].replace("<BEGIN>", "").replace("<image>", "").strip())
            if part["image"]:
                segments.append(_shown(folder / part["image"]))
        items.append(Item(record["total_uid"], (Request(record["total_uid"], tuple(segments)),), record))
    return items


def write_opening(output: Path, items: Sequence[Item], answers: Answers) -> None:
    """<uid>.json, the record with the model's steps as output, and <uid>-o-<step>.jpg beside it."""
    for item in items:
        said: list[dict[str, str | None]] = []
        for text, pictures in steps(answers[item.name]):
            for words, stored in [(text, pictures[0] if pictures else None), *(("", more) for more in pictures[1:])]:
                name = f"{item.name}-o-{len(said)}.jpg" if stored else None
                if stored and name:
                    stored.open().save(output / name, **JPEG)
                said.append({"text": words, "image": name})
        record = {**item.record, "conversations": [item.record["conversations"][0], {"output": said}]}
        (output / f"{item.name}.json").write_text(json.dumps(record, indent=4), encoding="utf-8")


# ---------------------------------------------------------------------- CoMM


@dataclass(frozen=True)
class CommRecord:
    """The pictures that are shown and those that the model is compared with (files); the number of the first step to answer."""

    shown: list[Path]
    truth: list[Path]
    first_step: int


def read_comm(source: Source) -> list[Item]:
    """The list of records that CoMM saves with torch: data_id, title, step_info [[{type, content | image_path}]]."""
    folder = _folder(source)
    records = torch.load(source.prompts, map_location="cpu", weights_only=True)
    opening, closing = COMM_OPENINGS[source.comm_task]
    items = []
    for record in records:
        steps_of = record["step_info"]
        num_shown = {"task1": len(steps_of), "task2": len(steps_of), "task3": len(steps_of) // 2, "task4": 0}[source.comm_task]
        segments: list[Part] = [opening.format(record["title"] or "")]
        pictures: tuple[list[Path], list[Path]] = ([], [])
        for number, step in enumerate(steps_of, start=1):
            is_shown = number <= num_shown
            segments += [f"({number})"] if is_shown else []
            for part in step:
                if part["type"] == "text":
                    segments += [" ".join(part["content"].split())] if is_shown and source.comm_task != "task1" else []
                    continue
                is_input = is_shown and source.comm_task != "task2"
                pictures[0 if is_input else 1].append(folder / part["image_path"])
                segments += [_shown(folder / part["image_path"])] if is_input else []
        segments += [closing] if num_shown else []
        name = f"{record['data_id']}_{source.comm_task}"
        first_step = 1 + num_shown if source.comm_task == "task3" else 1
        items.append(Item(name, (Request(name, _joined(segments)),), CommRecord(*pictures, first_step)))
    return items


def _joined(segments: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbouring texts as one, with a space between."""
    joined: list[Part] = []
    for segment in segments:
        if isinstance(segment, str) and joined and isinstance(joined[-1], str):
            joined[-1] = f"{joined[-1]} {segment}"
        else:
            joined.append(segment)
    return tuple(joined)


def write_comm(output: Path, items: Sequence[Item], answers: Answers) -> None:
    """<data_id>_<task>/results.json, predictions beside it and the benchmark's own pictures under origin/."""
    for item in items:
        place, record, answer = output / item.name, item.record, answers[item.name]
        (place / "origin").mkdir(parents=True)
        first = 1 + len(record.shown)
        names = {"input": record.shown, "output_gt": record.truth}
        for kind, paths in names.items():
            for number, path in enumerate(paths, start=1 if kind == "input" else first):
                _picture(path).save(place / "origin" / f"{kind}_{number}.jpg", **JPEG)
        for number, stored in enumerate(answer.stored, start=first):
            stored.open().save(place / f"predict_{number}.jpg", **JPEG)
        shown = [segment if isinstance(segment, str) else COMM_PICTURE for segment in item.requests[0].segments]
        result = {
            "model_input": " ".join(shown),
            "model_output": comm_output(answer, record.first_step),
            "input_image_list": [f"input_{number}.jpg" for number in range(1, 1 + len(record.shown))],
            "output_gt_image_list": [f"output_gt_{first + number}.jpg" for number in range(len(record.truth))],
            "prediction_image_list": [f"predict_{first + number}.jpg" for number in range(len(answer.stored))],
        }
        (place / "results.json").write_text(json.dumps(result, indent=4), encoding="utf-8")


def comm_output(answer: Answer, first: int) -> str:
    """The answer as the scripts split it, "(1) words <IMAGE> (2) ...": its own numbers where it wrote any, else one per text.

    Raises ValueError where the words hold <IMAGE> themselves.
    """
    if COMM_PICTURE in answer.text:
        raise ValueError(f"answer {answer.key!r} holds {COMM_PICTURE} as words, which the script counts as a picture")
    is_numbered = COMM_STEP.search(answer.text) is not None
    parts = []
    for number, (text, pictures) in enumerate(steps(answer), start=first):
        parts += [text] if is_numbered else [f"({number})", text]
        parts += [COMM_PICTURE] * len(pictures)
    return " ".join(part for part in parts if part)


LAYOUTS: dict[str, Layout] = {
    "dpg_bench": Layout(
        "TencentQQGYLab/ELLA@3c228f1", "image", read_dpg, write_dpg, "bash dpg_bench/dist_eval.sh {output} SIDE_OF_ONE_PICTURE"
    ),
    "t2i_compbench": Layout(
        "Karine-Huang/T2I-CompBench@1b70949", "image", read_t2i, write_t2i, "its scripts with --out_dir or --outpath {output}/"
    ),
    "imgedit": Layout(
        "PKU-YuanGroup/ImgEdit@547185d", "image", read_imgedit, write_imgedit, "basic_bench.py --result_img_folder {output} ..."
    ),
    "opening": Layout(
        "LanceZPF/OpenING@56b663b",
        "interleaved",
        read_opening,
        write_opening,
        "its judges, with {output} beside theirs",
        "_output",
    ),
    "comm": Layout(
        "HKUST-LongGroup/CoMM@0da05d4", "interleaved", read_comm, write_comm, "eval_metric.py --predict_results_path {output} ..."
    ),
}
