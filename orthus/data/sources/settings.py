"""What a source is: which files, how they are written, under which names the fields go."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["webdataset", "llava", "parquet", "interleaved", "editing", "text"]
TASKS = {"webdataset": "t2i", "llava": "vqa", "interleaved": "story", "editing": "edit", "text": "text"}
# Our field -> the names it goes by in the wild, the first that a record has is taken.
NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image", "images", "jpg", "png", "webp"),
    "caption": ("caption", "text"),
    "conversations": ("conversations", "messages"),
    "images": ("images",),  # OBELICS
    "texts": ("texts",),
    "text_list": ("text_list",),  # MMC4
    "image_info": ("image_info",),
    "source": ("input_image", "source_image", "source_img", "source"),
    "instruction": ("edit_prompt", "instruction"),
    "target": ("edited_image", "target_image", "target_img", "target"),
    "text": ("text",),
}


@dataclass(frozen=True)
class SourceSettings:
    """One source of examples.

    kind: "webdataset" (tar shards of pictures with captions), "llava" (conversations), "interleaved" (documents as MMC4 and
        OBELICS write them), "editing" (picture, instruction, edited picture), "text", or "parquet" (any of these forms, told
        from its columns; the other kinds read .parquet files as well).
    path: a file, a folder, a glob, or braces as in shards/{00000..00099}.tar.
    images: the folder that picture names in records start from.
    weight: share of the mixture, relative to the other weights.
    name: in logs and errors; default is the kind and the stem of the path.
    task: what the examples are counted and dropped as; default is the one of the small world that the form is nearest to.
    columns: our field -> the name it has in these files (see `NAMES`), where it is not one of the usual ones.
    answer: what the assistant answers a caption or picture with: the "picture", or the "text" that describes it.
    prompt: what the user says before a document, a text or a description.
    allow_bad_shards: how many damaged files may be left out, with a warning, before opening refuses.
    """

    kind: Kind
    path: str
    images: str | None = None
    weight: float = 1.0
    name: str | None = None
    task: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    answer: Literal["picture", "text"] = "picture"
    prompt: str | None = None
    allow_bad_shards: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} is unknown; use one of {', '.join(get_args(Kind))}")
        if not self.path:
            raise ValueError("path is empty; give a file, a folder, a glob or shards/{00000..00099}.tar")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight={self.weight} of {self.path} is not a number above 0; leave the source out instead")
        unknown = sorted(set(self.columns) - set(NAMES))
        if unknown:
            raise ValueError(f"columns names unknown fields {unknown}; ours are {', '.join(NAMES)}")
        if self.answer not in ("picture", "text"):
            raise ValueError(f"answer={self.answer!r} is unknown; use 'picture' or 'text'")
        if self.allow_bad_shards < 0:
            raise ValueError(f"allow_bad_shards={self.allow_bad_shards} is negative; give how many files may be left out")
        for key in ("name", "task", "prompt"):
            if getattr(self, key) == "":
                raise ValueError(f"{key} is empty; leave it out (null) for the default")

    @property
    def label(self) -> str:
        """The name in logs and errors."""
        return self.name or f"{self.kind}:{Path(self.path).stem}"
