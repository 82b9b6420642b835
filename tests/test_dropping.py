"""Dropping conditions: what is left, how often, and that it is a function of the index."""

import pytest
from PIL import Image

from orthus.data.dropping import ConditionDropping
from orthus.data.schema import Example, Turn

PICTURE = Image.new("RGB", (8, 8))
EXAMPLES = {
    "t2i": Example((Turn("user", ("a circle",)), Turn("assistant", ("a red circle at the top", PICTURE))), "t2i"),
    "edit": Example((Turn("user", (PICTURE, "make it blue")), Turn("assistant", (PICTURE,))), "edit"),
    "vqa": Example((Turn("user", (PICTURE, "what color?")), Turn("assistant", ("red",))), "vqa"),
}


class Source:
    def __init__(self, task: str) -> None:
        self.task = task

    def __getitem__(self, index: int) -> Example:
        return EXAMPLES[self.task]


def said(example: Example) -> list[tuple[object, ...]]:
    return [tuple("PICTURE" if isinstance(s, Image.Image) else s for s in turn.segments) for turn in example.turns]


def test_the_prompt_goes_and_the_plan_goes_in_half_of_the_cases() -> None:
    dropping = ConditionDropping(Source("t2i"), {"t2i": 1.0}, "draw")
    kinds = [said(dropping[index]) for index in range(400)]
    bare, planned = [("draw",), ("PICTURE",)], [("draw",), ("a red circle at the top", "PICTURE")]
    assert all(kind in (bare, planned) for kind in kinds) and 150 < kinds.count(bare) < 250


def test_editing_keeps_the_picture_in_half_of_the_cases() -> None:
    dropping = ConditionDropping(Source("edit"), {"edit": 1.0}, "draw")
    kinds = [said(dropping[index])[0] for index in range(400)]
    assert set(kinds) == {("PICTURE",), ("draw",)} and 150 < kinds.count(("PICTURE",)) < 250


def test_answers_in_words_stay() -> None:
    assert said(ConditionDropping(Source("vqa"), {"vqa": 1.0}, "draw")[0])[1] == ("red",)


def test_share_and_determinism() -> None:
    dropping = ConditionDropping(Source("t2i"), {"t2i": 0.1}, "draw")
    dropped = [said(dropping[index])[0] == ("draw",) for index in range(2000)]
    assert 140 < sum(dropped) < 260
    assert dropped == [said(dropping[index])[0] == ("draw",) for index in range(2000)]
    assert not any(said(ConditionDropping(Source("edit"), {"t2i": 1.0}, "draw")[i])[0] == ("draw",) for i in range(50))


def test_a_share_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"drop\.t2i=1\.5"):
        ConditionDropping(Source("t2i"), {"t2i": 1.5}, "draw")
