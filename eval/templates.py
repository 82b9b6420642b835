"""Shape templates of the grader: drawn here with polygons and ellipses, and fitted to a soft mask by soft IoU.

Nothing comes from the renderer. The outlines were measured on large pictures of each class; every class fills its box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Array = npt.NDArray[np.float32]
Point = tuple[float, float]

RESOLUTION = 48
DRAWN = 480
BLURS = (0.0, 0.22)
"""Share of coverage that a pixel gives to each neighbour on an axis, for the two sharpnesses tried."""
COARSE = ((0.0, 0.0), (0.0, 1.2))
FINE = tuple((shift, grow) for grow in (-0.6, 0.2, 1.0, 2.0) for shift in (-0.4, 0.0, 0.4))
"""The (shift, growth) in pixels of the boxes tried on each axis around the mask's own extent."""
HEART_LEFT = (
    (0.0, 0.275), (0.01, 0.2), (0.042, 0.125), (0.083, 0.075), (0.125, 0.042), (0.208, 0.008), (0.29, 0.0), (0.375, 0.008),
    (0.458, 0.025), (0.542, 0.06), (0.625, 0.108), (0.708, 0.168), (0.792, 0.25), (0.875, 0.35), (0.958, 0.462), (1.0, 0.5),
)  # fmt: skip
"""(y, x) of the heart's left outline from its top to its tip, as parts of the box."""


@dataclass(frozen=True)
class Fit:
    """The template that explains a mask best: soft IoU in 0..1, box in pixels of the mask, best score of another class."""

    shape: str
    score: float
    box: tuple[float, float, float, float]
    runner_up: float


def _star(tip_up: bool) -> list[Point]:
    """Ten corners of a pentagram stretched to its box."""
    turn = -math.pi / 2 if tip_up else math.pi / 2
    inner = math.sin(math.pi / 10) / math.sin(3 * math.pi / 10)
    corners = [
        ((1.0 if k % 2 == 0 else inner) * math.cos(turn + k * math.pi / 5), math.sin(turn + k * math.pi / 5), k)
        for k in range(10)
    ]
    points = [(x, y * (1.0 if k % 2 == 0 else inner)) for x, y, k in corners]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return [((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in points]


def _heart() -> list[Point]:
    notch = (0.5, 0.1)
    left = [(x, y) for y, x in HEART_LEFT]
    rise = [(0.36, 0.008), (0.45, 0.045)]
    half = [notch, *reversed(rise), *left]
    return half + [(1 - x, y) for x, y in reversed(half[1:-1])]


POLYGONS: dict[str, list[list[Point]]] = {
    "square": [[(0, 0), (1, 0), (1, 1), (0, 1)]],
    "triangle": [[(0.5, 0), (1, 1), (0, 1)]],
    "diamond": [[(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]],
    "star": [_star(tip_up=True), _star(tip_up=False)],
    "heart": [_heart()],
    "cross": [
        [(0.35, 0), (0.65, 0), (0.65, 0.35), (1, 0.35), (1, 0.65), (0.65, 0.65)]
        + [(0.65, 1), (0.35, 1), (0.35, 0.65), (0, 0.65), (0, 0.35), (0.35, 0.35)]
    ],
    "arrow": [[(0, 0.35), (0.5, 0.35), (0.5, 0), (1, 0.5), (0.5, 1), (0.5, 0.65), (0, 0.65)]],
}
ELLIPSES: dict[str, list[tuple[float, float, float, float]]] = {
    "circle": [(0, 0, 1, 1)],
    "ring": [(0, 0, 1, 1), (0.22, 0.22, 0.78, 0.78)],
    "moon": [(0, 0, 1.271, 1), (0.464, 0.09, 1.507, 0.91)],
}
"""Boxes of ellipses: the first is filled, the second (where there is one) is cut out."""


@lru_cache(maxsize=1)
def templates() -> tuple[tuple[str, ...], Array]:
    """Names and coverage `(n, RESOLUTION, RESOLUTION)` of all templates; a class may have several."""
    names: list[str] = []
    masks: list[Array] = []
    outlines: list[tuple[str, list[Point] | list[tuple[float, float, float, float]]]] = [
        (name, points) for name, variants in POLYGONS.items() for points in variants
    ]
    for name, outline in [*outlines, *ELLIPSES.items()]:
        canvas = Image.new("L", (DRAWN, DRAWN))
        draw = ImageDraw.Draw(canvas)
        if name in POLYGONS:
            draw.polygon([(point[0] * (DRAWN - 1), point[1] * (DRAWN - 1)) for point in outline], fill=255)
        else:
            for box, fill in zip(outline, (255, 0), strict=False):
                draw.ellipse([edge * (DRAWN - 1) for edge in box], fill=fill)
        block = DRAWN // RESOLUTION
        fine = np.asarray(canvas, np.float32).reshape(RESOLUTION, block, RESOLUTION, block) / 255
        names.append(name)
        masks.append(fine.mean(axis=(1, 3)))
    return tuple(names), np.stack(masks)


@lru_cache(maxsize=4096)
def _overlaps(start: float, length: float, num_pixels: int) -> Array:
    """Share of each pixel covered by each template row `(num_pixels, RESOLUTION)`; `start`, `length` in pixels."""
    edges = start + length * np.arange(RESOLUTION + 1) / RESOLUTION
    pixels = np.arange(num_pixels)[:, None]
    covered = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return np.maximum(covered, 0).astype(np.float32)


def _extent(profile: Array) -> tuple[float, float]:
    """First and last sub-pixel position where a soft profile (maximum over the other axis) is filled."""
    filled = np.flatnonzero(profile > 0.35)
    if len(filled) == 0:
        return 0.0, float(len(profile))
    first, last = int(filled[0]), int(filled[-1])
    return first + 1 - float(min(profile[first], 1.0)), last + float(min(profile[last], 1.0))


def fit(mask: Array, floor: float = 0.0) -> Fit:
    """Match soft coverage `(h, w)` in 0..1 with every template, sharp and blurred, over boxes near the mask's own.

    A coarse search picks the promising classes, a fine one their box; the fine one is left out where the coarse score
    is hopeless for reaching `floor`. The classes are as wide as high, so a stretched box costs score: a merged or smeared
    blob finds no template.
    """
    names, shapes = templates()
    coarse = _search(mask, shapes, COARSE)[0]
    if coarse.max() < floor - 0.15:
        chosen, spans = np.argsort(-coarse), COARSE
    else:
        chosen, spans = np.argsort(-coarse)[:4], FINE
    scores, boxes = _search(mask, shapes[chosen], spans)
    best = int(scores.argmax())
    name = names[chosen[best]]
    others = [float(score) for score, i in zip(scores, chosen, strict=True) if names[i] != name]
    return Fit(name, float(scores[best]), boxes[best], max(others))


def _search(
    mask: Array, shapes: Array, spans: tuple[tuple[float, float], ...]
) -> tuple[Array, list[tuple[float, float, float, float]]]:
    """Best score of each template over all boxes and both sharpnesses `(n,)`, and the box that has it."""
    left, right = _extent(mask.max(axis=0))
    top, bottom = _extent(mask.max(axis=1))
    across = [(left - grow / 2 + shift, right - left + grow) for shift, grow in spans]
    down = [(top - grow / 2 + shift, bottom - top + grow) for shift, grow in spans]
    columns = np.stack([_overlaps(round(s, 1), round(max(n, 1.0), 1), mask.shape[1]) for s, n in across])  # (b, w, R)
    rows = np.stack([_overlaps(round(s, 1), round(max(n, 1.0), 1), mask.shape[0]) for s, n in down])  # (a, h, R)
    ratio = np.array([[n / max(m, 1e-6) for _, m in across] for _, n in down])
    squareness = np.clip(1.0 - 1.5 * np.clip(np.maximum(ratio, 1 / ratio) - 1.25, 0, None), 0, 1)  # (a, b)
    scores = np.maximum(*(_soft_iou(mask, rows, columns, shapes, blur) for blur in BLURS)) * squareness
    flat = scores.reshape(len(shapes), -1)
    places = [divmod(int(best), len(spans)) for best in flat.argmax(1)]
    boxes = [(across[b][0], down[a][0], across[b][0] + across[b][1], down[a][0] + down[a][1]) for a, b in places]
    return flat.max(1), boxes


def _soft_iou(mask: Array, rows: Array, columns: Array, shapes: Array, blur: float) -> Array:
    """Soft IoU `(n, a, b)` of a mask with templates drawn over all boxes, after smoothing by `blur`, 1 - blur, `blur`."""
    if blur:
        rows, columns = _smooth(rows, blur), _smooth(columns, blur)
    drawn = np.einsum("ahr,nrs,bws->nabhw", rows, shapes, columns, optimize=True)
    shared = np.minimum(drawn, mask).sum(axis=(-2, -1))
    union = drawn.sum(axis=(-2, -1)) + mask.sum() - shared
    return np.asarray(shared / np.maximum(union, 1e-6), np.float32)


def _smooth(weights: Array, blur: float) -> Array:
    """Blur along the pixel axis of `(boxes, pixels, R)`, which blurs the drawn template along that axis."""
    padded = np.pad(weights, ((0, 0), (1, 1), (0, 0)))
    return np.asarray(blur * (padded[:, :-2] + padded[:, 2:]) + (1 - 2 * blur) * weights, np.float32)
