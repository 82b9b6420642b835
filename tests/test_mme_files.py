"""MME's answer files: what the published script reads is read the same, what it cannot read is put right or refused by name."""

import json

import pytest

from eval.mme.__main__ import main
from eval.mme.files import read_answer_file, write_answer_files
from eval.mme.grading import COGNITION, PERCEPTION, SUBTASKS, Record
from eval.mme.results import grade_folder

GOOD = "a.jpg\tIs it A?\tYes\tYes\na.jpg\tIs it B?\tNo\tno.\n"


def pairs_of(folder, content, name="existence"):
    (folder / f"{name}.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_answer_file(folder / f"{name}.txt")


def score(folder, content, parser="official"):
    pairs_of(folder, content)
    return grade_folder(folder, parser, num_resamples=10)


def grade_command(folder, *options):
    return main(["grade", str(folder), "--json", str(folder / "out.json"), *options])


# What the published calculation.py (with scikit-learn 1.9), lmms-eval's and VLMEvalKit's aggregation give for these answers.
PUBLISHED = {
    "official": {"existence": 25.0, "OCR": 125.0, "text_translation": 200.0},
    "lmms": {"existence": 200.0, "OCR": 200.0, "text_translation": 200.0},
    "strict": {"existence": 25.0, "OCR": 200.0, "text_translation": 50.0},
}
ANSWERS = {
    "existence": ["  yes", "know", "y", "N."],
    "OCR": [" Yes", "No, 1,000", "   yes", "no way"],
    "text_translation": ["eyes", "no!", "yes*", "No?"],
}


@pytest.mark.parametrize("parser", PUBLISHED)
def test_scores_of_the_published_graders(tmp_path, parser):
    for subtask, answers in ANSWERS.items():
        rows = [f"{number // 2}.jpg\tq\t{('Yes', 'No')[number % 2]}\t{answer}\n" for number, answer in enumerate(answers)]
        (tmp_path / f"{subtask}.txt").write_text("".join(rows))
    assert grade_command(tmp_path, "--parser", parser) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["subtasks"] == PUBLISHED[parser]
    assert result["perception"] == PUBLISHED[parser]["existence"] + PUBLISHED[parser]["OCR"]
    assert result["cognition"] == PUBLISHED[parser]["text_translation"]
    assert result["partial"] and result["missing"] == [name for name in SUBTASKS if name not in ANSWERS]


def test_the_whole_benchmark_and_its_floors(tmp_path, capsys):
    for subtask, num_questions in SUBTASKS.items():
        rows = [Record(f"{n // 2}.jpg", "q", ("Yes", "No")[n % 2], "Yes") for n in range(num_questions)]
        write_answer_files(tmp_path, {subtask: rows})
    assert grade_command(tmp_path) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["perception"], result["cognition"], result["partial"]) == (500.0, 200.0, False)
    assert result["floors"]["always_yes"] == result["floors"]["always_no"] == {"perception": 500.0, "cognition": 200.0}
    assert result["floors"]["coin"] == {"perception": 750.0, "cognition": 300.0}
    assert (sum(PERCEPTION.values()), sum(COGNITION.values())) == (2114, 260)
    printed = capsys.readouterr().out
    assert "perception: 500.0 [" in printed and "] of 2000" in printed and "always yes 500" in printed
    assert "PARTIAL" not in printed


def test_intervals_are_over_pictures(tmp_path):
    rows = "".join(f"{n // 2}\tq\t{('Yes', 'No')[n % 2]}\t{'yes' if n < 40 else 'other'}\n" for n in range(60))
    pairs_of(tmp_path, rows)
    interval = grade_folder(tmp_path)["intervals"]
    assert interval["existence"]["n"] == 30 and interval["perception"]["low"] < 100 / 3 < interval["perception"]["high"]
    assert "cognition" not in interval


def test_only_neither_counts_as_wrong(tmp_path):
    result = score(tmp_path, GOOD.replace("\tYes\n", "\tmaybe\n").replace("no.", ""))  # the published script crashes here
    assert (result["subtasks"]["existence"], result["other"], result["cognition"]) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    "content",
    [
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "\r"),
        "\ufeff" + GOOD,
        GOOD + "\n\r\n \n",
        GOOD.rstrip("\n"),
        GOOD.replace("Yes\tYes", "YES\tYES").replace("\tNo", "\tnO"),
    ],
)
def test_line_ends_and_marks_change_nothing(tmp_path, content):
    result = score(tmp_path, content)
    assert result["subtasks"]["existence"] == 200.0 and not result["warnings"]


def test_other_line_ends_stay_in_the_answer(tmp_path):
    (pair,), warnings = pairs_of(tmp_path, GOOD.replace("no.", "no\x0b\x1c\x85\u2028more"))
    assert pair[1].answer == "no\x0b\x1c\x85\u2028more" and not warnings


def test_tabs_and_newlines_in_answers(tmp_path):
    (pair,), warnings = pairs_of(tmp_path, GOOD.replace("\tYes\n", "\tYes\tit is\n\nindeed\n- so\tthere\n"))
    assert pair[0].answer == "Yes\tit is\nindeed\n- so\tthere"
    assert warnings == ["existence.txt: 2 lines without 4 fields were read as part of the answer above them"]


def test_lines_apart_are_paired_by_picture(tmp_path):
    rows = ["a\tq\tYes\tyes", "b\tq\tYes\tyes", "b\tq\tNo\tyes", "a\tq\tNo\tno"]
    pairs, warnings = pairs_of(tmp_path, "\n".join(rows))
    assert [[record.image_id for record in pair] for pair in pairs] == [["a", "a"], ["b", "b"]]
    assert len(warnings) == 1 and "from line 1 on" in warnings[0]
    assert grade_folder(tmp_path)["acc_plus"]["existence"] == 0.5


def test_pictures_of_the_same_name_are_paired_as_they_lie(tmp_path):
    pairs, warnings = pairs_of(tmp_path, GOOD * 3)
    assert len(pairs) == 3 and not warnings


def test_same_truth_twice_is_accepted_with_a_warning(tmp_path):
    _, warnings = pairs_of(tmp_path, GOOD.replace("\tNo\t", "\tYes\t"))
    assert warnings == ["existence.txt: 1 pictures have the same ground truth twice, such as 'a.jpg'"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "existence.txt has 0 questions"),
        ("a.jpg\tIs it A?\tYes\n", "existence.txt, line 1: 3 of 4 fields"),
        (GOOD + "b.jpg\tIs it A?\tYes\n", "existence.txt, line 3: 3 of 4 fields"),
        ("just text\n" + GOOD, "existence.txt, line 1: 1 of 4 fields"),
        (GOOD.replace("\tNo\t", "\tperhaps\t"), "existence.txt, line 2: ground truth 'perhaps'"),
        (GOOD + "b.jpg\tq\tYes\tyes\n", "existence.txt, line 3: 3 questions, the last about 'b.jpg'"),
        (GOOD + "b\tq\tYes\tyes\nc\tq\tNo\tno\n", "lines 3 and 4: they name 'b' and 'c', and 'b' has 1 questions"),
        (GOOD * 2 + "a.jpg\tq\tYes\ty\nb\tq\tNo\tno\n", "lines 5 and 6: they name 'a.jpg' and 'b', and 'a.jpg' has 5 questions"),
        (b"a.jpg\tq\tYes\tyes\na.jpg\tq\tNo\t\xff\n", "existence.txt, line 2: not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_written(tmp_path, capsys, content, message):
    (tmp_path / "existence.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert grade_command(tmp_path) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out.json").exists()


def test_folders(tmp_path, capsys):
    assert grade_command(tmp_path) == 2 and "holds no answer file; expected some of existence.txt" in capsys.readouterr().err
    assert main(["grade", str(tmp_path / "none")]) == 2 and "is not a folder" in capsys.readouterr().err
    (tmp_path / "ocr.txt").write_text("notes")
    assert score(tmp_path, GOOD)["warnings"] == ["ocr.txt is no subtask of MME and was not read"]
    with pytest.raises(SystemExit) as refused:
        grade_command(tmp_path, "--parser", "lenient")
    assert refused.value.code == 2


def test_written_files_are_read_back(tmp_path):
    answers = ["\tYes\n", "no\r\nway", "Yes", ""]
    records = [Record(f"{n // 2}.jpg", "Is it?", ("Yes", "No")[n % 2], answer) for n, answer in enumerate(answers)]
    assert write_answer_files(tmp_path, {"color": records}) == 2
    assert (tmp_path / "color.txt").read_bytes().startswith(b"0.jpg\tIs it?\tYes\t Yes \n0.jpg\tIs it?\tNo\tno  way\n")
    pairs, warnings = read_answer_file(tmp_path / "color.txt")
    assert [record.answer for pair in pairs for record in pair] == [" Yes ", "no  way", "Yes", ""] and not warnings
    with pytest.raises(ValueError, match="color: 'a\\\\tb' holds a tab"):
        write_answer_files(tmp_path / "none", {"color": [Record("a\tb", "q", "Yes", "")]})
    assert not (tmp_path / "none").exists() and {path.name for path in tmp_path.iterdir()} == {"color.txt"}
