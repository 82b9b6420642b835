"""A second grader of small-world pictures, by another method, only to report how often the two disagree.

Hue and lightness rules name the colour of each pixel; flood fill collects areas of one name; a shape is named by the
nearest centroid of zoning features (how full each cell of a 4 x 4 grid over the box is, and how full the box is).
It shares no step with `eval.grader`: no palette distances, no soft masks, no templates, no splitting of touching objects.
"""

from __future__ import annotations

import colorsys

import numpy as np
import numpy.typing as npt

from eval.grader import UNKNOWN, Detection

HUES: tuple[tuple[str, float, float], ...] = (
    ("red", 0.0, 16.0), ("orange", 16.0, 41.0), ("yellow", 41.0, 70.0), ("green", 70.0, 170.0), ("blue", 190.0, 250.0),
    ("purple", 250.0, 300.0), ("pink", 300.0, 345.0), ("red", 345.0, 361.0),
)  # fmt: skip
"""(name, from, to) in degrees."""
ZONES = 4
MAX_DISTANCE = 0.9
# fmt: off
CENTROIDS: dict[str, tuple[float, ...]] = {  # mean features of 60 pictures of each class, half of them with noise and blur
    "circle": (0.32, 0.91, 0.92, 0.31, 0.91, 1.00, 1.00, 0.92, 0.92, 1.00, 1.00, 0.91, 0.31, 0.90, 0.90, 0.31, 1.57),
    "square": (0.97, 0.99, 0.99, 0.98, 0.99, 1.00, 1.00, 1.00, 0.99, 1.00, 1.00, 1.00, 0.97, 0.99, 0.99, 0.98, 1.98),
    "triangle": (0.00, 0.38, 0.36, 0.00, 0.03, 0.84, 0.82, 0.03, 0.38, 1.00, 1.00, 0.35, 0.84, 0.99, 0.99, 0.83, 1.10),
    "diamond": (0.02, 0.63, 0.62, 0.02, 0.62, 1.00, 1.00, 0.62, 0.58, 1.00, 1.00, 0.60, 0.01, 0.59, 0.61, 0.02, 1.12),
    "star": (0.00, 0.36, 0.37, 0.00, 0.62, 0.93, 0.93, 0.62, 0.28, 1.00, 1.00, 0.29, 0.23, 0.68, 0.67, 0.23, 1.03),
    "heart": (0.75, 0.89, 0.89, 0.75, 0.96, 1.00, 1.00, 0.97, 0.62, 1.00, 1.00, 0.63, 0.05, 0.70, 0.70, 0.05, 1.50),
    "cross": (0.00, 0.54, 0.56, 0.00, 0.55, 0.83, 0.83, 0.55, 0.56, 0.83, 0.83, 0.55, 0.00, 0.54, 0.55, 0.00, 0.97),
    "ring": (0.33, 0.82, 0.83, 0.32, 0.81, 0.07, 0.07, 0.81, 0.82, 0.07, 0.07, 0.81, 0.31, 0.82, 0.82, 0.32, 1.01),
    "moon": (0.19, 0.73, 0.85, 0.39, 0.88, 0.99, 0.21, 0.00, 0.88, 0.99, 0.21, 0.00, 0.19, 0.74, 0.84, 0.39, 1.06),
    "arrow": (0.00, 0.01, 0.62, 0.04, 0.66, 0.68, 0.96, 0.67, 0.67, 0.69, 0.97, 0.66, 0.00, 0.01, 0.61, 0.04, 0.91),
}
# fmt: on


def detect_by_profile(image: npt.NDArray[np.uint8]) -> list[Detection]:
    """Objects of a picture `(H, W, 3)` uint8, by pixel names, flood fill and zoning features."""
    height, width, _ = image.shape
    names = [[_pixel_name(*(int(v) for v in image[y, x])) for x in range(width)] for y in range(height)]
    seen: set[tuple[int, int]] = set()
    found: list[Detection] = []
    smallest = 16 * (height / 64) ** 2
    for y in range(height):
        for x in range(width):
            if names[y][x] and (y, x) not in seen:
                area = _flood(names, y, x, seen)
                if len(area) >= smallest:
                    found.append(_name_area(names[y][x], area))
    return found


def _pixel_name(red: int, green: int, blue: int) -> str:
    """Colour name of a pixel by hue, saturation and value; "" for light and greyish ones (background, edges)."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    if value < 0.32:
        return "black"
    if saturation < 0.3:
        return ""
    degrees = hue * 360
    if 8 <= degrees < 45 and value < 0.68:
        return "brown" if saturation > 0.45 else ""
    name = next((name for name, low, high in HUES if low <= degrees < high), "")
    is_pale = saturation < (0.3 if name == "pink" else 0.5)
    return "" if is_pale else name


def _flood(names: list[list[str]], y: int, x: int, seen: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pixels (y, x) of equal name that touch by a side or a corner."""
    name, stack, area = names[y][x], [(y, x)], []
    seen.add((y, x))
    while stack:
        row, column = stack.pop()
        area.append((row, column))
        for near in ((row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
            inside = 0 <= near[0] < len(names) and 0 <= near[1] < len(names[0])
            if inside and near not in seen and names[near[0]][near[1]] == name:
                seen.add(near)
                stack.append(near)
    return area


def features(area: list[tuple[int, int]]) -> npt.NDArray[np.float64]:
    """Fill of each of 4 x 4 zones of the box, and of the box `(17,)`, each 0..1."""
    points = np.array(area)
    low, high = points.min(0), points.max(0) + 1
    mask = np.zeros(high - low)
    mask[tuple((points - low).T)] = 1
    fine = np.kron(mask, np.ones((ZONES, ZONES)))
    zones = fine.reshape(ZONES, mask.shape[0], ZONES, mask.shape[1]).mean(axis=(1, 3))
    return np.append(zones.ravel(), mask.mean() * 2)


def _name_area(color: str, area: list[tuple[int, int]]) -> Detection:
    values = features(area)
    distances = {name: float(np.linalg.norm(values - center)) for name, center in CENTROIDS.items()}
    shape = min(distances, key=lambda name: distances[name])
    rows, columns = [y for y, _ in area], [x for _, x in area]
    box = (float(min(columns)), float(min(rows)), float(max(columns) + 1), float(max(rows) + 1))
    stretch = (box[2] - box[0]) / (box[3] - box[1])
    is_sure = distances[shape] < MAX_DISTANCE and 0.6 < stretch < 1.67
    return Detection(shape if is_sure else UNKNOWN, color, max(0.01, 1 - distances[shape]), box, 0.0)
