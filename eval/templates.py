"""Shape templates of the grader: drawn here with polygons and ellipses, and fitted to a soft mask by soft IoU.

No code comes from the renderer, but its outlines do: the heart was traced from a large picture, the star's notches were
set to its area, and the proportions of cross, ring, moon and arrow are those that the renderer states. Every class fills
its box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from orthus.data.world.scene import SHAPES

Array = npt.NDArray[np.float32]
Point = tuple[float, float]

RESOLUTION = 48
DRAWN = 480
BLURS = (0.0, 0.22)
"""Share of coverage that a pixel gives to each neighbour on an axis, for the two sharpnesses tried."""
COARSE = ((0.0, 0.0),)
FINE = ((0.0, 0.0), (-0.3, 0.0), (0.3, 0.0), (0.35, -0.7), (-0.35, 0.7))
"""(shift of the start, growth) in pixels tried on each axis around the box that the moments suggest."""
NUM_REFINED = 4
PIXEL_VARIANCE = 0.2
"""What the pixel grid and a slight blur add to the variance of a mask on one axis, in pixels squared."""
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


def _star() -> list[Point]:
    """Ten corners of a star with its tip up, stretched to its box; its notches lie at half the radius of its tips."""
    radii = [1.0 if corner % 2 == 0 else 0.5 for corner in range(10)]
    points = [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate(radii)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return [((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in points]


def _heart() -> list[Point]:
    notch = (0.5, 0.1)
    left = [(x, y) for y, x in HEART_LEFT]
    rise = [(0.36, 0.008), (0.45, 0.045)]
    half = [notch, *reversed(rise), *left]
    return [*half, *((1 - x, y) for x, y in reversed(half[1:-1]))]


POLYGONS: dict[str, list[Point]] = {
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "star": _star(),
    "heart": _heart(),
    "cross": [
        *[(0.35, 0), (0.65, 0), (0.65, 0.35), (1, 0.35), (1, 0.65), (0.65, 0.65)],
        *[(0.65, 1), (0.35, 1), (0.35, 0.65), (0, 0.65), (0, 0.35), (0.35, 0.35)],
    ],
    "arrow": [(0, 0.35), (0.5, 0.35), (0.5, 0), (1, 0.5), (0.5, 1), (0.5, 0.65), (0, 0.65)],
}
ELLIPSES: dict[str, list[tuple[float, float, float, float]]] = {
    "circle": [(0, 0, 1, 1)],
    "ring": [(0, 0, 1, 1), (0.22, 0.22, 0.78, 0.78)],
    "moon": [(0, 0, 1.271, 1), (0.464, 0.09, 1.507, 0.91)],
}
"""Boxes of ellipses: the first is filled, the second (where there is one) is cut out."""


@lru_cache(maxsize=1)
def templates() -> Array:
    """Coverage of each class in its box, in the order of the vocabulary `(10, RESOLUTION, RESOLUTION)`."""
    masks: list[Array] = []
    for name in SHAPES:
        canvas = Image.new("L", (DRAWN, DRAWN))
        draw = ImageDraw.Draw(canvas)
        if name in POLYGONS:
            draw.polygon([(x * (DRAWN - 1), y * (DRAWN - 1)) for x, y in POLYGONS[name]], fill=255)
        else:
            for box, fill in zip(ELLIPSES[name], (255, 0), strict=False):
                draw.ellipse([edge * (DRAWN - 1) for edge in box], fill=fill)
        block = DRAWN // RESOLUTION
        fine = np.asarray(canvas, np.float32).reshape(RESOLUTION, block, RESOLUTION, block) / 255
        masks.append(fine.mean(axis=(1, 3)))
    return np.stack(masks)


@lru_cache(maxsize=1)
def _moments() -> Array:
    """Centre and spread of each template on each axis, as parts of its box: `(n, 2 axes (x, y), 2)`."""
    at = (np.arange(RESOLUTION) + 0.5) / RESOLUTION
    return np.stack([[_moments_of(mask.sum(axis), at) for axis in (0, 1)] for mask in templates()]).astype(np.float32)


def _moments_of(profile: Array, at: npt.NDArray[np.floating]) -> tuple[float, float]:
    """Mean and standard deviation of positions `at` under the weights of a profile."""
    weights = profile / max(float(profile.sum()), 1e-6)
    mean = float((weights * at).sum())
    return mean, math.sqrt(max(float((weights * (at - mean) ** 2).sum()), 1e-6))


def fit(mask: Array) -> Fit:
    """Match soft coverage `(h, w)` in 0..1 with every template, sharp and blurred.

    A template's box comes from the centre and spread of the mask, which lost tips hardly move; the best few are refined
    by parts of a pixel. The classes are as wide as high, so a stretched box costs score: a merged or smeared blob finds
    no template.
    """
    coarse = _search(mask, np.arange(len(SHAPES)), COARSE)[0]
    chosen = np.argsort(-coarse)[:NUM_REFINED]
    scores, boxes = _search(mask, chosen, FINE)
    order = np.argsort(-scores)
    best = int(order[0])
    return Fit(SHAPES[chosen[best]], float(scores[best]), boxes[best], float(scores[order[1]]))


def _search(
    mask: Array, chosen: npt.NDArray[np.int64], spans: tuple[tuple[float, float], ...]
) -> tuple[Array, list[tuple[float, float, float, float]]]:
    """Best score of each chosen template over the boxes of `spans` and both sharpnesses `(n,)`, and those boxes."""
    shifts, growths = np.array(spans, np.float32).T
    starts, lengths, weights = [], [], []
    for axis in (0, 1):  # x, then y
        pixels = np.arange(mask.shape[1 - axis]) + 0.5
        mean, spread = _moments_of(mask.sum(axis), pixels)
        centers, spreads = _moments()[chosen, axis].T
        size = math.sqrt(max(spread**2 - PIXEL_VARIANCE, 0.5)) / spreads[:, None] + growths  # (n, spans)
        start = mean - centers[:, None] * size + shifts
        starts.append(start)
        lengths.append(size)
        weights.append(_overlaps(start, size, len(pixels)))
    ratio = lengths[1][:, :, None] / lengths[0][:, None, :]
    squareness = np.clip(1.0 - 2.0 * np.clip(np.maximum(ratio, 1 / ratio) - 1.15, 0, None), 0, 1)  # (n, a, b)
    scores = np.maximum(*(_soft_iou(mask, weights[1], weights[0], chosen, blur) for blur in BLURS)) * squareness
    flat = scores.reshape(len(chosen), -1)
    boxes = []
    for n, place in enumerate(flat.argmax(1)):
        a, b = divmod(int(place), len(spans))
        x0, y0 = float(starts[0][n, b]), float(starts[1][n, a])
        boxes.append((x0, y0, x0 + float(lengths[0][n, b]), y0 + float(lengths[1][n, a])))
    return flat.max(1), boxes


def _overlaps(start: Array, length: Array, num_pixels: int) -> Array:
    """Share of each pixel covered by each template row `(n, boxes, num_pixels, RESOLUTION)`; inputs `(n, boxes)`."""
    edges = start[..., None, None] + length[..., None, None] * np.arange(RESOLUTION + 1) / RESOLUTION
    pixels = np.arange(num_pixels)[:, None]
    covered = np.minimum(edges[..., 1:], pixels + 1) - np.maximum(edges[..., :-1], pixels)
    return np.maximum(covered, 0).astype(np.float32)


def _soft_iou(mask: Array, rows: Array, columns: Array, chosen: npt.NDArray[np.int64], blur: float) -> Array:
    """Soft IoU `(n, a, b)` of a mask with templates drawn over all boxes, after smoothing by `blur`, 1 - 2 blur, `blur`."""
    if blur:
        rows, columns = _smooth(rows, blur), _smooth(columns, blur)
    half = templates()[chosen][:, None, None] @ columns.swapaxes(-1, -2)[:, None]  # (n, 1, b, R, w)
    drawn = rows[:, :, None] @ half  # (n, a, b, h, w)
    shared = np.minimum(drawn, mask).sum(axis=(-2, -1))
    union = drawn.sum(axis=(-2, -1)) + mask.sum() - shared
    return np.asarray(shared / np.maximum(union, 1e-6), np.float32)


def _smooth(weights: Array, blur: float) -> Array:
    """Blur along the pixel axis of `(n, boxes, pixels, R)`, which blurs the drawn template along that axis."""
    padded = np.pad(weights, ((0, 0), (0, 0), (1, 1), (0, 0)))
    return np.asarray(blur * (padded[:, :, :-2] + padded[:, :, 2:]) + (1 - 2 * blur) * weights, np.float32)
