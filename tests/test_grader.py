"""The grader of small-world pictures: exact on ground truth, and it must fail what is wrong."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from eval.floors import geneval_floors, validate_grader
from eval.grader import UNKNOWN, as_judged, connected_components, detect, name_color
from eval.profile_grader import detect_by_profile
from eval.small_tasks import judge_caption, judge_content, judge_edit, match_clauses, oracle
from eval.templates import fit, templates
from orthus.data.world.benchmark import edit_items, small_geneval_items
from orthus.data.world.render import picture, render
from orthus.data.world.sampling import sample_scene
from orthus.data.world.scene import COLORS, SHAPES, Scene, SceneObject, WorldConfig


def degrade(image, rng, sigma=6.0, blur=0.5):
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur)), float)
    return np.clip(blurred + rng.normal(0, sigma, image.shape), 0, 255).round().astype(np.uint8)


def is_exact(scene, detections):
    """Same classes and colours, each within two pixels of a true centre."""
    left = list(scene.objects)
    for d in detections:
        x, y = (d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2
        same = [o for o in left if (o.shape, o.color) == (d.shape, d.color) and max(abs(o.x - x), abs(o.y - y)) < 2]
        if not same:
            return False
        left.remove(same[0])
    return not left


def scenes(level, count, seed=0):
    rng = np.random.default_rng(seed)
    config = WorldConfig(level=level)
    return [sample_scene(rng, config, (), 1 + number % 6, strict=False) for number in range(count)]


@pytest.mark.parametrize("level", ["grid", "free"])
def test_noisy_blurred_scenes_are_read_exactly(level):
    rng = np.random.default_rng(1)
    wrong = [s for s in scenes(level, 30) if not is_exact(s, detect(degrade(render(s), rng)))]
    assert not wrong


@pytest.mark.parametrize("shape", SHAPES)
def test_every_class_in_every_colour(shape):
    for start in (0, 5):
        objects = [
            SceneObject(shape, color, 9 + 15.5 * (n % 4), 12 + 30 * (n // 4), 12.5)
            for n, color in enumerate(COLORS[start : start + 5])
        ]
        scene = Scene(tuple(objects), "ivory")
        assert is_exact(scene, detect(render(scene)))


def test_touching_objects_are_told_apart():
    pairs = [("square", "square"), ("circle", "heart"), ("star", "ring"), ("moon", "triangle"), ("cross", "cross")]
    for a, b in pairs:
        for colors in (("red", "red"), ("red", "yellow"), ("blue", "purple")):
            for x, y in ((30.0, 16.0), (16.0, 30.0)):
                scene = Scene((SceneObject(a, colors[0], 16, 16, 14), SceneObject(b, colors[1], x, y, 14)))
                assert is_exact(scene, detect(render(scene))), (a, b, colors)


@pytest.mark.parametrize("size", [32, 128])
def test_other_picture_sizes(size):
    rng = np.random.default_rng(4)
    config = WorldConfig(image_size=size)
    found = [sample_scene(rng, config, (), 3, strict=False) for _ in range(4)]
    right = [
        sorted((d.shape, d.color) for d in detect(render(s))) == sorted((o.shape, o.color) for o in s.objects) for s in found
    ]
    assert all(right) if size == 128 else sum(right) >= 3


def test_blank_noise_and_dark_pictures_hold_nothing_known():
    rng = np.random.default_rng(0)
    assert detect(np.full((64, 64, 3), 250, np.uint8)) == []
    assert detect(degrade(np.full((64, 64, 3), 240, np.uint8), rng)) == []
    for noise in (rng.integers(0, 256, (64, 64, 3)), rng.normal(200, 60, (64, 64, 3)).clip(0, 255)):
        assert not [d for d in detect(noise.astype(np.uint8)) if d.is_known]
    assert not [d for d in detect(np.zeros((64, 64, 3), np.uint8)) if d.is_known]


def test_what_is_not_a_class_is_unknown():
    image = np.full((64, 64, 3), 250, np.uint8)
    image[20:50, 25:32] = (222, 26, 36)  # a bar
    image[5:12, 40:60] = (130, 130, 130)  # grey
    found = detect(image)
    assert len(found) == 2 and not any(d.is_known for d in found)
    assert [d.class_name for d in as_judged(found)] == [UNKNOWN, UNKNOWN]
    assert name_color((130, 130, 130))[0] == UNKNOWN


def test_a_merged_blob_is_not_a_class():
    scene = Scene((SceneObject("circle", "red", 24, 24, 16), SceneObject("square", "red", 30, 33, 16)))
    assert sorted(d.shape for d in detect(render(scene))) != ["circle"]


def verdict_on(scene, item):
    return judge_caption(as_judged(detect(render(scene))), item).correct


def test_wrong_pictures_fail():
    a, b = SceneObject("circle", "red", 12, 30, 13), SceneObject("star", "blue", 50, 32, 13)
    scene = Scene((a, b))
    left = {
        "tag": "position",
        "include": [{"class": "star", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
    }
    assert verdict_on(scene, left)
    mirrored = Image.fromarray(render(scene)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert not judge_caption(as_judged(detect(np.asarray(mirrored))), left).correct
    both = {
        "tag": "color_attr",
        "include": [{"class": "circle", "count": 1, "color": "red"}, {"class": "star", "count": 1, "color": "blue"}],
    }
    assert verdict_on(scene, both)
    assert not verdict_on(Scene((replace(a, color="blue"), replace(b, color="red"))), both)
    two = {"tag": "counting", "include": [{"class": "circle", "count": 2}], "exclude": [{"class": "circle", "count": 3}]}
    row = [SceneObject("circle", "green", 10 + 18 * n, 40, 13) for n in range(3)]
    assert [verdict_on(Scene(tuple(row[:n])), two) for n in (1, 2, 3)] == [False, True, False]


def test_mirrored_arrows_and_moons_are_not_arrows_and_moons():
    for shape in ("arrow", "moon"):
        image = render(Scene((SceneObject(shape, "black", 32, 32, 14),)))
        assert [d.shape for d in detect(image)] == [shape]
        assert [d.shape for d in detect(np.ascontiguousarray(image[:, ::-1]))] != [shape]


def test_agreement_with_ground_truth_per_task_and_a_second_grader():
    rng = np.random.default_rng(2)
    items = small_geneval_items(6)
    agreement = validate_grader(items, lambda images: [Image.fromarray(degrade(np.asarray(i), rng)) for i in images])
    assert all(row["agreement"] == 1.0 and row["scenes_exact"] == 1.0 for row in agreement.values())
    assert all(row["disagreement"] <= 0.25 for row in agreement.values())
    assert detect_by_profile(np.full((64, 64, 3), 250, np.uint8)) == []


def test_floors_and_the_oracle():
    floors = geneval_floors(small_geneval_items(40))
    assert set(floors["ground_truth"].values()) == {1.0}
    assert 0.1 < floors["random_placement"]["position"] < 0.55
    assert floors["colors_swapped"]["color_attr"] < 0.1 and floors["unrelated"]["overall"] < 0.15
    scene = Scene((SceneObject("ring", "pink", 20, 20, 12),))
    assert oracle(scene)[0].box == (14, 14, 26, 26)


def test_edits_right_undone_and_overdone():
    items = edit_items(12)
    assert all(judge_edit(item, picture(item.edit.after))["correct"] for item in items)
    assert not any(judge_edit(item, picture(item.edit.before))["correct"] for item in items)
    assert not judge_edit(items[0], None)["correct"]


def test_clauses_need_an_object_each_and_nothing_else():
    red, blue = SceneObject("star", "red", 8, 8, 12), SceneObject("star", "blue", 40, 8, 12)
    any_star = {"class": "star", "color": None, "count": 1, "cell": None}
    at_corner = {"class": "star", "color": None, "count": 1, "cell": (0, 0)}
    assert match_clauses([any_star, at_corner], [red, blue], 64) == [blue, red]
    assert match_clauses([at_corner, at_corner], [red, blue], 64) is None
    assert not judge_content([any_star], detect(render(Scene((red, blue)))), 64)


def test_connected_components_follow_a_spiral():
    labels = np.full((21, 21), -1)
    y, x, dy, dx = 10, 10, 0, 1
    for run in range(1, 18):
        for _ in range(run if run < 17 else 3):
            labels[y, x] = 0
            y, x = y + dy, x + dx
        dy, dx = dx, -dy
        if not (0 <= y < 21 and 0 <= x < 21):
            break
    labels[0, 0] = 1
    areas = connected_components(labels)
    assert len(np.unique(areas[labels == 0])) == 1 and areas[0, 0] not in areas[labels == 0]


def test_templates_fill_their_boxes_and_differ():
    masks = templates()
    assert masks.shape[0] == len(SHAPES)
    for shape, mask in zip(SHAPES, masks, strict=True):
        coarse = mask.reshape(12, 4, 12, 4).mean((1, 3))
        found = fit(np.pad(coarse, 2))
        assert found.shape == shape and found.score > 0.9 and found.runner_up < found.score - 0.05


def test_refuses_other_arrays():
    with pytest.raises(ValueError, match="square uint8"):
        detect(np.zeros((64, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="float64"):
        detect(np.zeros((64, 64, 3)))
