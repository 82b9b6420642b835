"""The published summary's numbers, and the refusal of partial or malformed results."""

import json

import pytest

from eval.geneval.__main__ import main
from eval.geneval.prompts import official_lines


def results(correct=lambda tag, prompt, sample: sample == 0):
    lines = []
    for prompt, line in enumerate(official_lines()):
        tag = json.loads(line)["tag"]
        for sample in range(4):
            name = f"{prompt:05d}/samples/{sample:05d}.png"
            lines.append({"filename": name, "tag": tag, "correct": correct(tag, prompt, sample), "metadata": line})
    return lines


def summarise(tmp_path, lines, *flags):
    source = tmp_path / "results.jsonl"
    source.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    target = tmp_path / "out.json"
    code = main(["summary", str(source), *flags, "--json", str(target)])
    return code, json.loads(target.read_text()) if target.exists() else None


def test_a_complete_run(tmp_path, capsys):
    code, summary = summarise(
        tmp_path, results(lambda tag, prompt, sample: tag == "counting" or (sample == 0 and prompt % 2 == 0))
    )
    assert code == 0 and not summary["partial"] and summary["total_images"] == 2212 and summary["total_prompts"] == 553
    assert summary["tasks"]["counting"] == {"pct": 1.0, "correct": 320, "total": 320}
    assert list(summary["tasks"]) == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    shares = [task["correct"] / task["total"] for task in summary["tasks"].values()]
    assert summary["overall"] == pytest.approx(sum(shares) / 6, abs=1e-15)
    correct = sum(task["correct"] for task in summary["tasks"].values())
    assert summary["pct_correct_images"] == correct / 2212 and summary["pct_correct_prompts"] > summary["pct_correct_images"]
    printed = capsys.readouterr().out
    assert "complete run" in printed and "overall" in printed and "[" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "1 prompts without exactly 4 pictures"),
        (lambda lines: lines[:400], "position: 0 of 100"),
        (lambda lines: [*lines[:3], lines[0], *lines[4:]], "pictures more than once"),
        (lambda lines: [*lines, lines[0]], "without exactly 4"),
        (
            lambda lines: [{name: value for name, value in line.items() if name != "filename"} for line in lines],
            "without a filename",
        ),
        (lambda lines: [{**line, "tag": "odd"} if line["tag"] == "colors" else line for line in lines], "unknown tag 'odd'"),
    ],
)
def test_partial_runs_are_refused_unless_asked(change, message, tmp_path, capsys):
    code, summary = summarise(tmp_path, change(results()))
    assert code != 0 and summary is None and message in capsys.readouterr().err
    code, summary = summarise(tmp_path, change(results()), "--allow-partial")
    assert code == 0 and summary["partial"] and "partial" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("[]", "list instead of an object"),
        ('{"tag": "colors", "correct": true}', "no 'metadata'"),
        ('{"tag": "colors", "correct": "yes", "metadata": "x"}', "correct is 'yes'"),
        ("", "line 2: "),
    ],
)
def test_malformed_lines_are_named(line, message, tmp_path, capsys):
    lines = results()
    code, summary = summarise(tmp_path, [lines[0], line, *lines[2:]], "--allow-partial")
    error = capsys.readouterr().err
    assert code != 0 and summary is None and message in error and "line 2" in error


def test_nothing_to_summarise(tmp_path, capsys):
    assert summarise(tmp_path, [], "--allow-partial")[0] != 0 and "no results" in capsys.readouterr().err
    assert main(["summary", str(tmp_path / "absent.jsonl")]) != 0
