"""The `hf` grader without weights: post-processing on made-up logits, and tiny random models end to end."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from eval.geneval.detectors import Grader, describe_picture
from eval.geneval.hf import ClipColors, Mask2Former, box_of, check_class_names, hf_grader, postprocess, prepare
from eval.geneval.prompts import CLASSES
from eval.geneval.verdict import COLORS

COCO = {**dict(enumerate(CLASSES)), 3: "motorbike", 4: "aeroplane", 57: "sofa", 64: "mouse", 65: "remote", 66: "keyboard"}


def logits_of(rectangles, height, width):
    """Mask logits `(Q, h, w)`: +8 inside each (x0, y0, x1, y1), -8 outside."""
    masks = torch.full((len(rectangles), height, width), -8.0)
    for mask, (x0, y0, x1, y1) in zip(masks, rectangles, strict=True):
        mask[y0:y1, x0:x1] = 8.0
    return masks


def class_logits(labels, strength=12.0):
    rows = torch.zeros(len(labels), 81)
    for row, label in zip(rows, labels, strict=True):
        row[label] = strength
    return rows


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [((512, 512), (800, 800), (800, 800)), ((640, 480), (800, 1067), (800, 1088)), ((300, 900), (1333, 444), (1344, 448))],
)
def test_pictures_are_prepared_as_published(size, resized, padded):
    pixels, inner = prepare(Image.new("RGB", size, (10, 20, 30)))
    assert inner == resized and tuple(pixels.shape) == (1, 3, *padded)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    torch.testing.assert_close(pixels[0, :, 0, 0], (torch.tensor([10.0, 20.0, 30.0]) - mean) / std)
    if padded != resized:
        torch.testing.assert_close(pixels[0, :, -1, -1], (128 - mean) / std)


def test_boxes_are_exact_and_exclusive_on_a_wide_picture():
    # 160 x 100 resized to 64 x 40 (height 40), padded to 64 x 64; logits at a quarter of it. The object fills the right bottom
    # quarter of the picture itself: columns 8..16 and rows 5..10 of the 16 x 16 logits, of which rows 10..16 are padding.
    masks = logits_of([(8, 5, 16, 16)], 16, 16)
    (found,) = postprocess(class_logits([0]), masks, (64, 64), (40, 64), (100, 160))
    assert found.class_name == "person" and found.mask.shape == (100, 160)
    x0, y0, x1, y1 = found.box
    assert (x1, y1) == (160.0, 100.0) and abs(x0 - 80) <= 1 and abs(y0 - 50) <= 1
    assert found.mask.sum() == pytest.approx((160 - x0) * (100 - y0), rel=0.01)  # bilinear growth rounds the corner off


def test_box_ends_are_exclusive():
    mask = torch.zeros(6, 9, dtype=torch.bool)
    assert box_of(mask) == (0.0, 0.0, 0.0, 0.0)
    mask[2:4, 3:8] = True
    assert box_of(mask) == (3.0, 2.0, 8.0, 4.0)
    mask[5, 8] = True
    assert box_of(mask) == (3.0, 2.0, 9.0, 6.0)


def reference(class_logits, mask_logits, padded, resized, original):
    """mmdet's order in plain steps: all 100 best pairs at once, scores per pair, no shortcut. [(label, score, box)]."""
    scores, index = class_logits.softmax(-1)[:, :80].flatten().topk(100)
    masks = F.interpolate(mask_logits[None], padded, mode="bilinear", align_corners=False)[:, :, : resized[0], : resized[1]]
    masks = F.interpolate(masks, original, mode="bilinear", align_corners=False)[0]
    rows = []
    for score, pair in zip(scores.tolist(), index.tolist(), strict=True):
        logit = masks[pair // 80].numpy()
        inside = logit > 0
        total = score * float((1 / (1 + np.exp(-logit[inside]))).sum() / (inside.sum() + 1e-6))
        ys, xs = np.where(inside)
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else (0, 0, 0, 0)
        rows.append((CLASSES[pair % 80], total, tuple(map(float, box))))
    return [row for row in rows if row[1] > 0.05]


@pytest.mark.parametrize("original", [(100, 160), (90, 60), (64, 64)])
def test_postprocessing_equals_the_plain_reference(original):
    generator = torch.Generator().manual_seed(3)
    scale = 64 / max(original)
    resized = (round(original[0] * scale), round(original[1] * scale))
    padded = tuple(math.ceil(side / 32) * 32 for side in resized)
    smooth = torch.randn(7, 3, 3, generator=generator)
    masks = 4 * F.interpolate(smooth[None], (padded[0] // 4, padded[1] // 4), mode="bicubic")[0]
    classes = 3 * torch.randn(7, 81, generator=generator)
    found = postprocess(classes, masks, padded, resized, original)
    expected = reference(classes, masks, padded, resized, original)
    assert len(found) == len(expected) > 5
    for one, (name, score, box) in zip(found, expected, strict=True):
        assert (one.class_name, one.box) == (name, box) and one.score == pytest.approx(score, abs=1e-5)


def test_a_query_may_give_two_classes_and_an_empty_mask_gives_none():
    classes = torch.full((2, 81), -20.0)
    classes[0, 5], classes[0, 7], classes[1, 80] = 3.0, 2.8, 10.0
    masks = logits_of([(2, 2, 8, 8), (0, 0, 16, 16)], 16, 16)
    found = postprocess(classes, masks, (64, 64), (64, 64), (64, 64))
    assert [one.class_name for one in found] == ["bus", "truck"] and found[0].box == found[1].box
    assert postprocess(class_logits([0]), torch.full((1, 16, 16), -1.0), (64, 64), (64, 64), (64, 64)) == []


def test_class_names_are_asserted_by_index():
    check_class_names(COCO)
    with pytest.raises(ValueError, match="class 0 of the detector is 'bicycle' instead of 'person'"):
        check_class_names({**COCO, 0: "bicycle", 1: "person"})
    with pytest.raises(ValueError, match="has 133 classes"):
        check_class_names({index: str(index) for index in range(133)})


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=8,
        dim_feedforward=8, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5,
        id2label=COCO, label2id={name: index for index, name in COCO.items()},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(200)  # sure enough to find something
    return model


def tokenize(texts):
    """Each letter is a token; the last one is the end of text, the highest id."""
    length = max(map(len, texts)) + 1
    rows = [[ord(letter) % 90 for letter in text] + [98] + [98] * (length - len(text) - 1) for text in texts]
    return {"input_ids": torch.tensor(rows)}


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 99, "max_position_embeddings": 77, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 98}
    vision = {**small, "image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))


def test_a_random_detector_gives_records_of_a_picture(segmenter, clip, monkeypatch):
    monkeypatch.setattr("eval.geneval.hf.SHORT_SIDE", 80)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    grader = Grader(Mask2Former(segmenter), ClipColors(clip, tokenize), {}, 0.0)
    found = grader.detector.detect(image)
    assert found and all(one.mask.shape == (48, 80) and one.box[2] <= 80 and one.box[3] <= 48 for one in found)
    metadata = {"tag": "colors", "include": [{"class": name, "count": 1, "color": "red"} for name in CLASSES]}
    record = describe_picture(grader, image, metadata)
    assert record["image_size"] == [80, 48] and record["detections"].keys() == record["colors"].keys()
    for name, rows in record["detections"].items():
        assert len(record["colors"][name]) == len(rows) and set(record["colors"][name]) <= set(COLORS)


def test_a_detector_of_other_classes_is_refused(segmenter):
    config = type(segmenter.config).from_dict({**segmenter.config.to_dict(), "id2label": {0: "person", 1: "cup"}})
    with pytest.raises(ValueError, match="has 2 classes"):
        Mask2Former(Mask2FormerForUniversalSegmentation(config))


def test_colours_equal_the_plain_zero_shot_classifier(clip):
    rng = np.random.default_rng(1)
    crops = [Image.fromarray(rng.integers(0, 256, (height, 40, 3), dtype=np.uint8)) for height in range(30, 50)]
    namer = ClipColors(clip, tokenize)
    names = namer.classify(crops, "orange")
    with torch.no_grad():
        weights = []
        for color in COLORS:
            texts = [f"a photo of a {color} orange", f"a photo of a {color}-colored orange", f"a photo of a {color} object"]
            states = clip.text_model(**tokenize(texts)).pooler_output @ clip.text_projection.weight.T
            mean = sum(state / state.norm() for state in states) / 3
            weights.append(mean / mean.norm())
        for crop, name in zip(crops, names, strict=True):
            pixels = namer.transform(crop)[None]
            state = (clip.vision_model(pixel_values=pixels).pooler_output @ clip.visual_projection.weight.T)[0]
            assert COLORS[int(torch.stack([state @ weight for weight in weights]).argmax())] == name
    assert len(names) == 20 and namer.classify([], "orange") == []


@pytest.mark.parametrize(
    ("options", "message"), [({"threshold": "0.01"}, "lies below 0.05"), ({"clip_model": "ViT-B-32"}, "--clip-model")]
)
def test_options_that_cannot_be_followed_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hf_grader("no-such-folder", "no-such-folder", "cpu", options)
