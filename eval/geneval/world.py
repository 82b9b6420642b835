"""The `world` grader: the small world's analytic detector, which names colours itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from eval import grader
from eval.geneval.detectors import Grader
from eval.geneval.verdict import Detection
from eval.profile_grader import detect_by_profile
from eval.small_tasks import OPTIONS

Find = Callable[[npt.NDArray[np.uint8]], Sequence[grader.Detection]]


class WorldDetector:
    """`find`: from uint8 pixels `(H, W, 3)` to the grader's detections."""

    def __init__(self, find: Find) -> None:
        self.find = find

    def detect(self, image: Image.Image) -> list[Detection]:
        return grader.as_judged(self.find(np.asarray(image.convert("RGB"))))


def world_grader() -> Grader:
    return _grader("world", grader.detect)


def second_grader() -> Grader:
    """Another analytic detector, to see where the two differ."""
    return _grader("world, by profile", detect_by_profile)


def _grader(name: str, find: Find) -> Grader:
    """The detectors reject by themselves what they are unsure of, so thresholds are open and every detection is kept."""
    options = {"threshold": str(OPTIONS.threshold), "counting_threshold": str(OPTIONS.counting_threshold)}
    return Grader(WorldDetector(find), None, options, -1.0, {"grader": name})
