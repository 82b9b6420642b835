"""A photograph with known content, before anything is scored: a wrong checkpoint or build gives scores near zero, not an error.

The photograph is matplotlib's sample of Grace Hopper (public domain): one person who fills most of the picture. The second
picture shows it at the right end of a wide grey one, where padding or a wrong scale would move the box.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from eval.geneval.detectors import ColorNamer, Grader
from eval.geneval.folders import read_folder
from eval.geneval.official import OfficialScorer
from eval.geneval.verdict import COLORS, Box, intersection_over_union

PERSON: Box = (12.0, 22.0, 512.0, 600.0)
"""Around the person in the photograph of 512 x 600 pixels, read off by eye to a few pixels."""
SHIFT = 688
MIN_SCORE, MIN_OVERLAP, MIN_COLORS = 0.9, 0.8, 7
RGB = {
    "red": (220, 20, 30), "orange": (255, 140, 0), "yellow": (250, 225, 20), "green": (20, 150, 50), "blue": (20, 60, 220),
    "purple": (120, 30, 170), "pink": (255, 130, 190), "brown": (115, 70, 30), "black": (10, 10, 10), "white": (250, 250, 250),
}  # fmt: skip


@dataclass(frozen=True)
class Known:
    """A picture and where its one person is."""

    image: Image.Image
    person: Box


def known_pictures() -> dict[str, Known]:
    """Raises `ValueError` where the photograph is not installed."""
    try:
        import matplotlib

        path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
        photograph = Image.open(path).convert("RGB")
    except (ImportError, OSError) as error:
        raise ValueError(f"the self-test's photograph is not there ({error}); install matplotlib with its sample data") from error
    if photograph.size != (512, 600):
        raise ValueError(f"the self-test's photograph is {photograph.size} instead of (512, 600)")
    wide = Image.new("RGB", (512 + SHIFT, 600), "#808080")
    wide.paste(photograph, (SHIFT, 0))
    x0, y0, x1, y1 = PERSON
    return {"photograph": Known(photograph, PERSON), "wide picture": Known(wide, (x0 + SHIFT, y0, x1 + SHIFT, y1))}


def person_problems(name: str, person: Box, detections: Mapping[str, Sequence[Sequence[float]]]) -> list[str]:
    """What is wrong with `detections` (class -> [[x0, y0, x1, y1, score], ...]) of a known picture."""
    best = max(((row[4], found, row) for found, rows in detections.items() for row in rows), default=None)
    if best is None:
        return [f"{name}: nothing found; wrong weights, config or build"]
    score, found, row = best
    if found != "person":
        return [f"{name}: the best detection is {found} ({score:.2f}) instead of person; wrong weights or class order"]
    if score <= MIN_SCORE:
        return [f"{name}: person scores {score:.2f}, not above {MIN_SCORE}; wrong weights or pixel values"]
    overlap = intersection_over_union(row, person)
    if overlap < MIN_OVERLAP:
        return [f"{name}: box {[round(v) for v in row[:4]]} overlaps {list(person)} by {overlap:.2f}; boxes are scaled or moved"]
    return []


def color_problems(colors: ColorNamer) -> list[str]:
    """Balls of ten colours on the scorer's grey must get their names, but for a few that may be argued about."""
    wrong = []
    for name in COLORS:
        ball = Image.new("RGB", (224, 224), "#999")
        ImageDraw.Draw(ball).ellipse((12, 12, 212, 212), fill=RGB[name])
        answer = colors.classify([ball], "sports ball")[0]
        if answer != name:
            wrong.append(f"{name} is called {answer}")
    if len(COLORS) - len(wrong) < MIN_COLORS:
        return [f"colours: {', '.join(wrong)}; wrong weights or pixel values"]
    return []


def require_working_grader(grader: Grader) -> None:
    """Raise `ValueError` that says why this grader must not score anything."""
    problems = []
    for name, known in known_pictures().items():
        rows: dict[str, list[list[float]]] = {}
        for one in grader.detector.detect(known.image):
            rows.setdefault(one.class_name, []).append([*one.box, one.score])
        problems += person_problems(name, known.person, rows)
    if grader.colors is not None:
        problems += color_problems(grader.colors)
    _raise(problems)


def require_working_scorer(scorer: OfficialScorer) -> None:
    """The same for the published script, in its own folder layout; what names colours there is not tested."""
    metadata = {"tag": "single_object", "include": [{"class": "person", "count": 1}], "prompt": "a photo of a person"}
    problems = []
    known = known_pictures()
    with tempfile.TemporaryDirectory() as scratch:
        for number, (_, picture) in enumerate(known.items()):
            samples = Path(scratch) / f"{number:05d}" / "samples"
            samples.mkdir(parents=True)
            (samples.parent / "metadata.jsonl").write_text(json.dumps(metadata) + "\n", encoding="utf-8")
            picture.image.save(samples / "00000.png")
        results = {Path(r["filename"]).parts[-3]: r for r in scorer.score(read_folder(Path(scratch)))}
    for number, (name, picture) in enumerate(known.items()):
        problems += person_problems(name, picture.person, json.loads(results[f"{number:05d}"]["details"]))
    _raise(problems)


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"the detector's self-test failed, nothing is scored: {'; '.join(problems)}")
