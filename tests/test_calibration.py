"""Calibration: golden numbers of torchmetrics 1.9, netcal 1.4 and scikit-learn 1.9, bin edges, temperature, bad input."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from eval.calibration import (
    adaptive_bins,
    fit_temperature,
    main,
    measures,
    reliability_bins,
    reliability_diagram,
    rescaled,
    temperature_scaling,
)

CONFIDENCE = [0.05, 0.13, 0.31, 0.33, 0.47, 0.52, 0.58, 0.61, 0.64, 0.71, 0.78, 0.83, 0.86, 0.91, 0.93, 0.97, 0.98, 0.99]
CORRECT = [0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1]
GOLDEN = {
    "torchmetrics": 0.22333334386348724,
    "netcal": 0.2233333333333333,
    "brier": 0.17273333333333332,
    "nll": 0.5124345209544621,
}


def drawn(num=4000, temperature=2.0):
    """Log-odds that are `temperature` times too large, as confidences, and what happened."""
    rng = np.random.default_rng(0)
    odds = rng.normal(0.8, 1, num)
    correct = (rng.random(num) < 1 / (1 + np.exp(-odds))).astype(int)
    return list(1 / (1 + np.exp(-temperature * odds))), list(correct)


def test_numbers_of_other_libraries():
    found = measures(CONFIDENCE, CORRECT)
    assert found["ece"] == pytest.approx(GOLDEN["netcal"], abs=1e-9)
    assert found["ece"] == pytest.approx(GOLDEN["torchmetrics"], abs=1e-6)
    assert found["brier"] == pytest.approx(GOLDEN["brier"], abs=1e-9)
    assert found["nll"] == pytest.approx(GOLDEN["nll"], abs=1e-9)
    assert found["accuracy"] == pytest.approx(11 / 18)


def test_adaptive_bins_hold_equal_numbers():
    bins = adaptive_bins(CONFIDENCE, CORRECT, 4)
    assert [part.count for part in bins] == [5, 5, 4, 4]
    by_hand = abs(1.29 / 5 - 1 / 5) * 5 + abs(3.06 / 5 - 3 / 5) * 5 + abs(3.38 / 4 - 3 / 4) * 4 + abs(3.87 / 4 - 1) * 4
    assert measures(CONFIDENCE, CORRECT, 4)["ace"] == pytest.approx(by_hand / 18)
    assert [part.count for part in adaptive_bins([0.2, 0.1], [1, 0])] == [1, 1]  # fewer answers than bins


def test_edges_belong_to_the_bin_above_and_one_to_the_last():
    counts = [part.count for part in reliability_bins([0.0, 0.2, 0.4, 0.999, 1.0], [0, 1, 1, 1, 1])]
    assert counts == [1, 0, 0, 1, 0, 0, 1] + [0] * 7 + [2]


@pytest.mark.parametrize(("confidence", "correct", "ece"), [(0.0, 1, 1.0), (1.0, 0, 1.0), (0.0, 0, 0.0), (1.0, 1, 0.0)])
def test_certain_answers(confidence, correct, ece):
    found = measures([confidence], [correct])
    assert found["ece"] == found["ace"] == found["brier"] == ece
    assert found["nll"] == pytest.approx(-math.log(1e-12) if ece else 0.0, abs=1e-4)


def test_temperature_recovers_what_was_multiplied():
    confidence, correct = drawn(temperature=2.0)
    scaling = temperature_scaling(confidence, correct)
    assert scaling.temperature == pytest.approx(2.0, rel=0.1)
    assert scaling.after["ece"] < 0.03 < scaling.before["ece"]
    assert scaling.after["nll"] < scaling.before["nll"] and scaling.after["brier"] < scaling.before["brier"]


def test_temperature_is_the_minimum_of_the_cross_entropy():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(300, 5)) * 3
    labels = [int(rng.choice(5, p=np.exp(row / 3) / np.exp(row / 3).sum())) for row in logits]

    def loss(temperature):
        scaled = logits / temperature
        return float(np.mean(np.log(np.exp(scaled).sum(1)) - scaled[np.arange(300), labels]))

    best = fit_temperature(logits, labels)
    assert loss(best) < min(loss(best * 1.01), loss(best / 1.01))


def test_rescaled_confidences():
    assert rescaled([0.9, 0.5, 0.0, 1.0], 1.0) == pytest.approx([0.9, 0.5, 0.0, 1.0], abs=1e-9)
    assert rescaled([0.9], 2.0) == pytest.approx([0.75])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([[0.0, 3.0], [2.0, 0.0]], [1, 0], "every answer is right"),
        ([[0.0, 3.0], [2.0, 0.0]], [0, 1], "says nothing"),
        ([[0.0, 3.0]], [2], "labels reach from 2 to 2"),
        ([[0.0, float("nan")]], [0], "finite"),
        ([[0.0, 1.0]], [0, 1], "with 2 labels"),
    ],
)
def test_no_temperature(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, labels)


def test_diagram_is_well_formed_and_shows_each_bin():
    svg = reliability_diagram(reliability_bins(CONFIDENCE, CORRECT, 5), 'before & after <"T">')
    root = ElementTree.fromstring(svg)
    assert root[0].text == 'before & after <"T">'
    hints = [int(found) for found in re.findall(r"(\d+) answers:", svg)][::2]
    assert sum(hints) == 18 and "nan" not in svg


def run(tmp_path, content):
    (tmp_path / "in.jsonl").write_bytes(content)
    return main([str(tmp_path / "in.jsonl"), "--json", str(tmp_path / "out.json")])


def test_command(tmp_path, capsys):
    lines = [json.dumps({"confidence": c, "correct": y, "key": "more"}) for c, y in zip(CONFIDENCE, CORRECT, strict=True)]
    assert run(tmp_path, ("\ufeff" + "\r\n".join(lines) + "\n\n").encode()) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    wanted = measures(CONFIDENCE, CORRECT)
    assert {name: result[name] for name in wanted} == wanted and result["n"] == 18 and len(result["bins"]) == 15
    assert f"ece             {wanted['ece']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2: not JSON"),
        ("", "line 2: not JSON"),
        ("[0.5, 1]", "line 2: .* expected"),
        ('{"confidence": 0.5}', "line 2: .* expected"),
        ('{"confidence": 1.5, "correct": 1}', "line 2: confidence 1.5"),
        ('{"confidence": NaN, "correct": 1}', "line 2: confidence nan"),
        ('{"confidence": "0.5", "correct": 1}', "line 2: confidence '0.5'"),
        ('{"confidence": true, "correct": 1}', "line 2: confidence True"),
        ('{"confidence": 0.5, "correct": 0.5}', "line 2: correct 0.5"),
        ('{"confidence": 0.5, "correct": "yes"}', "line 2: correct 'yes'"),
        ('{"confidence": 0.5, "correct": null}', "line 2: correct None"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_written(tmp_path, capsys, bad, message):
    good = '{"confidence": 0.5, "correct": 1}'
    assert run(tmp_path, f"{good}\n{bad}\n{good}\n".encode()) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out.json").exists()


def test_empty_and_missing_files(tmp_path, capsys):
    assert run(tmp_path, b"\n") == 2 and "0 answers" in capsys.readouterr().err
    assert run(tmp_path, b"\xff") == 2 and "not UTF-8" in capsys.readouterr().err
    assert main([str(tmp_path / "none.jsonl")]) == 2
    with pytest.raises(ValueError, match="0 confidences and 0 answers"):
        measures([], [])
    with pytest.raises(ValueError, match=r"confidence 1\.2"):
        measures([1.2], [1])
    with pytest.raises(ValueError, match="cannot be halved"):
        temperature_scaling([0.5], [1])
