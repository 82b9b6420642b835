"""Confidence is read where the answer stands, whatever is beside a question, and its measures are the known ones."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.answers import Request
from eval.calibration import main as calibrate
from eval.choices import (
    INSTRUCTION,
    OTHER,
    first_tokens,
    log_probabilities,
    multiple_choice,
    read_choice,
    read_choices,
    yes_no,
)
from eval.confidence import (
    DONT_KNOW,
    Settings,
    ask_all,
    at_temperature,
    auroc,
    cells,
    evaluate,
    has_abstained,
    is_fitted,
    main,
    result_of,
    softmax,
    tables,
    temperature_of,
    words_before,
)
from eval.loading import ModelSettings, load
from eval.mme.grading import parse_official
from eval.mme.items import Item
from orthus.data.schema import Turn
from orthus.data.world.questions import SUBTASKS

SHIPPED = str(Path(__file__).parent.parent / "checkpoints/orthus-small")


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load(SHIPPED, ModelSettings())


def settings(folder: Path, **changes: Any) -> Settings:
    return Settings(SHIPPED, str(folder), num_images=2, num_resamples=20, **changes)


def record(confidence: float, correct: int, picture: str, **changes: Any) -> dict[str, Any]:
    """An answer "yes" of that confidence."""
    logs = {"yes": math.log(confidence), "no": math.log(1 - confidence)}
    truth = "yes" if correct else "no"
    said = {"said": "yes", "likeliest": "yes", "truth": truth, "log_probabilities": logs, "mass": 1.0, "abstained": False}
    return {"confidence": confidence, "correct": correct, "subtask": "count", "picture": picture, **said, **changes}


def test_a_run_writes_what_calibration_reads(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    result = evaluate(*shipped, settings(tmp_path, batch_size=5))
    lines = [json.loads(line) for line in (tmp_path / "confidences.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and {line["subtask"] for line in lines} == set(SUBTASKS)
    said = {json.loads(line)["key"]: json.loads(line)["segments"][0]["text"] for line in (tmp_path / "mme.jsonl").open()}
    assert [line["said"] for line in lines] == [said[line["key"]].rpartition("Answer: ")[2] for line in lines]
    assert result["picture"]["likeliest"] == 1.0 and result["picture"]["other"] == 0.0 and result["picture"]["mass"] > 0.99
    assert calibrate([str(tmp_path / "confidences.jsonl"), "--json", str(tmp_path / "c.json")]) == 0
    again = json.loads((tmp_path / "c.json").read_text())
    for name in ("ece", "ace", "brier", "nll", "accuracy", "mean_confidence"):
        assert again[name] == pytest.approx(result["picture"]["overall"][name]["value"], abs=1e-9)
    blank = [json.loads(line) for line in (tmp_path / "blank/confidences.jsonl").read_text().splitlines()]
    assert np.mean([line["confidence"] for line in blank]) < np.mean([line["confidence"] for line in lines])
    page = (tmp_path / "report.html").read_text()
    assert "With a blank picture" in page and "<svg" in page and "data:image/png" in page
    assert (tmp_path / "answers/count.txt").read_text().count("\n") == 4


def test_one_question_at_a_time_and_batched_agree_with_a_plain_forward(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = shipped
    questions, texts = ask_all(model, processor, settings(tmp_path), is_blank=False)
    before = [words_before(text, "Answer:") if number % 3 else "" for number, text in enumerate(texts)]
    batched, single = (log_probabilities(model, processor, questions, before, size) for size in (16, 1))
    yes, no = processor.encode_text("yes"), processor.encode_text("no")
    for question, words, one, other in zip(questions, before, single, batched, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
        segments = question.request.read()
        turns = [Turn("user", segments), *([Turn("assistant", (words,))] if words else [])]
        rendered = processor.render(turns)
        ids = rendered.input_ids[:-1] if words else rendered.input_ids  # without the separator of the model's own turn
        pixels = processor.image_processor.pixel_values(rendered.images)
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1].log_softmax(-1)
        assert one == pytest.approx({"yes": float(logs[yes[0]]), "no": float(logs[no[0]])}, abs=1e-3)


def test_processes_take_batches_in_turn_and_all_get_all(
    shipped: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = shipped
    questions, texts = ask_all(model, processor, settings(tmp_path), is_blank=False)
    alone = log_probabilities(model, processor, questions, texts, 6)
    monkeypatch.setattr("eval.choices.world_size", lambda: 2)
    parts: list[Any] = []

    def keep(everyones: list[Any], mine: Any) -> None:
        parts.append(mine)
        everyones[:] = [*parts, *[{}] * (2 - len(parts))]

    monkeypatch.setattr("eval.choices.dist.all_gather_object", keep)
    with pytest.raises(KeyError):  # the second process has not spoken yet
        log_probabilities(model, processor, questions, texts, 6)
    monkeypatch.setattr("eval.choices.rank", lambda: 1)
    assert log_probabilities(model, processor, questions, texts, 6) == alone
    assert [sorted(part) for part in parts] == [[0, 12], [6]]


class Spelling:
    """A tokenizer that, as SentencePiece does, writes a blank as a token of its own before what it does not know whole."""

    whole = ("yes", "no", "A")

    def encode_text(self, text: str) -> tuple[int, ...]:
        return (self.whole.index(text),) if text in self.whole else (99, *map(ord, text))


def test_a_first_token_that_two_answers_share_says_nothing() -> None:
    assert first_tokens(Spelling(), {"yes": ("yes", " yes", "Yes"), "no": ("no", " no", "No")}) == {"yes": [0], "no": [1]}
    with pytest.raises(ValueError, match="begins B, C as it begins other answers"):
        first_tokens(Spelling(), {"A": ("A", " A"), "B": ("B", " B"), "C": ("C", " C")})


def test_reading_a_choice() -> None:
    options = ("red", "a blue one", "green")
    read = {"A": "A", "(B)": "B", "C. green": "C", " b": OTHER, "Red.": "A", "a blue one": "B", "A red one": OTHER, "D": OTHER}
    assert {text: read_choice(text, options) for text in read} == read


def test_multiple_choice_from_a_file(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    path = tmp_path / "q.jsonl"
    good = {"image": "a.png", "question": "What is there?", "options": ["red", "blue", "green"], "answer": "blue"}
    path.write_text("".join(json.dumps(line) + "\n" for line in (good, {**good, "answer": "C", "subtask": "x"})))
    first, second = read_choices(path)
    assert (first.item.truth, second.item.truth, second.item.subtask) == ("B", "C", "x")
    assert first.item.question == f"What is there?\nA. red\nB. blue\nC. green\n{INSTRUCTION}"
    assert first.picture == second.picture and first.item.picture_key != second.item.picture_key
    result = evaluate(*shipped, settings(tmp_path / "run", data=str(path)))
    questions, _ = ask_all(*shipped, settings(tmp_path / "blank", data=str(path), abstain=True), is_blank=True)
    picture, words = questions[0].request.read()
    assert len(picture.getcolors()) == 1 and words == first.item.question + DONT_KNOW
    lines = [json.loads(line) for line in (tmp_path / "run/confidences.jsonl").read_text().splitlines()]
    assert [line["picture"] for line in lines] == ["choice/a.png", "x/a.png"] and set(lines[0]["log_probabilities"]) == set("ABC")
    assert result["temperature_scaling"]["temperature"] is None
    with pytest.raises(ValueError, match="another run"):
        ask_all(*shipped, settings(tmp_path / "run", data=str(path), abstain=True), is_blank=False)
    for change, message in (
        ({"answer": "pink"}, "answer 'pink' is none of the options"),
        ({"options": ["red", "Red"]}, "different texts"),
        ({"options": "red"}, "different texts"),
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **change}) + "\n")
        with pytest.raises(ValueError, match=rf"line 2: .*{message}"):
            read_choices(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: .* is not an object with image"):
        read_choices(path)


def test_the_likeliest_choice_where_an_answer_is_none_and_the_truth_in_any_case() -> None:
    item = Item("count", "a.png", "Two?", "Yes", partial(Image.new, "RGB", (8, 8)))
    question = yes_no(item, Request("k", ("Two?",)), parse_official)
    assert question.truth == "yes" and question.read("maybe") == OTHER
    options = multiple_choice(item, question.request, ["red", "blue"], "a")
    assert options.choices["B"] == ("B", " B", "blue", "Blue", " blue", " Blue")
    unsaid = record(0.7, 0, "a", said=OTHER)
    assert at_temperature(unsaid, 1.0)["confidence"] == pytest.approx(0.7)
    assert at_temperature(unsaid, 100.0)["confidence"] == pytest.approx(0.5, abs=0.01)


def test_temperature_of_a_model_that_is_twice_as_sure_as_it_should_be() -> None:
    rng = np.random.default_rng(0)
    odds = rng.normal(0.5, 1.5, 4000)
    right = rng.random(4000) < 1 / (1 + np.exp(-odds))
    records = [
        record(float(1 / (1 + math.exp(-2 * odd))), int(is_right), f"p{number // 2}")
        for number, (odd, is_right) in enumerate(zip(odds, right, strict=True))
    ]
    found = temperature_of(records, num_resamples=50)
    assert found["temperature"] == pytest.approx(2, rel=0.15)
    assert found["after"]["ece"]["value"] < 0.5 * found["before"]["ece"]["value"]
    halves = {r["picture"]: is_fitted(r["picture"]) for r in records}
    assert found["num_fitted"] == sum(halves[r["picture"]] for r in records) and 0.4 < np.mean(list(halves.values())) < 0.6
    assert temperature_of(records[::-1], 1)["temperature"] == pytest.approx(found["temperature"])  # whatever the order
    assert "every answer is right" in temperature_of([record(0.9, 1, f"p{n}") for n in range(40)], 1)["why"]


def test_auroc_counts_pairs() -> None:
    right, wrong = [record(c, 1, "a") for c in (0.9, 0.7, 0.5)], [record(c, 0, "a") for c in (0.7, 0.6)]
    assert auroc(right + wrong) == pytest.approx((2 + 1.5 + 0) / 6)
    assert auroc(right) is None and auroc(wrong) is None


def test_intervals_are_over_pictures() -> None:
    records = [record(0.8, int(number < 30), f"p{number // 10}") for number in range(40)]
    found = cells(records, num_resamples=500)
    assert found["accuracy"]["value"] == 0.75 and found["num_pictures"] == 4
    assert found["accuracy"]["high"] - found["accuracy"]["low"] >= 0.5  # four pictures, not forty answers
    assert found["ece"]["value"] == pytest.approx(0.05)


def test_abstaining_counts_for_coverage_alone(tmp_path: Path) -> None:
    assert has_abstained("I don\u2019t know.") and has_abstained("I do not know") and not has_abstained("no")
    records = [record(0.8, 1, f"p{n}", abstained=n < 3, said=OTHER if n < 3 else "yes") for n in range(10)]
    offered = settings(tmp_path, abstain=True)
    result = result_of({"picture": records, "blank": records[:3]}, offered)
    assert result["picture"]["coverage"]["value"] == pytest.approx(0.7) and result["picture"]["other"] == 0
    assert result["picture"]["overall"]["accuracy"]["n"] == 7
    assert result["blank"]["overall"] is None and result["blank"]["coverage"]["value"] == 0
    assert "coverage 0.700" in tables(result)[0].note and "AUROC" not in tables(result)[0].note
    whole = result_of({"picture": records, "blank": records}, replace(offered, abstain=False))
    assert whole["picture"]["other"] == pytest.approx(0.3) and "coverage" not in whole["picture"]


def test_refusals_and_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="blank=true: the blank picture is measured in every run"):
        settings(tmp_path, blank=True)
    with pytest.raises(ValueError, match="num_resamples=0"):
        Settings("m", "o", num_resamples=0)
    assert words_before("one. Answer: no. Answer: yes", "Answer:") == "one. Answer: no. Answer:"
    assert words_before("yes", "Answer:") == "" == words_before("Answer: yes", None)
    assert softmax({"a": 0.0, "b": math.log(3)}) == pytest.approx({"a": 0.25, "b": 0.75})
    main(["--help"])
    assert "multiple-choice questions" in capsys.readouterr().out
