"""Pictures, answers, an edit and a story from a checkpoint, as PNGs and one HTML page.

`python -m demo.sample checkpoints/orthus-small [--prompt "a photo of a red circle"] [--picture FILE] [--output DIR]`
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from demo.page import Item, Section, write_page
from orthus import OrthusForConditionalGeneration, OrthusProcessor
from orthus.data.schema import Segment, Turn
from orthus.image_processing import load_image

Tick = Callable[[int], Any]
GUIDANCE_INTERVAL = (0.0, 0.85)  # whether a cell holds anything is decided above it, and guidance would spoil that
PLANNED: dict[str, Any] = {
    "modality": "interleaved",
    "max_images": 1,
    "force_image": True,
}  # says first what it draws
PICTURE = Path(__file__).parent / "example.png"
PROMPTS = (
    "a photo of a red circle",
    "a photo of a blue star and a green square",
    "a photo of three purple hearts",
    "a photo of a yellow moon",
    "a photo of a ring left of a triangle",
    "a photo of a red circle above two blue stars",
    "a photo of a green cross and an orange diamond",
    "a black arrow at the top left, a pink ring at the bottom far right",
)
QUESTIONS = (
    "Describe the picture.",
    "Is there a star in the picture? Please answer yes or no.",
    "How many hearts are there?",
    "What color is the square?",
    "Where is the star?",
)
INSTRUCTIONS = ("make the star blue", "remove the square", "add a green ring at the top far left")
STORIES = (
    "Tell a story with pictures: count red stars up to three.",
    "Draw a blue circle, then add a yellow heart, then describe the picture.",
)


@dataclass(frozen=True)
class Studio:
    """A checkpoint and how to sample from it."""

    model: OrthusForConditionalGeneration
    processor: OrthusProcessor
    guidance: float
    text_guidance: float
    image_guidance: float
    seed: int

    def draw(self, prompts: Sequence[str], on_position: Tick) -> list[list[Segment]]:
        turns = [[Turn("user", (prompt,))] for prompt in prompts]
        streams = self.processor.guidance_streams(turns, self.guidance, text_guidance=self.text_guidance)
        return self._generate(turns, on_position, **PLANNED, **streams)

    def answer(self, picture: Image.Image, questions: Sequence[str], on_position: Tick) -> list[list[Segment]]:
        turns = [[Turn("user", (picture, question))] for question in questions]
        return self._generate(turns, on_position, modality="text", max_new_tokens=96)

    def edit(self, picture: Image.Image, instructions: Sequence[str], on_position: Tick) -> list[list[Segment]]:
        """Three streams: picture and instruction, picture only, neither."""
        turns = [[Turn("user", (picture, text))] for text in instructions]
        streams = self.processor.guidance_streams(turns, self.guidance, self.image_guidance)
        return self._generate(turns, on_position, **PLANNED, **streams)

    def tell(self, requests: Sequence[str], on_position: Tick) -> list[list[Segment]]:
        turns = [[Turn("user", (request,))] for request in requests]
        streams = self.processor.guidance_streams(turns, self.guidance)
        return self._generate(turns, on_position, modality="interleaved", force_image=True, **streams)

    def _generate(self, turns: list[list[Turn]], on_position: Tick, **options: Any) -> list[list[Segment]]:
        """One generator per row, so that a row does not depend on the others."""
        generators = [torch.Generator().manual_seed(self.seed + row) for row in range(len(turns))]
        inputs = self.processor(turns=turns)
        output = self.model.generate(
            **inputs, generator=generators, on_position=on_position, guidance_interval=GUIDANCE_INTERVAL, **options
        )
        return self.processor.decode_segments(output)


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    started = time.perf_counter()
    model = OrthusForConditionalGeneration.from_pretrained(args.checkpoint).eval()
    processor = OrthusProcessor.from_pretrained(args.checkpoint)
    studio = Studio(model, processor, args.guidance, args.text_guidance, args.image_guidance, args.seed)
    picture = load_image(args.picture)
    shown = processor.image_processor.postprocess(processor.image_processor.pixel_values([picture]))[0]
    print(f"loaded {args.checkpoint} in {time.perf_counter() - started:.1f} s")
    jobs: list[tuple[str, Sequence[str], Callable[..., list[list[Segment]]], list[Segment]]]
    if args.prompt:
        jobs = [("drawing", [args.prompt] * args.num, studio.draw, [])]
    else:
        jobs = [
            ("drawing", PROMPTS, studio.draw, []),
            ("answering", QUESTIONS, lambda texts, tick: studio.answer(picture, texts, tick), [shown]),
            ("editing", INSTRUCTIONS, lambda texts, tick: studio.edit(picture, texts, tick), [shown]),
            ("story", STORIES, studio.tell, []),
        ]
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    sections = [run(name, texts, job, given, output) for name, texts, job, given in jobs]
    page = output / "index.html"
    write_page(page, f"Orthus: {args.checkpoint}", sections)
    print(f"page     {page.resolve()}\npictures {output.resolve()}/*.png\n{time.perf_counter() - started:.1f} s in all")


def run(name: str, texts: Sequence[str], job: Callable[..., list[list[Segment]]], given: list[Segment], output: Path) -> Section:
    """Do one kind of work under a progress bar, save its pictures, and print what it said and the seconds it took."""
    started = time.perf_counter()
    with tqdm(desc=f"{name:9s}", unit=" positions", leave=False) as bar:
        rows = job(texts, lambda done: bar.update(1))
    seconds = time.perf_counter() - started
    items = [Item(text, [*given, *row]) for text, row in zip(texts, rows, strict=True)]
    num_pictures = 0
    for index, row in enumerate(rows):
        for place, segment in enumerate(row):
            if isinstance(segment, Image.Image):
                segment.save(output / f"{name}-{index + 1}-{place + 1}.png")
                num_pictures += 1
            else:
                print(f"  {texts[index]}\n    {segment}")
    print(f"{name}: {len(texts)} prompts, {num_pictures} pictures, {seconds:.1f} s")
    return Section(name, seconds, items)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pictures, answers, an edit and a story from a checkpoint.")
    parser.add_argument("checkpoint", help="folder of a saved model and processor")
    parser.add_argument("--prompt", default="", help="draw this instead of the tour")
    parser.add_argument("--num", type=int, default=4, help="pictures of --prompt")
    parser.add_argument("--picture", default=str(PICTURE), help="picture file to ask about and to edit")
    parser.add_argument("--output", default="runs/sample")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--text-guidance", type=float, default=3.0, help="weight of the prompt in what is said before a picture")
    parser.add_argument("--image-guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
