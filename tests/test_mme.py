"""MME's grading against the edge cases measured in the published script, and its floors."""

import itertools

import pytest

from eval.mme.grading import (
    PARSERS,
    Record,
    grade,
    image_scores,
    parse_lmms,
    parse_official,
    parse_strict,
    score_subtask,
    total,
)


@pytest.mark.parametrize(
    ("answer", "official", "lmms", "strict"),
    [
        ("Yes", "yes", "yes", "yes"),
        ("no.", "no", "no", "no"),
        ("Yes, there is.", "yes", "yes", "yes"),
        ("  yes", "other", "yes", "yes"),
        (" no", "no", "no", "no"),
        ("eyes", "yes", "yes", "other"),
        ("know", "no", "no", "other"),
        ("snow", "no", "no", "other"),
        ("not sure", "no", "no", "other"),
        ("The answer is yes", "other", "other", "yes"),
        ("y", "other", "yes", "other"),
        ("Yes or no", "yes", "yes", "other"),
        ("", "other", "other", "other"),
        (". yes", "other", "yes", "yes"),
        ("*yes*", "yes", "yes", "other"),  # VLMEvalKit does not know the mark
        ("yes/no", "yes", "yes", "other"),
        ("yes-no, I", "yes", "yes", "other"),
        ("no-one, I think", "no", "no", "no"),
        ("no- one-I think", "no", "no", "no"),  # a mark beside a space is removed everywhere ...
        ("(yes)it 1,000", "yes", "yes", "other"),  # ... and so are all with a number
        ("no" + " ." * 33, "no", "no", "no"),
        ("." * 33 + "no", "other", "no", "other"),  # only 32 full stops go
        ("." * 32 + "no", "other", "no", "no"),
    ],
)
def test_parsers_on_odd_answers(answer, official, lmms, strict):
    assert (parse_official(answer), parse_lmms(answer), parse_strict(answer)) == (official, lmms, strict)


def records(answers, num_images=10):
    cycle = itertools.cycle(answers)
    return [Record(f"image{index}", "Is it?", truth, next(cycle)) for index in range(num_images) for truth in ("Yes", "No")]


def test_floors():
    perfect = score_subtask(records(["yes", "no"]))
    assert (perfect.acc, perfect.acc_plus, perfect.score) == (1.0, 1.0, 200.0)
    always_yes = score_subtask(records(["Yes"]))
    assert (always_yes.acc, always_yes.acc_plus, always_yes.score) == (0.5, 0.0, 50.0)
    coin = score_subtask(records(["yes", "no", "yes", "yes", "no", "no", "no", "yes"], 400))
    assert coin.score == pytest.approx(75.0)
    assert total({"existence": always_yes, "count": always_yes}) == 100.0


def test_other_is_wrong_and_counted():
    silent = score_subtask(records(["maybe"]))  # the published script crashes here
    assert (silent.score, silent.other_rate) == (0.0, 1.0)


def test_pairing_is_by_image_not_by_line():
    shuffled = records(["yes", "no", "no", "no"])
    shuffled.sort(key=lambda record: record.ground_truth)
    assert score_subtask(shuffled).acc_plus == 0.5


def test_image_scores_average_to_the_subtask_score():
    data = records(["yes", "no", "yes", "yes", "maybe", "no"], 9)
    scores = image_scores(grade(data).values())
    assert sum(scores) / len(scores) == pytest.approx(score_subtask(data).score)


def test_refusals():
    with pytest.raises(ValueError, match="unknown parser 'lenient'"):
        grade(records(["yes"]), "lenient")
    with pytest.raises(ValueError, match="must be yes or no"):
        grade([Record("a", "q", "maybe", "yes")])
    with pytest.raises(ValueError, match="exactly one yes and one no"):
        grade([Record("a", "q", "yes", "yes"), Record("a", "q", "yes", "yes")])
    with pytest.raises(ValueError, match="0 records"):
        score_subtask([])
    assert set(PARSERS) == {"official", "lmms", "strict"}
