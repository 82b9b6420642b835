"""Scene -> pixels, antialiased. Masks of (shape, size, sub-pixel offset) are cached; the rest is array slices."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from math import ceil, cos, floor, pi, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orthus.data.world.scene import Scene

RGB: dict[str, tuple[int, int, int]] = {
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
BACKGROUND_RGB: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "ivory": (248, 242, 228),
    "mint": (230, 245, 236),
    "sky": (230, 239, 250),
}
SUPERSAMPLING = 8
Field = NDArray[np.float64]
Mask = NDArray[np.bool_]


def _star(u: Field, v: Field) -> Mask:
    """Five-pointed star, tip up, inner radius half the outer: one edge, the angle folded into a tenth of a turn."""
    angle = np.mod(np.arctan2(u, -v), 2 * pi / 5)
    angle = np.minimum(angle, 2 * pi / 5 - angle)
    radius = np.hypot(u, v)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    inner_x, inner_y = 0.5 * cos(pi / 5), 0.5 * sin(pi / 5)
    return (along - 1) * inner_y <= across * (inner_x - 1)


def _arrow(u: Field, v: Field) -> Mask:
    shaft = (np.abs(v) <= 0.3) & (u >= -1) & (u <= 0.1)
    return shaft | ((u >= 0) & (np.abs(v) <= 1 - u))


def _cross(u: Field, v: Field) -> Mask:
    across, along = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    return (across <= 0.3) & (along <= 1)


# Whether points are inside a shape, in the shape's own coordinates: v points down, all within +-1.6.
INSIDE: dict[str, Callable[[Field, Field], Mask]] = {
    "circle": lambda u, v: np.hypot(u, v) <= 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 1,
    "triangle": lambda u, v: (np.abs(u) <= (v + 1) / 2) & (v <= 1),
    "diamond": lambda u, v: np.abs(u) + np.abs(v) <= 1,
    "star": _star,
    "heart": lambda u, v: (u**2 + v**2 - 1) ** 3 + u**2 * v**3 <= 0,
    "cross": _cross,
    "ring": lambda u, v: (np.hypot(u, v) <= 1) & (np.hypot(u, v) >= 0.56),
    "moon": lambda u, v: (np.hypot(u, v) <= 1) & (np.hypot(u - 0.55, v) >= 0.82),
    "arrow": _arrow,
}


@cache
def _native_box(shape: str) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the shape in its own coordinates, to 1/400."""
    axis = np.linspace(-1.6, 1.6, 1281)
    inside = INSIDE[shape](*np.meshgrid(axis, axis))
    columns, rows = axis[inside.any(axis=0)], axis[inside.any(axis=1)]
    return columns[0], rows[0], columns[-1], rows[-1]


@lru_cache(maxsize=16384)
def _alpha(shape: str, size: float, offset_x: float, offset_y: float) -> NDArray[np.float32]:
    """Coverage (h, w, 1) of a shape stretched to a `size` box that starts `offset` pixels into its first pixel."""
    if shape not in INSIDE:
        raise ValueError(f"shape={shape!r} cannot be drawn; use one of {', '.join(INSIDE)}")
    left, top, right, bottom = _native_box(shape)
    width, height = ceil(offset_x + size), ceil(offset_y + size)
    fine_x = (np.arange(width * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - offset_x
    fine_y = (np.arange(height * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - offset_y
    u, v = np.meshgrid(left + fine_x / size * (right - left), top + fine_y / size * (bottom - top))
    within = (fine_x >= 0) & (fine_x <= size) & ((fine_y >= 0) & (fine_y <= size))[:, None]
    inside = (INSIDE[shape](u, v) & within).astype(np.float32)
    blocks = inside.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING)
    return blocks.mean(axis=(1, 3), dtype=np.float32)[..., None]


@cache
def _rgb(color: str) -> NDArray[np.float32]:
    if color not in RGB:
        raise ValueError(f"color={color!r} cannot be drawn; use one of orthus.data.world.scene.COLORS")
    return np.array(RGB[color], dtype=np.float32)


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw the scene: uint8 (H, W, 3). ValueError for an unknown shape, colour or background."""
    if scene.background not in BACKGROUND_RGB:
        raise ValueError(f"background={scene.background!r} is unknown; use one of {', '.join(BACKGROUND_RGB)}")
    side = scene.image_size
    canvas = np.empty((side, side, 3), dtype=np.float32)
    canvas[:] = BACKGROUND_RGB[scene.background]
    for item in scene.objects:
        start_x, start_y = item.x - item.size / 2, item.y - item.size / 2
        x, y = floor(start_x), floor(start_y)
        alpha = _alpha(item.shape, item.size, start_x - x, start_y - y)
        if x < 0 or y < 0 or x + alpha.shape[1] > side or y + alpha.shape[0] > side:
            raise ValueError(f"{item} reaches outside the {side} px picture; keep its box inside")
        patch = canvas[y : y + alpha.shape[0], x : x + alpha.shape[1]]
        patch += alpha * (_rgb(item.color) - patch)
    return (canvas + 0.5).astype(np.uint8)


def picture(scene: Scene) -> Image.Image:
    """The scene as an RGB picture."""
    return Image.fromarray(render(scene))
