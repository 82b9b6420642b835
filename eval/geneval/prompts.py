"""The published prompt set of GenEval, drawn again: 553 prompts of six tasks for seed 43 and 100 draws per task.

Which numbers are drawn, and in which order, decides every later prompt; the articles and plurals are the published ones,
"computer mouses" and "skises" included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from eval.geneval.verdict import COLORS, RELATIONS

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat",
    "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl",
    "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's 80 classes in its order, three of them under GenEval's names."""
NUMBER_WORDS = ("two", "three", "four")
OFFICIAL_SEED, OFFICIAL_DRAWS = 43, 100

Item = dict[str, Any]


def draw_prompts(seed: int = OFFICIAL_SEED, num_draws: int = OFFICIAL_DRAWS) -> list[Item]:
    """Metadata of each prompt in the published order, duplicates left out; `num_draws` for each task but the first."""
    if num_draws < 0:
        raise ValueError(f"{num_draws} draws per task; give 0 or more")
    rng = np.random.default_rng(seed)
    items = [_one_of(CLASSES[index]) for index in rng.choice(len(CLASSES), len(CLASSES), replace=False)]
    tasks: Sequence[Callable[[np.random.Generator], Item]] = (_two_objects, _counting, _color, _position, _two_colors)
    items += [draw(rng) for draw in tasks for _ in range(num_draws)]
    return list({json.dumps(item): item for item in items}.values())


def metadata_lines(items: Sequence[Item]) -> list[str]:
    """Lines of the published `evaluation_metadata.jsonl`, without line ends."""
    return [json.dumps(item) for item in items]


@cache
def official_lines() -> tuple[str, ...]:
    """The 553 metadata lines of the published prompt set; `json.loads` of each is that prompt's metadata."""
    return tuple(metadata_lines(draw_prompts()))


def lines_sha256(lines: Sequence[str]) -> str:
    """What names a prompt set in manifests: sha256 over its metadata lines, joined by line ends."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_prompts(folder: Path, seed: int, num_draws: int) -> int:
    """Write the two published files into `folder` and return the number of prompts."""
    items = draw_prompts(seed, num_draws)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "generation_prompts.txt": [item["prompt"] for item in items],
        "evaluation_metadata.jsonl": metadata_lines(items),
    }
    for name, lines in texts.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    return len(items)


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _one_of(name: str) -> Item:
    return {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of {_a(name)}"}


def _two_objects(rng: np.random.Generator) -> Item:
    first, second = (CLASSES[index] for index in rng.choice(len(CLASSES), 2, replace=False))
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    return {"tag": "two_object", "include": include, "prompt": f"a photo of {_a(first)} and {_a(second)}"}


def _counting(rng: np.random.Generator) -> Item:
    name = CLASSES[rng.choice(len(CLASSES))]
    count = int(rng.integers(2, 4, endpoint=True))
    plural = name + ("es" if name.endswith("s") else "s")
    return {
        "tag": "counting",
        "include": [{"class": name, "count": count}],
        "exclude": [{"class": name, "count": count + 1}],
        "prompt": f"a photo of {NUMBER_WORDS[count - 2]} {plural}",
    }


def _color(rng: np.random.Generator) -> Item:
    """Any class but the first, "person"; the class is drawn before the colour."""
    name = CLASSES[rng.choice(len(CLASSES) - 1) + 1]
    color = COLORS[rng.choice(len(COLORS))]
    include = [{"class": name, "count": 1, "color": color}]
    return {"tag": "colors", "include": include, "prompt": f"a photo of {_a(color)} {name}"}


def _position(rng: np.random.Generator) -> Item:
    """The prompt names the moved object first; its clause comes second and refers to that of the reference."""
    moved, reference = (CLASSES[index] for index in rng.choice(len(CLASSES), 2, replace=False))
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    include = [{"class": reference, "count": 1}, {"class": moved, "count": 1, "position": [relation, 0]}]
    return {"tag": "position", "include": include, "prompt": f"a photo of {_a(moved)} {relation} {_a(reference)}"}


def _two_colors(rng: np.random.Generator) -> Item:
    names = [CLASSES[index + 1] for index in rng.choice(len(CLASSES) - 1, 2, replace=False)]
    colors = [COLORS[index] for index in rng.choice(len(COLORS), 2, replace=False)]
    include = [{"class": name, "count": 1, "color": color} for name, color in zip(names, colors, strict=True)]
    parts = [f"{_a(color)} {name}" for name, color in zip(names, colors, strict=True)]
    return {"tag": "color_attr", "include": include, "prompt": f"a photo of {' and '.join(parts)}"}
