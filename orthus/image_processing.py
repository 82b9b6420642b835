"""Pictures <-> pixel values: resize, crop and scale exactly as the published preprocessing does, and back.

PIL does the resizing because its Lanczos filter is what the published weights saw. Scaling looks up a table of 256
values per channel: the fastest way, and equal to the published arithmetic, not close to it.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

from orthus import remote_code

ImageLike = Image.Image | np.ndarray | torch.Tensor

MAX_PIXELS = 64_000_000
EXIF_ORIENTATION = 0x0112
LATENTS_KEY = "orthus_latents"  # in `Image.info`, which copies and conversions inherit: hence the checksum
ALWAYS_ON = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
# What Pillow's decoders raise on damaged files (OSError includes UnidentifiedImageError and "image file is truncated").
DECODE_ERRORS = (OSError, SyntaxError, EOFError, ValueError, TypeError, IndexError, KeyError, struct.error, zlib.error,
                 Image.DecompressionBombError)  # fmt: skip


def load_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads and decodes one picture file.

    Returns the decoded picture in its own mode, EXIF orientation not yet applied (the image processor does that).
    Raises `FileNotFoundError` for a missing file and `ValueError` for one that is damaged or larger than `max_pixels`.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no image file at {os.fspath(path)!r}")
    try:
        image = Image.open(path)
    except DECODE_ERRORS as error:
        raise ValueError(f"cannot read {os.fspath(path)!r} as an image: {error}") from error
    with image:
        _check_pixels(image.width, image.height, max_pixels)
        _decode(image)
        return image.copy()


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"image of {width} x {height} pixels is empty")
    if width * height > max_pixels:
        raise ValueError(
            f"image of {width} x {height} = {width * height} pixels exceeds max_pixels = {max_pixels}; "
            "shrink it, or raise max_pixels if you trust its source"
        )


def _decode(image: Image.Image) -> None:
    try:
        image.load()
    except DECODE_ERRORS as error:
        raise ValueError(f"image is truncated or corrupt: {error}") from error


def array_to_image(array: np.ndarray | torch.Tensor) -> Image.Image:
    """uint8 `(H, W)`, `(H, W, 1 | 3 | 4)`, or for tensors also `(1 | 3 | 4, H, W)`, which wins where both fit.

    Raises `ValueError` for another dtype or shape.
    """
    kind = type(array).__name__
    if isinstance(array, torch.Tensor):
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            array = array.permute(1, 2, 0)
        array = array.detach().cpu().contiguous().numpy() if array.dtype == torch.uint8 else array
    if array.dtype != np.uint8:
        raise ValueError(f"{kind} image has dtype {array.dtype}; pass uint8 in 0..255, e.g. (x * 255).round() as uint8")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        raise ValueError(f"{kind} image has shape {tuple(array.shape)}; pass (H, W, 3), e.g. x.transpose(1, 2, 0)")
    if 0 in array.shape:
        raise ValueError(f"{kind} image has shape {tuple(array.shape)}: it is empty")
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    return Image.fromarray(np.ascontiguousarray(array))


def _from_high_depth(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits (modes I;16* and I, as Pillow opens 16-bit PNG) -> 8 bits; Pillow would clip at 255."""
    array = np.asarray(image).astype(np.int64)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise ValueError(f"image of mode {image.mode} has values {low}..{high}; pass 16-bit greyscale in 0..65535")
    return Image.fromarray(((array + 128) // 257).astype(np.uint8))


def _has_alpha(image: Image.Image) -> bool:
    if image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A"):
        return True
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _blend_on_white(image: Image.Image) -> Image.Image:
    """Published blending: float64 arithmetic, truncated."""
    rgba = np.asarray((image.convert("LA") if image.mode == "La" else image).convert("RGBA"))
    if (rgba[..., 3] == 255).all():
        return Image.fromarray(np.ascontiguousarray(rgba[..., :3]))
    alpha = rgba[..., 3:] / 255.0
    return Image.fromarray(((1 - alpha) * 255 + alpha * rgba[..., :3]).astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL picture -> upright RGB: EXIF orientation applied, transparency blended on white, 16 bits scaled to 8.

    Raises `ValueError` for a damaged picture or a mode without a defined conversion (F, LAB).
    """
    _decode(image)
    if image.info or image.format:
        try:
            image = ImageOps.exif_transpose(image)
        except DECODE_ERRORS as error:
            warnings.warn(f"ignored unreadable EXIF data, so the image may lie on its side: {error}", stacklevel=2)
    if _has_alpha(image):
        return _blend_on_white(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return _from_high_depth(image).convert("RGB")
    if image.mode not in ("1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"):
        raise ValueError(f"image mode {image.mode!r} has no defined conversion to RGB; convert it first")
    return image.convert("RGB")


class KnownLatents:
    """Latents `(L, C)` in the `info` of a picture, with a checksum of its pixels. Pillow compares `info` where pictures are
    compared: equal pixels count as equal."""

    def __init__(self, owner: str, checksum: int, latents: torch.Tensor) -> None:
        self.owner, self.checksum, self.latents = owner, checksum, latents

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KnownLatents) and self.checksum == other.checksum

    def __hash__(self) -> int:
        return hash(self.checksum)


def remember_latents(image: Image.Image, latents: torch.Tensor, owner: str) -> None:
    """Attach the latents `(L, C)` that a picture was decoded from, for whoever knows the word `owner`."""
    image.info[LATENTS_KEY] = KnownLatents(owner, zlib.crc32(image.tobytes()), latents.detach().float().cpu())


def latents_of(image: Image.Image, owner: str) -> torch.Tensor | None:
    """The latents `(L, C)` of a generated picture; None for others, and for one that was changed afterwards."""
    known = getattr(image, "info", {}).get(LATENTS_KEY)
    if not isinstance(known, KnownLatents) or known.owner != owner or known.checksum != zlib.crc32(image.tobytes()):
        return None
    return known.latents


class OrthusImagesKwargs(ImagesKwargs, total=False):
    max_pixels: int


def _edge(size: int | Mapping[str, int]) -> int:
    edge = size if isinstance(size, int) else size.get("shortest_edge")
    if not isinstance(edge, int) or isinstance(edge, bool) or edge < 1:
        raise ValueError(f"size = {size!r}; pass a positive number of pixels or {{'shortest_edge': pixels}}")
    return edge


def _crop(crop_size: int | Mapping[str, int] | None, edge: int) -> tuple[int, int]:
    if crop_size is None or isinstance(crop_size, int):
        crop_size = {"height": crop_size or edge, "width": crop_size or edge}
    height, width = crop_size.get("height"), crop_size.get("width")
    if not isinstance(height, int) or not isinstance(width, int) or not (1 <= height <= edge and 1 <= width <= edge):
        raise ValueError(f"crop_size = {crop_size!r}; pass height and width from 1 to size = {edge}")
    return height, width


class OrthusImageProcessor(BaseImageProcessor):
    """Shortest side to `size`, centre crop to `crop_size` (default: a square), `(x * rescale_factor - mean) / std`.

    Reads published `preprocessor_config.json` files as they are. All `do_*` steps are part of the model's contract and
    cannot be switched off. A picture of more than `max_pixels` is refused before it is decoded or enlarged.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = OrthusImagesKwargs

    def __init__(
        self,
        size: int | Mapping[str, int] = 512,
        crop_size: int | Mapping[str, int] | None = None,
        resample: int = Image.Resampling.LANCZOS,
        rescale_factor: float = 0.0078,
        image_mean: Iterable[float] = (1.0, 1.0, 1.0),
        image_std: Iterable[float] = (1.0, 1.0, 1.0),
        max_pixels: int = MAX_PIXELS,
        **kwargs: Any,
    ) -> None:
        for name in ALWAYS_ON:
            if kwargs.pop(name, True) not in (True, None):
                raise ValueError(f"{name} = False is not supported: the autoencoder needs all of {ALWAYS_ON}")
        super().__init__(**kwargs)
        edge = _edge(size)
        height, width = _crop(crop_size, edge)
        self.size = {"shortest_edge": edge}
        self.crop_size = {"height": height, "width": width}
        self.resample = int(Image.Resampling(resample))
        self.rescale_factor = float(rescale_factor)
        self.image_mean = [float(value) for value in image_mean]
        self.image_std = [float(value) for value in image_std]
        self.max_pixels = int(max_pixels)
        channels = (self.image_mean, self.image_std)
        if self.rescale_factor <= 0 or min(self.image_std) <= 0 or any(len(values) != 3 for values in channels):
            raise ValueError(
                f"{rescale_factor=}, {image_mean=}, {image_std=}; "
                "pass a positive factor, three means and three positive deviations"
            )

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoImageProcessor") -> None:
        """From now on, what is saved holds our code too; see `remote_code.register`."""
        remote_code.register(cls, auto_class)

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """As in `transformers`, and next to `preprocessor_config.json` the code if it is registered; see `remote_code.follow`."""
        super().to_json_file(json_file_path)
        remote_code.follow(json_file_path)

    def prepare(self, image: ImageLike) -> Image.Image:
        """One picture -> RGB of exactly `crop_size`, uint8.

        Raises `ValueError` for a wrong type, dtype, shape or mode, a damaged picture, or one over `max_pixels`.
        """
        height, width = self.crop_size["height"], self.crop_size["width"]
        if type(image) is Image.Image and image.mode == "RGB" and image.size == (width, height) and not image.info:
            if min(width, height) == self.size["shortest_edge"]:
                return image
        if isinstance(image, (np.ndarray, torch.Tensor)):
            image = array_to_image(image)
        if not isinstance(image, Image.Image):
            hint = "open files with load_image(path)" if isinstance(image, (str, os.PathLike)) else "convert it first"
            raise ValueError(f"an image is a PIL image, a uint8 array or tensor, not {type(image).__name__}; {hint}")
        _check_pixels(image.width, image.height, self.max_pixels)
        return self._resize_and_crop(to_rgb(image))

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        edge, shortest = self.size["shortest_edge"], min(image.size)
        new_width, new_height = (int(edge * side / shortest) for side in image.size)
        if (new_width, new_height) != image.size:
            _check_pixels(new_width, new_height, self.max_pixels)
            image = image.resize((new_width, new_height), self.resample)
        height, width = self.crop_size["height"], self.crop_size["width"]
        left, top = (new_width - width) // 2, (new_height - height) // 2
        return image if image.size == (width, height) else image.crop((left, top, left + width, top + height))

    def pixel_values(self, images: Iterable[ImageLike]) -> torch.Tensor:
        """Pictures -> `(N, 3, H, W)` float32; `N` may be 0. Raises as `prepare` does."""
        pictures = [self.prepare(image) for image in images]
        table = self._table()
        values = np.empty((len(pictures), 3, self.crop_size["height"], self.crop_size["width"]), np.float32)
        for value, picture in zip(values, pictures, strict=True):
            pixels = np.asarray(picture)  # (H, W, 3)
            for channel in range(3):
                np.take(table[channel], pixels[..., channel], out=value[channel], mode="clip")
        return torch.from_numpy(values)

    def _table(self) -> np.ndarray:
        """`(3, 256)` float32: what each uint8 value becomes, rounded where the published code rounds."""
        scaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
        return (scaled - mean[:, None]) / std[:, None]

    def preprocess(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """One picture or a (nested) list of them -> `pixel_values (N, 3, H, W)`. Raises as `prepare` does."""
        pixel_values = self.pixel_values(flatten_images(images))
        return BatchFeature({"pixel_values": pixel_values.numpy()}, tensor_type=return_tensors)

    def postprocess(self, pixel_values: torch.Tensor | np.ndarray) -> list[Image.Image]:
        """`(N, 3, H, W)` or `(3, H, W)` of any float dtype -> N RGB pictures; clipped, then truncated as published.

        Raises `ValueError` for another shape and for values that are not finite.
        """
        values = torch.as_tensor(pixel_values).detach().to("cpu", torch.float32)
        values = values[None] if values.ndim == 3 else values
        if values.ndim != 4 or values.shape[1] != 3:
            raise ValueError(f"pixel_values has shape {tuple(values.shape)}; pass (N, 3, H, W) or (3, H, W)")
        if not torch.isfinite(values).all():
            raise ValueError("pixel_values holds NaN or infinity: look at the latents that were decoded")
        array = values.permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
        array = array * np.array(self.image_std, np.float32) + np.array(self.image_mean, np.float32)
        array = array * np.float32(1 / self.rescale_factor)  # not a division: the published code rounds this way
        return [Image.fromarray(picture) for picture in np.ascontiguousarray(array.clip(0, 255).astype(np.uint8))]


def flatten_images(images: Any) -> list[ImageLike]:
    """One picture, a stack `(N, ...)`, or nested lists -> a flat list in order."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in flatten_images(entry)]
    return list(images) if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4 else [images]
