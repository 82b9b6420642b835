"""Verdicts from files: what the published scorer answered to generated cases, and input that is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval.geneval.__main__ import main
from eval.geneval.records import judge_record, result_of, result_text
from eval.geneval.verdict import Detection, Options, detected_colors, parse_options, verdict

GOLDENS = Path(__file__).parent / "goldens" / "geneval_verdicts.jsonl"


def record(**changes):
    return {
        "id": "one", "options": {}, "metadata": {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]},
        "image_size": [64, 64], "detections": {"cup": [[0, 0, 9, 9, 0.8], [5, 5, 20, 20, 0.9]]},
        "colors": {"cup": ["blue", "red"]}, **changes,
    }  # fmt: skip


def test_cases_of_the_published_scorer(tmp_path):
    assert main(["verdict", str(GOLDENS), str(tmp_path / "out.jsonl")]) == 0
    lines = [json.loads(line) for line in GOLDENS.read_text().splitlines()]
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == len(answers) == 48 and sum(line["expected"]["correct"] for line in lines) > 15
    for line, answer in zip(lines, answers, strict=True):
        assert answer == {"id": line["id"], **line["expected"]}, line


def test_of_equal_scores_the_later_detection_comes_first():
    boxes = [[float(n), 0.0, n + 5.0, 5.0, 0.95] for n in range(20)]
    metadata = {"tag": "colors", "include": [{"class": "cup", "count": 1}]}
    judged = judge_record(record(detections={"cup": boxes}, colors={}, metadata=metadata))
    assert judged.details == {"cup": boxes[:3:-1]}


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_a_float32_score_does_not_exceed_the_threshold_that_it_stands_for(threshold):
    written = float(np.float32(threshold))
    above = float(np.nextafter(np.float32(threshold), np.float32(1)))
    for score, kept in ((threshold, False), (written, False), (above, True), (threshold + 1e-9, True)):
        box = (0.0, 0.0, 9.0, 9.0) if score in (written, above) else (0.1, 0.0, 9.0, 9.0)
        judged = verdict([Detection("cup", score, box)], detected_colors, {"tag": "x"}, None, Options(threshold=threshold))
        assert bool(judged.details) == kept, score


def test_equal_centres_hold_no_relation_whatever_the_threshold():
    include = [{"class": "cup", "count": 1}, {"class": "cup", "count": 1, "position": ["above", 0]}]
    for threshold in ("0", "-1", "0.1"):
        judged = judge_record(record(options={"position_threshold": threshold}, metadata={"tag": "position", "include": include}))
        assert judged.reason == "expected cup above target, found  target"


def test_colours_follow_raw_boxes_and_may_be_unknown():
    assert judge_record(record()).correct
    judged = judge_record(record(colors={"cup": ["red", None]}))
    assert judged.reason == "expected red cup>=1, found 0 red; and "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colors": {}}, "no colours of cup"),
        ({"colors": {"cup": ["red"]}}, "1 colours for 2 boxes of cup"),
        ({"options": {"treshold": "0.3"}}, "unknown option 'treshold'"),
        ({"options": {"max_objects": "many"}}, "max_objects='many' is no int"),
        ({"detections": {"cup": [[0, 0, 9, 9]]}, "colors": {}}, "has 4 numbers"),
        ({"metadata": {"include": []}}, "has no 'tag'"),
        ({"metadata": {"tag": "colors", "include": [{"class": "cup"}]}}, r"no \['count'\]"),
        ({"metadata": {"tag": "p", "include": [{"class": "cup", "count": 1, "position": ["above", 0]}]}}, "refers to clause 0"),
    ],
)
def test_bad_records_are_named_with_their_line(changes, message, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(record()) + "\n" + json.dumps(record(**changes)) + "\n")
    with pytest.raises(ValueError, match=message):
        judge_record(record(**changes))
    assert main(["verdict", str(source), str(target)]) == 2
    assert "in.jsonl, line 2: " in capsys.readouterr().err and list(tmp_path.iterdir()) == [source]


def test_judging_loads_no_torch():
    code = "import sys, eval.geneval.__main__; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=GOLDENS.parents[2], check=False).returncode == 0


def test_options_come_as_strings():
    given = {"threshold": " .5", "max_objects": "3", "max_overlap": "1", "bgcolor": "#999", "crop": "0", "model": "x"}
    assert parse_options(given) == Options(threshold=0.5, max_objects=3, max_overlap=1.0)


def test_result_lines_have_the_published_form():
    metadata = {"tag": "colors", "include": [], "prompt": "a photo of a \u00e9"}
    judged = judge_record(record(metadata=metadata))
    text = result_text(result_of("a/00000/samples/00000.png", metadata, judged))
    assert text.startswith('{"filename":"a\\/00000\\/samples\\/00000.png","tag":"colors","prompt":"a photo of a \\u00e9",')
    assert json.loads(json.loads(text)["details"]) == {"cup": [[5.0, 5.0, 20.0, 20.0, 0.9], [0.0, 0.0, 9.0, 9.0, 0.8]]}
    assert list(json.loads(text)) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]


def test_stored_detections_are_scored_again_with_other_options(tmp_path, capsys):
    metadata = {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"}
    source, target = tmp_path / "detections.jsonl", tmp_path / "results.jsonl"
    source.write_text(json.dumps(record(metadata=metadata, filename="00000/samples/00000.png")) + "\n")
    assert main(["rescore", str(source), str(target), "--options", "counting_threshold=0.5"]) == 0
    assert json.loads(target.read_text())["correct"]
    assert main(["rescore", str(source), str(target)]) == 2 and "exists" in capsys.readouterr().err
    assert main(["rescore", str(source), str(tmp_path / "other"), "--options", "threshold"]) == 2
