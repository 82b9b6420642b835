"""A model's answers about its own drawings: questions are phrased as it was taught, truths are the grader's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval.answers import Answer, Decoding, StoredPicture
from eval.consistency import (
    CELLS,
    Drawn,
    Settings,
    Told,
    grader_items,
    kappa,
    kappa_interval,
    look,
    main,
    opposite_questions,
    prompt_items,
    prompt_questions,
    result_of,
    samples,
    tables,
)
from orthus.data.world.benchmark import ground_truth_scene, small_geneval_items
from orthus.data.world.questions import SUBTASKS
from orthus.data.world.render import picture
from orthus.data.world.sampling import sample_scene
from orthus.data.world.scene import SceneObject, WorldConfig

SHIPPED = str(Path(__file__).parent.parent / "checkpoints/orthus-small")
RED, BLUE = SceneObject("star", "red", 10, 10, 12), SceneObject("moon", "blue", 40, 10, 12)
NO_PICTURE = StoredPicture(Path("none.png"), "")


def test_questions_are_phrased_as_the_model_was_taught() -> None:
    rng = np.random.default_rng(0)
    found = opposite_questions(rng, (RED, BLUE, BLUE))
    assert list(found) == ["existence", "count", "color"]  # no position: only one object is alone in its class
    assert found["color"][1].text in (
        "Is the star blue? Please answer yes or no.",
        "Is there a blue star in the picture? Please answer yes or no.",
    )
    assert [question.answer for pair in found.values() for question in pair] == ["yes", "no"] * 3
    words = [question.text for question in opposite_questions(rng, (RED, BLUE))["position"]]
    pairs = [["star left of the moon", "star right of the moon"], ["moon right of the star", "moon left of the star"]]
    assert words in [[f"Is the {text}? Please answer yes or no." for text in pair] for pair in pairs]
    assert opposite_questions(rng, ()) == {}


def holds(question: str, objects: tuple[SceneObject, ...]) -> bool:
    """Whether a yes/no question is true, from its words alone."""
    words = question.removesuffix(" Please answer yes or no.").rstrip("?").removesuffix(" in the picture").split()
    shapes = [item.shape for item in objects]
    if words[:3] == ["Is", "there", "only"]:
        return shapes.count(words[4]) == 1
    if words[0] == "Are":
        return shapes.count(words[3].removesuffix("s").removesuffix("e") if words[3] == "crosses" else words[3][:-1]) == (
            ("zero", "one", "two", "three", "four").index(words[2])
        )
    if words[:2] == ["Is", "there"]:
        return any((item.color, item.shape) == tuple(words[3:]) for item in objects) if len(words) == 5 else words[3] in shapes
    first = next(item for item in objects if item.shape == words[2])
    if len(words) == 4:
        return first.color == words[3]
    second = next(item for item in objects if item.shape == words[-1])
    return {
        "left": first.x < second.x,
        "right": first.x > second.x,
        "above": first.y < second.y,
        "below": first.y > second.y,
    }[words[3]]


def test_answers_are_true_of_the_objects() -> None:
    rng = np.random.default_rng(1)
    asked = {name: 0 for name in SUBTASKS}
    for _ in range(150):
        objects = sample_scene(rng, WorldConfig(), [], int(rng.integers(1, 7)), strict=False).objects
        for name, pair in opposite_questions(rng, objects).items():
            asked[name] += 1
            assert [question.answer for question in pair] == ["yes", "no"]
            assert [holds(question.text, objects) for question in pair] == [True, False], (pair, objects)
    assert min(asked.values()) > 40


def drawing(folder: Path, items: list[dict[str, Any]], pictures: list[Image.Image]) -> list[Drawn]:
    answers = {}
    for number, image in enumerate(pictures):
        path = folder / f"{number}.png"
        image.save(path)
        stored = StoredPicture(path, hashlib.sha256(path.read_bytes()).hexdigest())
        answers[f"{number:05d}/00000"] = Answer(f"{number:05d}/00000", (stored,), True)
    return look(items, answers)


def test_right_drawings_are_seen_as_right_and_their_prompts_answer_yes(tmp_path: Path) -> None:
    items = small_geneval_items(2)
    scenes = [ground_truth_scene(item, np.random.default_rng(number)) for number, item in enumerate(items)]
    drawn = drawing(tmp_path, items, [picture(scene) for scene in scenes])
    assert all(one.is_right and one.objects is not None for one in drawn)
    for one, scene in zip(drawn, scenes, strict=True):
        assert all(holds(question.text, scene.objects) for question in prompt_questions(one.prompt)), one.prompt
    tagged = {item["tag"]: [q.kind for q in prompt_questions(item)] for item in items}
    assert tagged == {
        "single_object": ["existence"],
        "two_object": ["existence", "existence"],
        "counting": ["count"],
        "colors": ["color"],
        "position": ["existence", "existence", "position"],
        "color_attr": ["color", "color"],
    }
    keys = [item.picture_key for item in prompt_items(drawn)]
    assert len(set(keys)) == len(keys) == 20
    asked = grader_items(drawn, seed=0)
    assert [item.truth for item in asked] != ["yes", "no"] * (len(asked) // 2)  # in random order
    assert sorted(item.truth for item in asked[:2]) == ["no", "yes"] and asked[0].picture_key == asked[1].picture_key
    assert asked == grader_items(drawn, seed=0) != grader_items(drawn, seed=1)


def test_a_picture_of_noise_and_an_empty_one_are_left_out(tmp_path: Path) -> None:
    items = small_geneval_items(1)
    noise = np.full((64, 64, 3), 255, np.uint8)
    noise[20:26, 10:24] = (28, 84, 222)  # a blue bar, too low for a shape
    drawn = drawing(tmp_path, items, [Image.fromarray(noise), Image.new("RGB", (64, 64), "white")])
    assert [one.objects for one in drawn] == [None, ()] and not any(one.is_right for one in drawn)
    assert grader_items(drawn, seed=0) == []
    told = Told({}, {one.key: [("Is it? Please answer yes or no.", "yes")] for one in drawn})
    result = result_of(drawn, told, {})
    assert result["left_out"] == {"unknown": 1, "empty": 1} and result["accuracy"]["all"] is None
    assert result["table"] == {name: 2 * (cell == (False, True)) for cell, name in CELLS.items()}
    assert result["kappa"]["value"] == 0.0 and result["agreement"]["value"] == 0.0
    assert samples(drawn, told)[0].parts[1] == "Is it? yes"


def test_kappa_as_scikit_learn_1_9_gives_it() -> None:
    golden = {(20, 5, 10, 15): 0.4, (181, 23, 9, 27): 0.5492957746478873, (3, 40, 50, 7): -0.7850059500198334, (0, 0, 5, 9): 0.0}
    assert kappa(list(golden)) == pytest.approx(list(golden.values()), abs=1e-12)
    assert kappa([7, 0, 0, 0]) == 0.0  # by chance alone, too
    cells = [cell for cell, count in zip(CELLS, (181, 23, 9, 27), strict=True) for _ in range(count)]
    found, fewer = (kappa_interval(cells, [str(number // size) for number in range(240)]) for size in (1, 20))
    assert found["value"] == pytest.approx(golden[181, 23, 9, 27]) and found["n"] == 240
    assert fewer["low"] < found["low"] < found["value"] < found["high"] < fewer["high"]


def test_numbers_of_a_known_case() -> None:
    item = {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "red"}], "prompt": "a photo of a red star"}
    drawn = [Drawn(f"{n:05d}/0", {**item, "prompt": str(n)}, NO_PICTURE, (RED,), n < 3, "") for n in range(4)]
    prompted = {one.key: [("?", "yes" if number != 1 else "other")] for number, one in enumerate(drawn)}
    told = Told({"color": {one.key: (True, number != 3) for number, one in enumerate(drawn)}}, prompted)
    part = {"score": {"value": 175.0, "low": 0, "high": 200, "n": 4}, "acc_plus": 0.75, "other": 0.0}
    result = result_of(drawn, told, {"color": part})
    assert list(result["table"].values()) == [2, 1, 1, 0] and result["agreement_with_prompt"]["value"] == 0.75
    assert result["accuracy"]["all"]["value"] == 0.875 and result["accuracy"]["drawn_wrong"]["value"] == 0.5
    assert result["drawn_right"]["value"] == result["called_right"]["value"] == 0.75
    assert tables(result)[1].rows[1] == ["all", "2", "1", "1", "0"]


@pytest.mark.slow
def test_a_run_of_the_shipped_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"model={SHIPPED}", f"output={tmp_path}", "num_per_task=1"]
    main(arguments)
    first = (tmp_path / "consistency.json").read_bytes()
    assert "drawn right, called right" in capsys.readouterr().out
    result = json.loads(first)
    assert sum(result["table"].values()) == 6 == result["num_pictures"]
    assert (tmp_path / "report.html").read_text().count("<img") == 6
    assert (tmp_path / "asked/answers/existence.txt").is_file() and (tmp_path / "prompted/mme.jsonl").is_file()
    main(arguments)
    assert (tmp_path / "consistency.json").read_bytes() == first  # resumed: nothing is drawn or asked again
    with pytest.raises(ValueError, match="another run"):
        main([*arguments, "seed=1"])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="parser=loose is unknown"):
        Settings("m", "o", parser="loose")
    with pytest.raises(ValueError, match="num_per_task=0"):
        Settings("m", "o", num_per_task=0)
    with pytest.raises(ValueError, match="max_images=1"):
        Settings("m", "o", drawing=Decoding("text"))
