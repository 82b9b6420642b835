"""Answers as the folder that a public benchmark's own scripts grade; with `model`, it is asked first.

`python -m eval.export BENCH prompts=FILE answers=DIR output=DIR [images=DIR] [model=checkpoints/orthus-small guidance=2.0]`

BENCH, and its prompts: dpg_bench (folder dpg_bench/prompts), t2i_compbench (color_val.txt, ...), imgedit (basic_edit.json or
UGE_edit.json), opening (test_data.jsonl; name `output` MODELNAME_output), comm (its saved list of records). `answers` holds
BENCH.jsonl as eval.answers writes it; asking resumes. `output` must be new: the scripts grade whatever lies there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from eval.answers import Answer, Decoding, Request, ask, stored_answers
from eval.exits import exit_code
from eval.export_layouts import LAYOUTS, CommTask, Item, Layout, Source
from eval.loading import ModelSettings, load, require_model
from eval.provenance import check_manifest, from_command_line
from orthus.training.distributed import rank


@dataclass(frozen=True)
class Settings:
    """What is exported, and how a model is asked; see `python -m eval.export BENCH --help`.

    images: folder of the pictures that prompts show (imgedit, opening, comm).
    comm_task: of comm: task1 pictures to text, task2 text to pictures, task3 the second half, task4 everything from a title.
    model: asked for the answers that are not there; empty: all must be there.
    guidance, image_guidance: weights of the text and of the prompt's picture; max_images: per answer (opening, comm).
    """

    prompts: str
    answers: str = ""
    output: str = ""
    images: str = ""
    comm_task: CommTask = "task4"
    model: str = ""
    guidance: float = 1.0
    image_guidance: float | None = None
    max_new_tokens: int | None = None
    max_images: int = 10
    seed: int = 0
    batch_size: int = 32
    run: ModelSettings = ModelSettings()

    def __post_init__(self) -> None:
        for name in ("max_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; give at least 1")


def decoding(layout: Layout, settings: Settings) -> Decoding:
    """How a model is asked: one picture, or words and pictures."""
    weights = (settings.guidance, 1.0, settings.image_guidance)
    if layout.modality == "image":
        return Decoding("image", *weights, max_images=1)
    return Decoding("interleaved", *weights, max_new_tokens=settings.max_new_tokens, max_images=settings.max_images)


def find_answers(bench: str, items: Sequence[Item], settings: Settings) -> dict[str, Answer]:
    """The answer to each request, asked for or read. Raises ValueError where one lacks."""
    requests: list[Request] = [request for item in items for request in item.requests]
    keys = {request.key for request in requests}
    if len(keys) < len(requests):
        raise ValueError(f"{settings.prompts} names {len(requests) - len(keys)} prompts twice; keep one of each")
    folder = Path(settings.answers)
    if settings.model:
        require_model(settings.model)
        check_manifest(folder, settings, free=("output", "answers"))
        model, processor = load(settings.model, settings.run)
        how = decoding(LAYOUTS[bench], settings)
        ask(model, processor, bench, requests, how, folder, settings.seed, settings.batch_size)
    return stored_answers(folder, bench, requests)


def export(bench: str, settings: Settings) -> int:
    """Write the folder, whole or not at all; how many prompts it answers.

    Raises ValueError for an unknown benchmark, a folder that is there or wrongly named, and answers that lack or do not fit.
    """
    if bench not in LAYOUTS:
        raise ValueError(f"benchmark {bench!r} is unknown; use one of {', '.join(LAYOUTS)}")
    for name in ("answers", "output"):
        if not getattr(settings, name):
            raise ValueError(f"{name} is empty; give {name}=DIR")
    output, layout = Path(settings.output), LAYOUTS[bench]
    if output.exists():
        raise ValueError(f"{output} is there already, and the scripts grade whatever lies in it; give another output=")
    if not output.name.endswith(layout.suffix):
        raise ValueError(f"output={output}; the scripts look for a folder whose name ends in {layout.suffix}")
    source = Source(Path(settings.prompts), Path(settings.images) if settings.images else None, settings.comm_task)
    items = layout.read(source)
    answers = find_answers(bench, items, settings)
    if rank() == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=output.parent, prefix=".export-") as unfinished:
            place = Path(unfinished) / output.name
            place.mkdir()
            layout.write(place, items, answers)
            place.rename(output)
    return len(items)


def main(argv: Sequence[str] | None = None) -> None:
    """Export, and say what grades it."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    bench = arguments[0] if arguments and "=" not in arguments[0] else "--help"
    settings = from_command_line(Settings, arguments[1:] if not bench.startswith("-") else ["--help"], __doc__)
    if settings is None:
        return
    num_items = export(bench, settings)
    if rank() == 0:
        layout = LAYOUTS[bench]
        then = layout.then.format(output=settings.output)
        print(f"{num_items} prompts -> {settings.output}; next, of {layout.repository}: {then}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
