"""Export folders: each benchmark's layout, read back as its own scripts read it, and what is refused."""

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eval.export import Settings, export, main
from eval.export_layouts import LAYOUTS, Source

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def square(color: str = "red", side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), COLORS[color])


def write_answers(folder: Path, task: str, answers: dict[str, list[str | Image.Image]]) -> None:
    """What eval.answers leaves behind: `<task>.jsonl` and PNG files."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for key, segments in answers.items():
        stored = []
        for number, segment in enumerate(segments):
            if isinstance(segment, str):
                stored.append({"text": segment})
                continue
            buffer = io.BytesIO()
            segment.save(buffer, format="PNG")
            name = f"images/{key.replace('/', '_')}-{number}.png"
            (folder / name).write_bytes(buffer.getvalue())
            stored.append({"image": name, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()})
        lines.append(json.dumps({"key": key, "segments": stored, "has_ended": True}) + "\n")
    (folder / f"{task}.jsonl").write_text("".join(lines))


def settings(tmp_path: Path, prompts: str, **options: Any) -> Settings:
    output = options.pop("output", "out")
    return Settings(str(tmp_path / prompts), str(tmp_path / "answers"), str(tmp_path / output), **options)


def test_dpg_bench_grid_holds_the_four_pictures_where_the_script_crops(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "partiprompts5.txt").write_text("A cat.\n")
    pictures = {f"partiprompts5/{n}": ["a plan", square(color)] for n, color in enumerate(COLORS)}
    write_answers(tmp_path / "answers", "dpg_bench", pictures)
    assert export("dpg_bench", settings(tmp_path, "prompts")) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["partiprompts5.png"]
    with Image.open(tmp_path / "out" / "partiprompts5.png") as grid:
        boxes = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
        assert grid.size == (16, 16)
        assert [grid.crop(box).getcolors() for box in boxes] == [[(64, color)] for color in COLORS.values()]


def test_dpg_bench_refuses_pictures_that_a_crop_would_cut(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a.txt").write_text("A cat.")
    write_answers(tmp_path / "answers", "dpg_bench", {f"a/{n}": [square(side=8 + n)] for n in range(4)})
    with pytest.raises(ValueError, match="squares of one size"):
        export("dpg_bench", settings(tmp_path, "prompts"))
    assert not (tmp_path / "out").exists(), "written whole or not at all"
    (tmp_path / "prompts" / "b.c.txt").write_text("A dog.")
    with pytest.raises(ValueError, match="dot in its name"):
        export("dpg_bench", settings(tmp_path, "prompts"))
    with pytest.raises(ValueError, match=r"no folder of \.txt files"):
        export("dpg_bench", settings(tmp_path, "elsewhere"))


def test_t2i_compbench_numbers_pictures_through_the_file(tmp_path: Path) -> None:
    prompts = ["a green bench and a blue bowl", "two dogs run. "]
    (tmp_path / "color_val.txt").write_text(f"{prompts[0]}\tcolor\n{prompts[1]}\n")
    keys = [f"{line:05d}/{n}" for line in range(2) for n in range(10)]
    write_answers(tmp_path / "answers", "t2i_compbench", {key: [square("blue" if key == "00001/3" else "red")] for key in keys})
    export("t2i_compbench", settings(tmp_path, "color_val.txt"))
    names = sorted((path.name for path in (tmp_path / "out" / "samples").iterdir()), key=lambda n: int(n.split("_")[-1][:6]))
    assert [name.split("_")[0] for name in names] == [prompts[0]] * 10 + [prompts[1]] * 10
    assert names[0] == "a green bench and a blue bowl_000000.png" and names[-1].endswith("_000019.png")
    with Image.open(tmp_path / "out" / "samples" / names[13]) as picture:
        assert picture.getpixel((0, 0)) == COLORS["blue"]


@pytest.mark.parametrize("line", ["a snake_case prompt", "one and/or two", "", "long " * 60])
def test_t2i_compbench_refuses_prompts_that_no_file_name_can_hold(tmp_path: Path, line: str) -> None:
    (tmp_path / "val.txt").write_text(f"a cat\n{line}\n")
    with pytest.raises(ValueError, match="line 2"):
        export("t2i_compbench", settings(tmp_path, "val.txt"))


def test_imgedit_shows_the_picture_and_names_the_edit_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "animal").mkdir(parents=True)
    square("green").save(tmp_path / "pictures" / "animal" / "1.jpg")
    edits = {"1082": {"id": "animal/1.jpg", "prompt": "Make it red.", "edit_type": "adjust"}}
    (tmp_path / "basic_edit.json").write_text(json.dumps(edits))
    (item,) = LAYOUTS["imgedit"].read(Source(tmp_path / "basic_edit.json", tmp_path / "pictures", "task4"))
    assert callable(item.requests[0].segments[0]), "pictures are read when asked for, not all at once"
    shown, said = item.requests[0].read()
    assert isinstance(shown, Image.Image) and shown.size == (8, 8) and said == "Make it red."
    write_answers(tmp_path / "answers", "imgedit", {"1082": [square("red")]})
    export("imgedit", settings(tmp_path, "basic_edit.json", images=str(tmp_path / "pictures")))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1082.png"]
    with pytest.raises(ValueError, match="is no folder"):
        export("imgedit", settings(tmp_path, "basic_edit.json", output="other"))
    (tmp_path / "pictures" / "animal" / "1.jpg").write_bytes(b"damaged")
    (item,) = LAYOUTS["imgedit"].read(Source(tmp_path / "basic_edit.json", tmp_path / "pictures", "task4"))
    with pytest.raises(ValueError, match=r"1\.jpg"):
        item.requests[0].read()
    (tmp_path / "pictures" / "animal" / "1.jpg").unlink()
    with pytest.raises(ValueError, match=r"1\.jpg is missing"):
        LAYOUTS["imgedit"].read(Source(tmp_path / "basic_edit.json", tmp_path / "pictures", "task4"))


def opening(tmp_path: Path, answer: list[str | Image.Image]) -> Path:
    """An OpenING of one record, its answer; the output folder."""
    (tmp_path / "bench" / "images").mkdir(parents=True)
    square().save(tmp_path / "bench" / "images" / "96-i-1.jpg")
    record = {
        "total_uid": "0301096",
        "subtask_name": "Storybook Completion",
        "conversations": [
            {"input": [{"text": "<BEGIN> Go on. <image>", "image": "./images/96-i-1.jpg"}, {"text": "Please.", "image": None}]},
            {"output": [{"text": "the truth", "image": "./images/96-o-1.jpg"}]},
        ],
    }
    (tmp_path / "test_data.jsonl").write_text(json.dumps(record) + "\n")
    write_answers(tmp_path / "answers", "opening", {"0301096": answer})
    return tmp_path / "Orthus_output"


def test_opening_gives_steps_as_its_judges_read_them(tmp_path: Path) -> None:
    output = opening(tmp_path, [square("blue"), "It flew.", square("red"), square("green"), "The end."])
    options = settings(tmp_path, "test_data.jsonl", images=str(tmp_path / "bench"), output=output.name)
    (item,) = LAYOUTS["opening"].read(Source(Path(options.prompts), Path(options.images), "task4"))
    said, shown, more = item.requests[0].read()
    assert (said, more) == ("Go on.", "Please.") and isinstance(shown, Image.Image)
    export("opening", options)
    record = json.loads((output / "0301096.json").read_text())
    steps = [(step["text"], step["image"]) for step in record["conversations"][1]["output"]]
    names = [f"0301096-o-{n}.jpg" for n in range(3)]
    assert steps == [("", names[0]), ("It flew.", names[1]), ("", names[2]), ("The end.", None)]
    assert record["conversations"][0]["input"][0]["text"] == "<BEGIN> Go on. <image>", "the judges take the marks out themselves"
    for name, color in zip(names, ("blue", "red", "green"), strict=True):
        with Image.open(output / name) as picture:
            assert max(abs(a - b) for a, b in zip(picture.getpixel((4, 4)), COLORS[color], strict=True)) < 6


def test_opening_wants_the_folder_name_that_its_judges_look_for(tmp_path: Path) -> None:
    opening(tmp_path, ["no picture"])
    with pytest.raises(ValueError, match="ends in _output"):
        export("opening", settings(tmp_path, "test_data.jsonl", images=str(tmp_path / "bench")))


def comm(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(4):
        square().save(tmp_path / "images" / f"{number}.png")
    info = [
        [{"type": "text", "content": f" Step\n{n}."}, {"type": "image", "image_path": f"{n}.png", "url": "-"}] for n in range(4)
    ]
    torch.save([{"data_id": "d7", "dataset_type": "x", "title": "Soup", "step_info": info}], tmp_path / "test.pt")


def official_steps(text: str) -> list[str]:
    """How CoMM's scripts split an answer into steps."""
    return re.findall(r"\(\d+\)\s(.*?)\s*(?=\(\d+\)|$)", text, re.DOTALL)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (["Boil.", square("red"), "Eat.", square("blue")], "(1) Boil. <IMAGE> (2) Eat. <IMAGE>"),
        (["(1) Boil.", square("red"), "(2) Eat. (3) Rest.", square("blue")], "(1) Boil. <IMAGE> (2) Eat. (3) Rest. <IMAGE>"),
        ([square("red"), "Eat.", square("blue")], "(1) <IMAGE> (2) Eat. <IMAGE>"),
    ],
)
def test_comm_question_task(tmp_path: Path, answer: list[str | Image.Image], expected: str) -> None:
    comm(tmp_path)
    write_answers(tmp_path / "answers", "comm", {"d7_task4": answer})
    export("comm", settings(tmp_path, "test.pt", images=str(tmp_path / "images")))
    place = tmp_path / "out" / "d7_task4"
    result = json.loads((place / "results.json").read_text())
    assert result["model_input"] == "Can you generate step-by-step instructions with images about Soup?"
    assert result["model_output"] == expected
    assert len(official_steps(expected)) == expected.count("(")
    assert result["prediction_image_list"] == ["predict_1.jpg", "predict_2.jpg"] and result["input_image_list"] == []
    assert sorted(path.name for path in (place / "origin").iterdir()) == result["output_gt_image_list"]
    assert all((place / name).is_file() for name in result["prediction_image_list"])


def test_comm_continuation_counts_on_from_what_was_shown(tmp_path: Path) -> None:
    comm(tmp_path)
    source = Source(tmp_path / "test.pt", tmp_path / "images", "task3")
    segments = LAYOUTS["comm"].read(source)[0].requests[0].segments
    words = " ".join(segment if isinstance(segment, str) else "*" for segment in segments)
    assert words == (
        "Here are step-by-step instructions with images about Soup: (1) Step 0. * (2) Step 1. * "
        "According to the above steps, can you generate the rest steps?"
    )
    write_answers(tmp_path / "answers", "comm", {"d7_task3": ["Stir.", square(), "Eat."]})
    export("comm", settings(tmp_path, "test.pt", images=str(tmp_path / "images"), comm_task="task3"))
    result = json.loads((tmp_path / "out" / "d7_task3" / "results.json").read_text())
    assert result["model_output"] == "(3) Stir. <IMAGE> (4) Eat."
    assert result["input_image_list"] == ["input_1.jpg", "input_2.jpg"]
    assert result["output_gt_image_list"] == ["output_gt_3.jpg", "output_gt_4.jpg"]
    assert result["prediction_image_list"] == ["predict_3.jpg"]


@pytest.mark.parametrize(("task", "num_shown", "num_truth", "has_words"), [("task1", 4, 0, False), ("task2", 0, 4, True)])
def test_comm_one_sided_tasks(tmp_path: Path, task: Any, num_shown: int, num_truth: int, has_words: bool) -> None:
    comm(tmp_path)
    (item,) = LAYOUTS["comm"].read(Source(tmp_path / "test.pt", tmp_path / "images", task))
    segments = item.requests[0].read()
    assert sum(isinstance(segment, Image.Image) for segment in segments) == len(item.record.shown) == num_shown
    assert len(item.record.truth) == num_truth
    assert any("Step 0." in segment for segment in segments if isinstance(segment, str)) == has_words


def test_comm_refuses_words_that_its_script_counts_as_a_picture(tmp_path: Path) -> None:
    comm(tmp_path)
    write_answers(tmp_path / "answers", "comm", {"d7_task4": ["Look: <IMAGE>"]})
    with pytest.raises(ValueError, match="holds <IMAGE> as words"):
        export("comm", settings(tmp_path, "test.pt", images=str(tmp_path / "images")))


def one_prompt(tmp_path: Path, answers: dict[str, list[str | Image.Image]]) -> Settings:
    (tmp_path / "val.txt").write_text("a cat\n")
    write_answers(tmp_path / "answers", "t2i_compbench", answers)
    return settings(tmp_path, "val.txt")


def test_missing_answers_and_pictures_are_refused(tmp_path: Path) -> None:
    complete: dict[str, list[str | Image.Image]] = {f"00000/{n}": [square()] for n in range(10)}
    for name, changed, message in (
        ("lacks", {key: value for key, value in complete.items() if key != "00000/4"}, r"00000/4"),
        ("none", complete | {"00000/4": ["words only"]}, "has 0 pictures"),
        ("two", complete | {"00000/4": [square(), square()]}, "has 2 pictures"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=message):
            export("t2i_compbench", one_prompt(tmp_path / name, changed))


def test_wrong_calls_name_the_fix(tmp_path: Path) -> None:
    options = one_prompt(tmp_path, {f"00000/{n}": [square()] for n in range(10)})
    export("t2i_compbench", options)
    with pytest.raises(ValueError, match="is there already"):
        export("t2i_compbench", options)
    with pytest.raises(ValueError, match="use one of dpg_bench"):
        export("interleavedbench", options)
    with pytest.raises(ValueError, match="give answers=DIR"):
        export("t2i_compbench", Settings(options.prompts, output=str(tmp_path / "new")))


def test_command_line_says_what_grades_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = one_prompt(tmp_path, {f"00000/{n}": [square()] for n in range(10)})
    main(["t2i_compbench", *(f"{name}={getattr(options, name)}" for name in ("prompts", "answers", "output"))])
    assert "1 prompts" in capsys.readouterr().out
    main(["--help"])
    assert "python -m eval.export BENCH" in capsys.readouterr().out
