"""The grader of small-world pictures: pixels in, objects with class, colour and box out. It never sees the prompt.

It imports nothing of the renderer but the scene's vocabulary. Steps: the dominant light colour is the background; pixels near
a palette colour are cores; the remaining foreground joins the core that explains it best as a mixture with the background;
components of one colour are matched with shape templates, and split where two objects touch. What no template explains
is "unknown": an unsure grader must not pass a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eval.geneval.verdict import Detection as Judged
from eval.templates import Fit, fit
from orthus.data.world.scene import COLORS, SHAPES

Image = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 26, 36),
    "orange": (255, 142, 12),
    "yellow": (246, 216, 20),
    "green": (28, 152, 60),
    "blue": (28, 84, 222),
    "purple": (134, 44, 176),
    "pink": (255, 134, 196),
    "brown": (124, 74, 34),
    "black": (22, 22, 26),
}
"""sRGB medians inside 40 squares of each colour, with noise (6/255) and blur (0.5 px) on all backgrounds.

Both errors leave a median inside a square alone, so these equal the renderer's own values: the palette is shared in fact,
if not in code, and the grader's agreement says nothing about another palette.
"""
UNKNOWN = "unknown"
MIN_SCORE = 0.78
GOOD_SCORE = 0.94
MAX_CUTS = 3
"""How often a blob may be cut; the search for cuts ends at a pair of parts that both reach the good score."""
MAX_COLOR_DISTANCE = 24.0
CORE_DISTANCE = 20.0
MIN_FOREGROUND = 30.0
MIN_BACKGROUND_SHARE = 0.3
SPECK = 8.0
"""Blobs of less coverage, in pixels of a 64 px picture, are noise and not even clutter."""


@dataclass(frozen=True)
class Detection:
    """One blob: `shape` or `color` is "unknown" when unsure; `score` is the template's soft IoU in 0..1.

    `box` is (x0, y0, x1, y1) in pixels with exclusive ends, `color_distance` the CIELAB distance to the palette colour.
    """

    shape: str
    color: str
    score: float
    box: tuple[float, float, float, float]
    color_distance: float

    @property
    def is_known(self) -> bool:
        return self.shape != UNKNOWN and self.color != UNKNOWN


@dataclass(frozen=True)
class _Blob:
    """Soft coverage of one connected area, cropped, with the crop's top left pixel."""

    mask: Array
    x: int
    y: int


def to_lab(rgb: npt.ArrayLike) -> Array:
    """sRGB 0..255 `(..., 3)` to CIELAB (D65), where equal distances look about equally different."""
    linear = np.asarray(rgb, np.float64) / 255
    linear = np.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


PALETTE_LAB = to_lab([PALETTE[name] for name in COLORS])
PALETTE_RGB = np.array([PALETTE[name] for name in COLORS], np.float32)


def background_color(image: Image) -> Array | None:
    """Mean of the dominant light colour `(3,)`, or None where no light colour covers enough of the picture."""
    pixels = image.reshape(-1, 3).astype(np.float32)
    light = pixels[pixels.min(axis=1) > 185]
    if len(light) < MIN_BACKGROUND_SHARE * len(pixels):
        return None
    center = np.median(light, axis=0)
    for _ in range(3):
        near = light[np.linalg.norm(light - center, axis=1) < 30]
        if len(near) < MIN_BACKGROUND_SHARE * len(pixels):
            return None
        center = near.mean(axis=0)
    return np.asarray(center, np.float32)


def connected_components(labels: Labels) -> Labels:
    """Number 8-connected areas of equal label `(H, W)`; -1 stays -1. Every pixel takes the largest number it touches."""
    height, width = labels.shape
    numbers = np.where(labels >= 0, np.arange(1, labels.size + 1).reshape(labels.shape), 0)
    padded_labels = np.pad(labels, 1, constant_values=-2)
    while True:
        padded, before = np.pad(numbers, 1), numbers
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            window = (slice(1 + dy, 1 + dy + height), slice(1 + dx, 1 + dx + width))
            numbers = np.where(padded_labels[window] == labels, np.maximum(numbers, padded[window]), numbers)
        numbers = numbers[:, :] if np.array_equal(numbers, before) else np.where(labels >= 0, _jump(numbers), 0)
        if np.array_equal(numbers, before):
            return np.where(labels >= 0, numbers, -1)


def _jump(numbers: Labels) -> Labels:
    """Follow each pixel's number to that pixel's own number: halves the rounds that long areas need."""
    flat = np.concatenate([[0], numbers.ravel()])
    return flat[numbers]


def _color_labels(image: Image, background: Array) -> tuple[Labels, npt.NDArray[np.bool_]]:
    """Palette index of each pixel `(H, W)` (-1: background, 9: no colour explains it) and where the cores are."""
    pixels = image.astype(np.float32)
    foreground = np.linalg.norm(pixels - background, axis=-1) > MIN_FOREGROUND
    distance = np.linalg.norm(to_lab(image)[..., None, :] - PALETTE_LAB, axis=-1)  # (H, W, 9)
    core = np.where(foreground & (distance.min(-1) < CORE_DISTANCE), distance.argmin(-1), -1)
    areas = connected_components(core)
    _, index, count = np.unique(areas, return_inverse=True, return_counts=True)
    scale = (image.shape[0] / 64) ** 2
    core = np.where((count < 5 * scale)[index.reshape(areas.shape)], -1, core)
    labels = _grow(core, foreground, _residuals(pixels, background))
    return np.where(foreground & (labels < 0), len(COLORS), labels), core >= 0


def _residuals(pixels: Array, background: Array) -> Array:
    """RGB distance of each pixel from the line between the background and each palette colour `(H, W, 9)`."""
    axis = PALETTE_RGB - background  # (9, 3)
    offset = pixels - background
    share = np.clip(offset @ axis.T / (axis**2).sum(-1), 0, 1)
    return np.asarray(np.linalg.norm(offset[..., None, :] - share[..., None] * axis, axis=-1), np.float32)


def _grow(core: Labels, foreground: npt.NDArray[np.bool_], residuals: Array) -> Labels:
    """Give foreground pixels beside a core the neighbouring colour that explains them best, for three rounds."""
    labels = core
    height, width = core.shape
    for _ in range(3 * max(1, height // 64)):
        padded = np.pad(labels, 1, constant_values=-1)
        near = np.zeros(residuals.shape, bool)
        for dy in range(3):
            for dx in range(3):
                window = padded[dy : dy + height, dx : dx + width]
                near |= window[..., None] == np.arange(len(COLORS))
        cost = np.where(near, residuals, np.inf)
        is_open = foreground & (labels < 0) & near.any(-1)
        labels = np.where(is_open, cost.argmin(-1), labels)
    return labels


def _coverage(image: Image, background: Array, color: Array) -> Array:
    """How much of `color` each pixel holds, 0..1 `(H, W)`, if it is a mixture with the background."""
    axis = color - background
    return np.asarray(np.clip((image.astype(np.float32) - background) @ axis / (axis @ axis), 0, 1), np.float32)


def _crop(mask: Array, x: int = 0, y: int = 0) -> _Blob:
    """Cut the filled area out with a border of one pixel (kept inside the array)."""
    rows, columns = np.flatnonzero(mask.max(1) > 0.2), np.flatnonzero(mask.max(0) > 0.2)
    if len(rows) == 0:
        return _Blob(mask[:0, :0], x, y)
    top, left = rows[0], columns[0]
    inner = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    return _Blob(np.pad(inner, 1), x + int(left) - 1, y + int(top) - 1)


def _explain(blob: _Blob, scale: float, depth: int) -> list[tuple[Fit, _Blob]] | None:
    """Templates that together explain a blob, cutting it where objects of one colour touch; None when they cannot."""
    height, width = blob.mask.shape
    if min(height, width) < 8 * scale:
        return None
    if max(height, width) <= 24 * scale:
        found = fit(blob.mask)
        if found.score >= MIN_SCORE:
            return [(found, blob)]
    if depth == 0 or max(height, width) < 20 * scale:
        return None
    best: list[tuple[Fit, _Blob]] | None = None
    for side in _cuts(blob.mask, scale):
        parts: list[tuple[Fit, _Blob]] = []
        for half in (np.where(side, blob.mask, 0), np.where(side, 0, blob.mask)):
            explained = _explain(_crop(half, blob.x, blob.y), scale, depth - 1)
            if explained is None:
                break
            parts += explained
        else:
            if best is None or min(f.score for f, _ in parts) > min(f.score for f, _ in best):
                best = parts
            if min(f.score for f, _ in best) >= GOOD_SCORE:
                break
    return best


def _cuts(mask: Array, scale: float) -> list[npt.NDArray[np.bool_]]:
    """The best straight cuts in 8 directions, as the pixels on one side: least coverage crossed, then the most even."""
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]]
    total = float(mask.sum())
    candidates: list[tuple[int, float, npt.NDArray[np.bool_]]] = []
    for angle in np.arange(8) * np.pi / 8:
        along = columns * np.cos(angle) + rows * np.sin(angle)
        for cut in np.arange(np.floor(along.min()) + 0.5, along.max()):
            side = along < cut
            share = float(mask[side].sum()) / total
            if min(share, 1 - share) > 0.12:
                crossing = float(mask[np.abs(along - cut) < 1].sum())
                candidates.append((round(crossing / 2), abs(share - 0.5), side))
    return [side for _, _, side in sorted(candidates, key=lambda candidate: candidate[:2])[: int(12 * max(1, scale))]]


def name_color(rgb: npt.ArrayLike) -> tuple[str, float]:
    """Nearest palette colour of an sRGB triple and its CIELAB distance; "unknown" when far from all of them."""
    distances = np.linalg.norm(PALETTE_LAB - to_lab(rgb), axis=-1)
    nearest = int(distances.argmin())
    name = COLORS[nearest] if distances[nearest] <= MAX_COLOR_DISTANCE else UNKNOWN
    return name, float(distances[nearest])


def detect(image: Image) -> list[Detection]:
    """Objects of a picture `(H, W, 3)` uint8, square, at least 32 pixels. Raises `ValueError` for another array."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise ValueError(f"picture of {image.dtype} {image.shape}; give a square uint8 array (H, H, 3)")
    background = background_color(image)
    if background is None:
        return []
    scale = image.shape[0] / 64
    labels, cores = _color_labels(image, background)
    areas = connected_components(labels)
    detections: list[Detection] = []
    for number in np.unique(areas[areas >= 0]):
        area = areas == number
        if area.sum() < SPECK * scale**2:
            continue
        detections.extend(_describe(image, background, area, area & cores, scale))
    return detections


def _describe(
    image: Image, background: Array, area: npt.NDArray[np.bool_], core: npt.NDArray[np.bool_], scale: float
) -> list[Detection]:
    """Detections of one connected area of one colour."""
    color_rgb = np.median(image[core if core.any() else area], axis=0).astype(np.float32)
    color, distance = name_color(color_rgb)
    soft = np.where(area, _coverage(image, background, color_rgb), 0).astype(np.float32)
    if soft.sum() < SPECK * scale**2:
        return []
    whole = _crop(soft)
    parts = _explain(whole, scale, MAX_CUTS) if core.any() else None
    if parts is None:
        height, width = whole.mask.shape
        box = (whole.x + 1.0, whole.y + 1.0, whole.x + width - 1.0, whole.y + height - 1.0)
        return [Detection(UNKNOWN, color, 0.0, box, distance)]
    found = []
    for match, blob in parts:
        x0, y0, x1, y1 = match.box
        box = (blob.x + x0, blob.y + y0, blob.x + x1, blob.y + y1)
        found.append(Detection(match.shape, color, match.score, box, distance))
    return found


def as_judged(detections: Sequence[Detection]) -> list[Judged]:
    """The same detections for `eval.geneval.verdict`; unknown ones keep the class "unknown", which no prompt names."""
    return [Judged(d.shape if d.is_known and d.shape in SHAPES else UNKNOWN, d.score, d.box, d.color) for d in detections]
