"""GenEval's rules: relations, filtering, verdicts and their reasons, and the refusal to average a partial run."""

import json
import math
import random

import pytest

from eval.geneval.summary import OFFICIAL, Protocol, summarise
from eval.geneval.verdict import TAGS, Detection, Options, detected_colors, filter_detections, relative_position, verdict


def square(x, y, side=10.0):
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def found(name, x, y, score=0.95, color=None, side=10.0):
    return Detection(name, score, square(x, y, side), color)


def judge(detections, include, exclude=(), tag="two_object", options=Options()):
    metadata = {"tag": tag, "include": list(include), "exclude": list(exclude)}
    return verdict(detections, detected_colors, metadata, None, options)


def test_equal_boxes_need_more_than_0_4_sides_between_their_centres():
    # off - 0.2 s > 0.5 off, that is off > 0.4 s
    assert relative_position(square(53.99, 50), square(50, 50)) == set()
    assert relative_position(square(54.01, 50), square(50, 50)) == {"right of"}
    assert relative_position(square(45.99, 50), square(50, 50)) == {"left of"}
    assert relative_position(square(50, 45.99), square(50, 50)) == {"above"}
    assert relative_position(square(50, 54.01), square(50, 50)) == {"below"}


def test_far_boxes_hold_one_relation_to_30_degrees_and_both_in_the_middle():
    def relations(degrees):
        angle = math.radians(degrees)
        return relative_position(square(1000 * math.cos(angle), 1000 * math.sin(angle)), square(0, 0))

    assert relations(29) == {"right of"}
    assert relations(45) == {"right of", "below"}
    assert relations(61) == {"below"}


def test_the_norm_is_that_of_the_offset_before_shrinking():
    # (5, 2) shrinks to (3, 0): 3 over the unshrunk norm is 0.557; (3.9, 1.9) to (1.9, 0): 0.438
    assert relative_position(square(5, 2), square(0, 0)) == {"right of"}
    assert relative_position(square(3.9, 1.9), square(0, 0)) == set()


def test_contained_and_identical_boxes_have_no_relation():
    assert relative_position((0, 0, 100, 100), (40, 40, 60, 60)) == set()
    assert relative_position(square(5, 5), square(5, 5)) == set()


def test_chance_of_one_relation_for_two_random_objects_is_near_0_29():
    rng = random.Random(0)
    hits = trials = 0
    while trials < 20_000:
        a, b = [(rng.uniform(10, 90), rng.uniform(10, 90)) for _ in range(2)]
        if max(abs(a[0] - b[0]), abs(a[1] - b[1])) < 20:
            continue
        trials += 1
        hits += "left of" in relative_position(square(*a, 20), square(*b, 20))
    assert 0.27 <= hits / trials <= 0.31


def test_filter_is_strict_and_counting_has_its_own_threshold():
    detections = [found("cup", 0, 0, score) for score in (0.3, 0.31, 0.9, 0.91)]
    assert [d.score for d in filter_detections(detections, "single_object")["cup"]] == [0.91, 0.9, 0.31]
    assert [d.score for d in filter_detections(detections, "counting")["cup"]] == [0.91]
    assert filter_detections([found("cup", 0, 0, 0.3)], "colors") == {}


def test_filter_keeps_16_and_overlapping_boxes_unless_asked():
    detections = [found("cup", 0, 0, 0.4 + i / 100) for i in range(20)]
    kept = filter_detections(detections, "colors")["cup"]
    assert len(kept) == 16 and kept[0].score == pytest.approx(0.59) and kept[-1].score == pytest.approx(0.44)
    assert len(filter_detections(detections, "colors", Options(max_overlap=0.5))["cup"]) == 1


def test_missing_object_and_extra_copies():
    include = [{"class": "cup", "count": 1}, {"class": "dog", "count": 1}]
    assert judge([found("cup", 0, 0), found("cup", 20, 0), found("dog", 40, 0)], include).correct
    failed = judge([found("cup", 0, 0)], include)
    assert not failed.correct and failed.reason == "expected dog>=1, found 0"


def test_counting_fails_below_and_above():
    include, exclude = [{"class": "cup", "count": 3}], [{"class": "cup", "count": 4}]
    cups = [found("cup", 20 * i, 0) for i in range(4)]
    assert judge(cups[:3], include, exclude, "counting").correct
    assert judge(cups[:2], include, exclude, "counting").reason == "expected cup>=3, found 2"
    assert judge(cups, include, exclude, "counting").reason == "expected cup<4, found 4"


def test_color_looks_only_at_the_most_confident_objects():
    include = [{"class": "cup", "count": 1, "color": "red"}]
    best_is_blue = [found("cup", 0, 0, 0.9, "red"), found("cup", 20, 0, 0.95, "blue")]
    assert judge(best_is_blue, include).reason == "expected red cup>=1, found 0 red; and 1 blue"
    assert judge([found("cup", 0, 0, 0.96, "red"), best_is_blue[1]], include).correct


def test_position_reasons_are_canonical():
    include = [{"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    assert judge([found("cup", 50, 50), found("dog", 10, 50)], include).correct
    wrong = judge([found("cup", 50, 50), found("dog", 90, 10)], include)
    assert wrong.reason == "expected dog left of target, found above and right of target"
    without = judge([found("dog", 10, 50)], include)
    assert without.reason == "expected cup>=1, found 0\nno target for dog to be left of"


def test_position_is_judged_for_every_pair():
    include = [{"class": "cup", "count": 2}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    dog, near, far = found("dog", 30, 50), found("cup", 60, 50), found("cup", 5, 50)
    assert judge([dog, near, found("cup", 90, 50)], include).correct
    assert not judge([dog, near, far], include).correct


def test_details_and_bad_input():
    detections = [found("cup", 5, 5)]
    result = verdict(detections, detected_colors, {"tag": "single_object", "include": []}, (64, 64))
    assert result.details == {"cup": [[0.0, 0.0, 10.0, 10.0, 0.95]]}
    with pytest.raises(ValueError, match="outside the 64x64 picture"):
        verdict([found("cup", 400, 5)], detected_colors, {"tag": "colors"}, (64, 64))
    with pytest.raises(ValueError, match="refers to clause 0"):
        judge(detections, [{"class": "cup", "count": 1, "position": ["above", 0]}])


def complete_run(correct=lambda tag, prompt, sample: True):
    return [
        {"tag": tag, "metadata": json.dumps([tag, prompt]), "correct": correct(tag, prompt, sample)}
        for tag, num_prompts in OFFICIAL.prompts_per_tag.items()
        for prompt in range(num_prompts)
        for sample in range(4)
    ]


def test_overall_is_the_unweighted_mean_of_image_scores():
    assert sum(OFFICIAL.prompts_per_tag.values()) == 553 and tuple(OFFICIAL.prompts_per_tag) == TAGS
    summary = summarise(complete_run(lambda tag, prompt, sample: tag == "counting" or sample == 0))
    assert summary["tasks"]["counting"] == 1.0 and summary["tasks"]["position"] == 0.25
    assert summary["overall"] == pytest.approx((1 + 5 * 0.25) / 6)
    assert summary["num_images"] == 2212 and summary["num_prompts"] == 553 and summary["prompt_accuracy"] == 1.0


@pytest.mark.parametrize("cut", [slice(0, -1), slice(0, 400), slice(4, None)])
def test_no_overall_for_a_partial_run(cut):
    part = complete_run()[cut]
    with pytest.raises(ValueError, match="partial run"):
        summarise(part)
    summary = summarise(part, allow_partial=True)
    assert "overall" not in summary and summary["overall_partial"] == 1.0 and summary["missing"]


def test_a_small_protocol():
    results = [
        {"tag": "colors", "metadata": "a", "correct": True},
        {"tag": "colors", "metadata": "b", "correct": False},
    ]
    assert summarise(results, Protocol({"colors": 2}, 1))["overall"] == 0.5
