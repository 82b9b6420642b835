"""What finds objects and names their colours: two protocols, and the crops between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image, ImageOps

from eval.geneval.verdict import Detection

HF_DETECTOR, HF_CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"


class Detector(Protocol):
    """Finds objects in an RGB picture. Boxes end exclusively, in pixels of that picture; masks are `(H, W)` booleans."""

    def detect(self, image: Image.Image) -> list[Detection]: ...


class ColorNamer(Protocol):
    """Names the colour of each crop of an object of `class_name`."""

    def classify(self, crops: Sequence[Image.Image], class_name: str) -> list[str]: ...


@dataclass(frozen=True)
class Grader:
    """A detector and what names colours; without `colors` the detections carry their colours themselves.

    `options` are in the published names and form. Detections of at most `stored_score` are not kept: thresholds below it
    cannot be scored. `identity` names models and versions: results of two identities never share a file.
    """

    detector: Detector
    colors: ColorNamer | None
    options: Mapping[str, str]
    stored_score: float
    identity: Mapping[str, Any] = field(default_factory=dict)


def load_picture(path: Any) -> Image.Image:
    """A picture as detectors see it: upright, RGB. Raises `OSError` when it cannot be read to its end."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        return upright.convert("RGB")


def crop_of(image: Image.Image, detection: Detection, options: Mapping[str, str]) -> Image.Image:
    """The object on the blank colour `bgcolor` ("original": on the picture), cut to its box unless `crop` is not "1"."""
    cut = image
    if detection.mask is not None:
        if detection.mask.shape != image.size[::-1]:
            raise ValueError(f"mask {detection.mask.shape} of a picture of size {image.size}; give (height, width)")
        bgcolor = options.get("bgcolor", "#999")
        blank = image.copy() if bgcolor == "original" else Image.new("RGB", image.size, bgcolor)
        cut = Image.composite(image, blank, Image.fromarray(detection.mask))
    if options.get("crop", "1") != "1":
        return cut
    x0, y0, x1, y1 = (round(float(value)) for value in detection.box)
    return cut.crop((x0, y0, x1, y1))


def describe_picture(grader: Grader, image: Image.Image, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Raw detections of a picture above the stored score, with the colours of the classes whose colour a clause asks for."""
    by_class: dict[str, list[Detection]] = {}
    for detection in grader.detector.detect(image):
        if detection.score > grader.stored_score:
            by_class.setdefault(detection.class_name, []).append(detection)
    colors: dict[str, list[str | None]] = {}
    for name in {clause["class"] for clause in metadata.get("include", []) if "color" in clause} & set(by_class):
        found = by_class[name]
        if grader.colors is None:
            colors[name] = [detection.color for detection in found]
        else:
            colors[name] = list(grader.colors.classify([crop_of(image, one, grader.options) for one in found], name))
    return {
        "image_size": list(image.size),
        "detections": {name: [[*one.box, one.score] for one in found] for name, found in by_class.items()},
        "colors": colors,
    }
