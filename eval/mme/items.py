"""MME's questions from the layouts in which they are kept, with pictures that are read when asked for.

| layout | what is there |
|---|---|
| folder | `<subtask>/images/x.jpg` with `<subtask>/questions_answers_YN/x.txt`, or `<subtask>/x.jpg` beside `<subtask>/x.txt` |
| templates | a folder as above, and `eval_tool/Your_Results/<subtask>.txt`: image, question, ground truth |
| parquet | shards with question_id ("<subtask>/<file>"), image, question, answer, category, as on the hub |
| small world | `orthus.data.world.benchmark.small_mme_items` |

Every reader gives the two questions of a picture one after the other, one with the truth yes and one no.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from eval.mme.grading import SUBTASKS, Record, pair_by_image
from eval.whole_files import png
from orthus.data.sources.parquet import ParquetFiles, column_names
from orthus.data.sources.records import Pictures
from orthus.data.world.benchmark import MmeItem, small_mme_items
from orthus.data.world.render import picture as rendered

SUFFIX = " Please answer yes or no."
SINGLE_WORD = "Answer the question using a single word or phrase."
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
COLUMNS = ("question_id", "question", "answer", "category")
ROWS_PER_GROUP = 100
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.parquet")

PROMPT_STYLES: Mapping[str, Callable[[str], str]] = {
    "official": lambda question: question,
    "lmms": lambda question: f"{question.strip().replace(SUFFIX, '')}\n{SINGLE_WORD}",
    "internvl": lambda question: f"{question} {SINGLE_WORD}",
}
"""What is asked: the question as stored, as lmms-eval's default, as InternVL and Bagel. The name belongs beside each number."""


@dataclass(frozen=True)
class Item:
    """One question about a picture. `image_id` is the picture's file name, `truth` yes or no as stored."""

    subtask: str
    image_id: str
    question: str
    truth: str
    load: Callable[[], Image.Image] = field(compare=False, repr=False)

    @property
    def picture_key(self) -> str:
        """`<subtask>/<file>`: the `question_id` of the copies on the hub, which both questions of a picture share."""
        return f"{self.subtask}/{self.image_id}"

    def picture(self) -> Image.Image:
        """The picture, read now, upright and in RGB. Raises `ValueError` naming it if it is missing or damaged."""
        try:
            return self.load()
        except (ValueError, OSError) as error:
            raise ValueError(f"picture {self.picture_key}: {error}") from error

    def prompt(self, style: str) -> str:
        if style not in PROMPT_STYLES:
            raise ValueError(f"unknown prompt style {style!r}; use one of {', '.join(PROMPT_STYLES)}")
        return PROMPT_STYLES[style](self.question)

    def record(self, answer: str) -> Record:
        """What an answer file keeps."""
        return Record(self.image_id, self.question, self.truth, answer)


def blank(load: Callable[[], Image.Image]) -> Image.Image:
    """Instead of a picture: its size, in the colour of its corner."""
    picture = load()
    return Image.new("RGB", picture.size, picture.getpixel((0, 0)))


def open_items(path: Path, templates: Path | None = None) -> list[Item]:
    """The items of a parquet file, a folder of them, or a folder in the official layout (in the order of `templates`, if given).

    Raises `ValueError` for another layout, and for a picture without exactly one yes and one no question.
    """
    shards = [path] if path.suffix == ".parquet" and path.is_file() else sorted(path.rglob("*.parquet"))
    if templates is not None:
        return read_templates(templates, path)
    if shards:
        return read_parquet(shards)
    return read_folder(path)


def read_folder(root: Path) -> list[Item]:
    """The subtasks of which `root` has a folder, pictures in order of name."""
    items: list[Item] = []
    for subtask in SUBTASKS:
        if (root / subtask).is_dir():
            pictures, questions = _places(root / subtask)
            for path in sorted(questions.glob("*.txt")):
                items += _questions_of(path, subtask, pictures)
    if not items:
        raise ValueError(f"{root} holds no question of MME; expected folders such as existence/ with x.jpg beside x.txt")
    return _checked(items)


def _places(folder: Path) -> tuple[Path, Path]:
    """Where a subtask keeps its pictures and its questions."""
    apart = (folder / "images", folder / "questions_answers_YN")
    return apart if apart[0].is_dir() else (folder, folder)


def _questions_of(path: Path, subtask: str, pictures: Path) -> list[Item]:
    image_id = next((path.stem + ending for ending in PICTURES if (pictures / (path.stem + ending)).is_file()), None)
    if image_id is None:
        raise ValueError(f"{path} has no picture {path.stem} with one of {', '.join(PICTURES)} in {pictures}")
    rows = _rows(path, ("question", "answer"))
    return [Item(subtask, image_id, question, truth, _reader(pictures, image_id)) for question, truth in rows]


def _rows(path: Path, names: Sequence[str]) -> Iterator[list[str]]:
    """Tab-separated fields of the lines that are not blank."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        fields = line.strip().split("\t")
        if len(fields) == len(names):
            yield fields
        elif line.strip():
            raise ValueError(f"{path}, line {number}: {len(fields)} fields in {line[:80]!r}; expected {', '.join(names)}")


def _reader(folder: Path, name: str) -> Callable[[], Image.Image]:
    return lambda: Pictures(str(folder))(name)


def read_templates(templates: Path, root: Path) -> list[Item]:
    """The questions of `<subtask>.txt` in their order, pictures from the official folders below `root`."""
    items: list[Item] = []
    for subtask in SUBTASKS:
        path = templates / f"{subtask}.txt"
        if path.is_file():
            pictures, _ = _places(root / subtask)
            for image_id, question, truth in _rows(path, ("image", "question", "ground truth")):
                if not (pictures / image_id).is_file():
                    raise ValueError(f"{path} names {image_id}, which is not in {pictures}")
                items.append(Item(subtask, image_id, question, truth, _reader(pictures, image_id)))
    if not items:
        raise ValueError(f"{templates} holds no question of MME; expected files such as existence.txt")
    return _checked(items)


def read_parquet(shards: Sequence[Path]) -> list[Item]:
    """The rows of all shards. Pictures are read by row group when asked for.

    Raises `ValueError` naming the shard of x-00000-of-00004.parquet, ... that is not among them.
    """
    _require_all(shards)
    texts, images = ParquetFiles(COLUMNS), ParquetFiles(("image",))
    items: list[Item] = []
    for shard in map(str, shards):
        lacking = {*COLUMNS, "image"} - set(column_names(shard))
        if lacking:
            raise ValueError(f"{shard} lacks the columns {', '.join(sorted(lacking))}; is it a copy of MME?")
        images.sizes(shard)
        for row in range(sum(texts.sizes(shard))):
            record = texts.read(shard, row)
            subtask, _, image_id = record["question_id"].partition("/")
            if subtask != record["category"] or not image_id:
                raise ValueError(f"{shard}, row {row}: question_id {record['question_id']!r} is not of {record['category']!r}")
            items.append(Item(subtask, image_id, record["question"], record["answer"], _row_reader(images, shard, row)))
    return _checked(items)


def _require_all(shards: Sequence[Path]) -> None:
    """That names which announce a number of shards are as many."""
    for shard in shards:
        if found := SHARD.fullmatch(shard.name):
            stem, _, total = found.groups()
            for number in range(int(total)):
                wanted = shard.with_name(f"{stem}-{number:05d}-of-{total}.parquet")
                if wanted not in shards:
                    raise ValueError(f"{wanted} lacks beside {shard.name}; give the folder that holds all {int(total)} shards")


def _row_reader(images: ParquetFiles, shard: str, row: int) -> Callable[[], Image.Image]:
    return lambda: Pictures(str(Path(shard).parent))(images.read(shard, row)["image"])


def small_world_items(num_images_per_subtask: int = 100, seed: int = 0) -> list[Item]:
    """SmallMME in MME's form: existence, count, position and color, about scenes of the small world."""
    return in_mme_form(small_mme_items(num_images_per_subtask, seed))


def twin_of(image_id: str) -> str:
    """The pair that a picture of the small world belongs to."""
    return Path(image_id).stem[:-1]


def in_mme_form(items: Sequence[MmeItem]) -> list[Item]:
    """The small world's items, two for each picture; `image_id` is the file name of theirs."""
    return _checked(
        [
            Item(item.subtask, f"{item.image_id.partition('/')[2]}.png", question, truth, partial(rendered, item.scene))
            for item in items
            for question, truth in item.questions
        ]
    )


def _checked(items: Sequence[Item]) -> list[Item]:
    """The items with the two of a picture together, in order of appearance. Raises `ValueError` naming a wrong picture."""
    pair_by_image(Record(item.picture_key, item.question, item.truth, "") for item in items)
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.picture_key, []).append(item)
    return [item for group in groups.values() for item in group]


def write_parquet(items: Sequence[Item], path: Path) -> None:
    """All items as one file that `datasets` opens as the copies on the hub (pictures as PNG). Whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = {name: {"dtype": "string", "_type": "Value"} for name in COLUMNS}
    features = {"question_id": text["question_id"], "image": {"_type": "Image"}} | text
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [(name, image if name == "image" else pa.string()) for name in features],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            for start in range(0, len(items), ROWS_PER_GROUP):
                rows = [_row(item) for item in items[start : start + ROWS_PER_GROUP]]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _row(item: Item) -> dict[str, Any]:
    image = {"bytes": png(item.picture()), "path": item.image_id}
    return {
        "question_id": item.picture_key,
        "image": image,
        "question": item.question,
        "answer": item.truth,
        "category": item.subtask,
    }
