"""The `hf` grader: Mask2Former and CLIP through transformers, with the published scorer's pre- and post-processing.

The architecture and training data are those of the published detector, the weights are not (detectron2's instead of mmdet's):
scores agree within about 0.01 overall and are to be labelled `geneval[hf]`, never quoted as the published benchmark.
transformers' own post-processing scales masks to 384 x 384 first, which moves boxes by many pixels, so it is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms

from eval.geneval.detectors import Grader
from eval.geneval.prompts import CLASSES
from eval.geneval.verdict import COLORS, Box, Detection, parse_options
from eval.provenance import model_folder, weights_hash

SHORT_SIDE, LONG_SIDE, STRIDE, NUM_OBJECTS = 800, 1333, 32, 100
PADDING = 128.0
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_BATCH = 16
STORED_SCORE = 0.05
OTHER_NAMES = {
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant",
    "diningtable": "dining table", "tvmonitor": "tv", "mouse": "computer mouse", "remote": "tv remote",
    "keyboard": "computer keyboard",
}  # fmt: skip
"""Names of COCO's classes in other projects -> GenEval's."""


def check_class_names(names: Mapping[int, str]) -> None:
    """Raise `ValueError` unless `names` (index -> name) are COCO's 80 classes in their order."""
    if len(names) != len(CLASSES):
        raise ValueError(f"the detector has {len(names)} classes instead of COCO's {len(CLASSES)}; give a COCO instance model")
    for index, expected in enumerate(CLASSES):
        name = names[index]
        if OTHER_NAMES.get(name, name) != expected:
            raise ValueError(f"class {index} of the detector is {name!r} instead of {expected!r}; give a COCO instance model")


def prepare(image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """Pixel values `(1, 3, H, W)`, sides padded to multiples of 32, and the (height, width) before the padding.

    The short side becomes 800 unless the long one would exceed 1333; bilinear without antialiasing, rounded to whole levels;
    grey 128 is padded before the values are normalised.
    """
    width, height = image.size
    scale = min(LONG_SIDE / max(width, height), SHORT_SIDE / min(width, height))
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    levels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None].float()
    levels = F.interpolate(levels, size, mode="bilinear", align_corners=False).round()
    right, bottom = (-size[1] % STRIDE, -size[0] % STRIDE)
    levels = F.pad(levels, (0, right, 0, bottom), value=PADDING)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (levels - mean) / std, size


def postprocess(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
    min_score: float = STORED_SCORE,
) -> list[Detection]:
    """Detections of one picture from `class_logits` (Q, 81) and `mask_logits` (Q, h, w); all sizes are (height, width).

    Order as in mmdet: masks grow to the padded input, lose the padding, grow to the original size, and only then become binary.
    A score is the class probability times the mean sigmoid inside the mask; a query may give several classes.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]  # the last class is "no object"
    num_classes = probabilities.shape[1]
    scores, flat = probabilities.flatten().topk(min(NUM_OBJECTS, probabilities.numel()))
    flat, scores = flat[scores > min_score], scores[scores > min_score]  # the mask's share can only lower a score
    found = []
    for score, index in zip(scores, flat.tolist(), strict=True):
        query, label = divmod(index, num_classes)
        mask_logit = _resize(mask_logits[query].float(), padded)[: resized[0], : resized[1]]
        mask_logit = _resize(mask_logit, original)
        mask = mask_logit > 0
        inside = (mask_logit.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
        total = float(score * inside)
        if total > min_score:
            found.append(Detection(CLASSES[label], total, box_of(mask), mask=mask.cpu().numpy()))
    return found


def _resize(values: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(values[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def box_of(mask: Tensor) -> Box:
    """(x0, y0, x1, y1) around a boolean mask `(H, W)`, ends exclusive; zeros for an empty one."""
    columns, rows = (mask.any(dim).nonzero().flatten().tolist() for dim in (0, 1))
    if not columns:
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


class Mask2Former:
    """A `Mask2FormerForUniversalSegmentation` of COCO's 80 things as a detector."""

    def __init__(self, model: Any, device: str = "cpu") -> None:
        check_class_names({int(index): name for index, name in model.config.id2label.items()})
        self.model, self.device = model.to(device).eval(), device

    @torch.no_grad()
    def detect(self, image: Image.Image) -> list[Detection]:
        pixels, resized = prepare(image)
        output = self.model(pixel_values=pixels.to(self.device))
        padded = (pixels.shape[2], pixels.shape[3])
        original = (image.height, image.width)
        return postprocess(output.class_queries_logits[0], output.masks_queries_logits[0], padded, resized, original)


class ClipColors:
    """A `CLIPModel` that names one of ten colours; `tokenize` gives model inputs of texts."""

    def __init__(self, model: Any, tokenize: Callable[[list[str]], Mapping[str, Tensor]], device: str = "cpu") -> None:
        self.model, self.tokenize, self.device = model.to(device).eval(), tokenize, device
        side = model.config.vision_config.image_size
        self.transform = transforms.Compose(
            [
                transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(side),
                transforms.ToTensor(),
                transforms.Normalize(CLIP_MEAN, CLIP_STD),
            ]
        )
        self.weights: dict[str, Tensor] = {}

    def _precision(self) -> AbstractContextManager[Any]:
        """Half precision on a GPU as the published scorer; full precision elsewhere."""
        return torch.autocast("cuda", torch.float16) if torch.device(self.device).type == "cuda" else nullcontext()

    def _weights(self, class_name: str) -> Tensor:
        """`(features, 10)`: the mean over three templates, each normalised, and the mean too. Articles stay "a"."""
        if class_name not in self.weights:
            columns = []
            for color in COLORS:
                texts = [
                    f"a photo of a {color} {class_name}",
                    f"a photo of a {color}-colored {class_name}",
                    f"a photo of a {color} object",
                ]
                inputs = {name: value.to(self.device) for name, value in self.tokenize(texts).items()}
                features = self.model.get_text_features(**inputs).pooler_output  # (3, features)
                mean = F.normalize(features, dim=-1).mean(0)
                columns.append(mean / mean.norm())
            self.weights[class_name] = torch.stack(columns, dim=1)
        return self.weights[class_name]

    @torch.no_grad()
    def classify(self, crops: Sequence[Image.Image], class_name: str) -> list[str]:
        names: list[str] = []
        with self._precision():
            weights = self._weights(class_name)
            for start in range(0, len(crops), CLIP_BATCH):
                batch = crops[start : start + CLIP_BATCH]
                pixels = torch.stack([self.transform(crop.convert("RGB")) for crop in batch])
                features = self.model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output
                logits = 100.0 * F.normalize(features, dim=-1) @ weights
                names += [COLORS[index] for index in logits.argmax(1).tolist()]
        return names


def hf_grader(detector: str, clip: str, device: str, options: Mapping[str, str]) -> Grader:
    """The grader with weights from folders or hub names. Raises `ValueError` for options that it cannot follow."""
    from transformers import AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

    for name in ("model", "clip_model"):
        if name in options:
            raise ValueError(f"option {name} is for the official detector; use --detector-model or --clip-model")
    chosen = parse_options(options)
    lowest = min(chosen.threshold, chosen.counting_threshold)
    if lowest < STORED_SCORE or math.isnan(lowest):
        raise ValueError(f"threshold {lowest} lies below {STORED_SCORE}, down to which detections are kept")
    segmenter = Mask2FormerForUniversalSegmentation.from_pretrained(detector)
    clip_model, tokenizer = CLIPModel.from_pretrained(clip), AutoTokenizer.from_pretrained(clip)

    def tokenize(texts: list[str]) -> Mapping[str, Tensor]:
        return tokenizer(texts, padding=True, return_tensors="pt")

    weights = {name: weights_hash(model_folder(name)) for name in (detector, clip)}
    precision = "fp16 colours" if device.startswith("cuda") else "fp32"
    identity = {"grader": "hf", "detector": detector, "clip": clip, "weights_sha256": weights, "precision": precision}
    return Grader(Mask2Former(segmenter, device), ClipColors(clip_model, tokenize, device), options, STORED_SCORE, identity)
