"""The small world: determinism, splits, truth of what is said, balance of yes and no, edits, benchmark items."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import product
from math import sqrt

import numpy as np
import pytest
from PIL import Image

from eval.geneval import verdict as geneval
from orthus.data.schema import Example, Turn
from orthus.data.world import splits
from orthus.data.world.benchmark import (
    GENEVAL_TAGS,
    edit_items,
    ground_truth_scene,
    small_geneval_items,
    small_mme_items,
    story_items,
)
from orthus.data.world.captions import KINDS, captioned_scene
from orthus.data.world.dataset import NUM_ITEMS, TASK_NAMES, WorldDataset
from orthus.data.world.draft import Source
from orthus.data.world.edits import EDITS, Edit, draw_edit
from orthus.data.world.language import COLUMN_WORDS, NUMBERS, ROW_WORDS, dense_phrase, final_answer, place_words, plural
from orthus.data.world.questions import YES_NO
from orthus.data.world.render import render
from orthus.data.world.sampling import SamplingError, Wanted, sample_scene
from orthus.data.world.scene import (
    COLORS,
    MIRROR,
    RELATIONS,
    SHAPES,
    Scene,
    SceneObject,
    WorldConfig,
    cell_of,
    overlap,
    relations,
)

DRILLS = ("recite", "look_up", "read")
EVEN = {task: 1.0 for task in TASK_NAMES if task not in DRILLS}
PLURALS = {plural(shape): shape for shape in SHAPES}
NOUN = rf"(?:(?P<color>{'|'.join(COLORS)}) )?(?P<shape>{'|'.join([*PLURALS, *SHAPES])})"


def make_source(seed: int = 0, level: str = "grid", strict: bool = True) -> Source:
    return Source(np.random.default_rng(seed), WorldConfig(level=level), strict)  # type: ignore[arg-type]


def phrases(text: str) -> list[tuple[int, str | None, str]]:
    """(count, colour or None, class) of each noun phrase in the text."""
    found = []
    for match in re.finditer(rf"\b(?P<number>an?|{'|'.join(NUMBERS)}) {NOUN}\b", text):
        number, shape = match["number"], PLURALS.get(match["shape"], match["shape"])
        found.append((NUMBERS.index(number) if number in NUMBERS else 1, match["color"], shape))
    return found


def box_of(item: SceneObject) -> tuple[float, float, float, float]:
    half = item.size / 2
    return item.x - half, item.y - half, item.x + half, item.y + half


def having(scene: Scene, shape: str, color: str | None = None) -> list[SceneObject]:
    return [item for item in scene.objects if item.shape == shape and color in (None, item.color)]


def answer(scene: Scene, question: str) -> str:
    """An independent reading of a yes/no question."""
    text = question.removesuffix(YES_NO)
    if match := re.fullmatch(r"Is the (\w+) (left of|right of|above|below) the (\w+)\?", text):
        (a,), (b,) = having(scene, match[1]), having(scene, match[3])
        return "yes" if match[2] in relations(a, b) else "no"
    if match := re.fullmatch(r"Is the (\w+) (\w+)\?", text):
        (item,) = having(scene, match[1])
        return "yes" if item.color == match[2] else "no"
    ((count, color, shape),) = phrases(text.replace("only ", ""))
    number = len(having(scene, shape, color))
    is_exact = text.startswith(("Are there", "Is there only"))
    return "yes" if (number == count if is_exact else number > 0) else "no"


def test_schema_names_the_mistake() -> None:
    with pytest.raises(ValueError, match="'system' is unknown"):
        Turn("system", ("hello",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no segments"):
        Turn("user", ())
    with pytest.raises(TypeError, match="is a int"):
        Turn("user", ("hello", 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="wrap it in a tuple"):
        Turn("user", "hello")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no turns"):
        Example((), "t2i")


def test_split_tables_keep_their_promises() -> None:
    assert splits.fingerprint() == splits.FINGERPRINT
    held = Counter(clause[0] for clause in splits.HELD_OUT)
    assert held == {"color": 18, "count": 6, "pair": 8, "relation": 22}
    colors = Counter(color for colors in splits.HELD_OUT_COLORS.values() for color in colors)
    assert max(colors.values()) <= 2 and max(map(len, splits.HELD_OUT_COLORS.values())) <= 2
    assert Counter(count for _, count in splits.HELD_OUT_COUNTS) == {2: 2, 3: 2, 4: 2}
    assert max(Counter(shape for pair in splits.HELD_OUT_PAIRS for shape in pair).values()) <= 2
    for a in SHAPES:
        for b in SHAPES:
            for relation in RELATIONS:
                assert splits.triple_allowed(a, relation, b) == splits.triple_allowed(b, MIRROR[relation], a)


def test_relations_follow_the_official_rule() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        (ax, ay, bx, by), (s, t) = rng.uniform(9, 55, 4), rng.uniform(11, 18, 2)
        a, b = SceneObject("star", "red", ax, ay, s), SceneObject("moon", "red", bx, by, t)
        assert set(relations(a, b)) == geneval.relative_position(box_of(a), box_of(b))
        assert {MIRROR[relation] for relation in relations(a, b)} == set(relations(b, a))


@pytest.mark.parametrize(("level", "image_size"), [("grid", 32), ("grid", 64), ("grid", 128), ("free", 64)])
def test_scenes_keep_the_rules_of_their_level(level: str, image_size: int) -> None:
    config = WorldConfig(level=level, image_size=image_size)  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    for _ in range(150):
        scene = sample_scene(rng, config)
        assert 1 <= len(scene.objects) <= config.max_objects
        assert splits.has_violation(scene) == bool(splits.violations(scene)) == (not splits.is_allowed(scene, "train"))
        for place, item in enumerate(scene.objects):
            assert config.size_range[0] <= item.size <= config.size_range[1]
            assert all(overlap(item, other) <= config.max_overlap for other in scene.objects[:place])
            row, column = cell_of(item, image_size) if level == "grid" else (0, 0)
            side = config.cell if level == "grid" else image_size
            assert column * side <= item.x - item.size / 2 and item.x + item.size / 2 <= (column + 1) * side
            assert row * side <= item.y - item.size / 2 and item.y + item.size / 2 <= (row + 1) * side
        assert render(scene).shape == (image_size, image_size, 3)


def test_every_shape_fills_its_box() -> None:
    for shape in SHAPES:
        scene = Scene((SceneObject(shape, "black", 32, 32, 16),))
        rows, columns = np.nonzero((render(scene) < 200).all(axis=2))
        assert abs(rows.min() - 24) <= 1 and abs(rows.max() - 39) <= 1, shape
        assert abs(columns.min() - 24) <= 1 and abs(columns.max() - 39) <= 1, shape


def test_impossible_scenes_are_refused() -> None:
    with pytest.raises(SamplingError, match="fewer objects or constraints"):
        sample_scene(np.random.default_rng(0), WorldConfig(), [Wanted("star", cell=(0, 0))] * 2)
    with pytest.raises(ValueError, match="level='cubist'"):
        WorldConfig(level="cubist")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="task 'song' is unknown"):
        WorldDataset("train", {"song": 1.0})
    with pytest.raises(ValueError, match="split='dev' is unknown"):
        WorldDataset("dev")


def test_items_are_a_pure_function_of_split_and_index() -> None:
    first, second = WorldDataset("train", EVEN), WorldDataset("train", EVEN)
    order = np.random.default_rng(0).permutation(60)
    shuffled = {int(index): second[int(index)] for index in order}
    for index in range(60):
        one, other = first[index], shuffled[index]
        assert one.task == other.task and len(one.turns) == len(other.turns)
        for a, b in zip(one.turns, other.turns, strict=True):
            assert a.role == b.role
            for x, y in zip(a.segments, b.segments, strict=True):
                assert x == y if isinstance(x, str) else np.array_equal(np.asarray(x), np.asarray(y))
    assert len(first) == NUM_ITEMS and isinstance(first[NUM_ITEMS - 1], Example)
    with pytest.raises(IndexError):
        first[NUM_ITEMS]
    texts = [WorldDataset(split, EVEN).draft(5).turns for split in ("train", "validation", "test")]
    assert texts[0] != texts[1] != texts[2]


@pytest.mark.parametrize(("level", "num_items", "num_scenes"), [("grid", 2100, 3000), ("free", 700, 1000)])
def test_no_held_out_clause_in_training_scenes(level: str, num_items: int, num_scenes: int) -> None:
    dataset = WorldDataset("train", EVEN, WorldConfig(level=level))  # type: ignore[arg-type]
    scenes = [scene for index in range(num_items) for scene in dataset.scenes(index)]
    assert len(scenes) > num_scenes
    assert not [splits.violations(scene) for scene in scenes if splits.violations(scene)]
    seen = set().union(*(splits.clauses(scene) for scene in scenes))
    assert {clause[1] for clause in seen if clause[0] == "color"} == set(SHAPES)


def test_examples_have_the_form_of_their_task() -> None:
    dataset = WorldDataset("train", EVEN)
    tasks: Counter[str] = Counter()
    for index in range(150):
        example = dataset[index]
        tasks[example.task] += 1
        assert [turn.role for turn in example.turns] == ["user", "assistant"] * (len(example.turns) // 2)
        pictures = [[isinstance(s, Image.Image) for s in turn.segments] for turn in example.turns]
        if example.task == "t2i":
            assert pictures == [[False], [True]]
        elif example.task == "edit":
            assert pictures == [[True, False], [True]]
        elif example.task == "story":
            assert 1 <= sum(pictures[1]) <= 4 and pictures[1][:2] == [False, True]
        else:
            assert pictures == [[True, False]] + [[False]] * (len(pictures) - 1)
    assert set(tasks) == set(TASK_NAMES) - set(DRILLS)


@pytest.mark.parametrize("level", ["grid", "free"])
@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_true(kind: str, level: str) -> None:
    source = make_source(3, level)
    for _ in range(80):
        scene, caption = captioned_scene(source, kind)
        found = phrases(re.sub(r"\ba (photo|picture) of ", "", caption))
        assert found, caption
        for count, color, shape in found:
            if kind == "counting":
                assert len(having(scene, shape, color)) == count, caption
            assert len(having(scene, shape, color)) >= count, caption
        for relation in RELATIONS:
            if f" {relation} " in caption:
                (_, first, a), (_, second, b) = found
                moved, anchors = having(scene, a, first), having(scene, b, second)
                assert all(relation in relations(moved[0], anchor) for anchor in anchors), caption
        for match in re.finditer(rf"{NOUN} at the ({'|'.join(ROW_WORDS)}) ({'|'.join(COLUMN_WORDS)})(?=,|$)", caption):
            cells = [cell_of(item, scene.image_size) for item in having(scene, match["shape"], match["color"])]
            assert f"{match[3]} {match[4]}" in [place_words(cell) for cell in cells], caption


def test_captions_name_colours_often() -> None:
    dataset = WorldDataset("train", {"t2i": 1.0})
    texts = [str(dataset.draft(index).turns[0][1][0]) for index in range(1500)]
    assert np.mean([any(color in text.split() for color in COLORS) for text in texts]) > 0.58
    assert any(re.fullmatch(r"a photo of (two|three|four) \w+s", text) for text in texts)


def test_yes_and_no_are_balanced_and_true_in_training() -> None:
    dataset = WorldDataset("train", {"vqa": 1.0})
    tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for index in range(2000):
        draft = dataset.draft(index)
        (scene,) = draft.scenes()
        for (_, asked), (_, said) in zip(draft.turns[::2], draft.turns[1::2], strict=True):
            question = str(asked[-1])
            if question.endswith(YES_NO):
                assert said == (answer(scene, question),), (question, scene)
                tally[question][said == ("yes",)] += 1
    scores = [(yes - no) / sqrt(yes + no) for no, yes in tally.values() if yes + no >= 6]
    assert len(scores) > 150
    assert max(map(abs, scores)) < 4.5
    assert 0.8 < np.std(scores) < 1.2
    totals = np.sum(list(tally.values()), axis=0)
    assert abs(totals[1] / totals.sum() - 0.5) < 0.03


def test_words_come_first_and_are_true() -> None:
    """Plans name what the picture holds; answers name the objects that they follow from."""
    dataset = WorldDataset("train", {"t2i": 1.0, "vqa": 2.0, "edit": 1.0}, plans=1.0)
    plain = WorldDataset("train", {"t2i": 1.0, "vqa": 2.0, "edit": 1.0})
    num_reasons = 0
    for index in range(400):
        draft, bare = dataset.draft(index), plain.draft(index)
        assert draft.scenes() == bare.scenes() and draft.turns[::2] == bare.turns[::2]
        description = dense_phrase(draft.scenes()[-1])
        if draft.task != "vqa":
            assert draft.turns[-1][1] == (description, draft.scenes()[-1])
            continue
        for (_, asked), (_, said), (_, short) in zip(draft.turns[::2], draft.turns[1::2], bare.turns[1::2], strict=True):
            assert (final_answer(str(said[0])),) == short
            given = str(said[0]).rpartition(". Answer: ")[0].split(". ")
            if asked[0] in draft.scenes():
                assert given.pop(0) == description
            assert bool(given and given[0]) == (not re.match("Describe|What is at", str(asked[-1])))
            if given and given[0]:
                num_reasons += 1
                named = re.findall(rf"\b({'|'.join(SHAPES)})(?:e?s)?\b", str(asked[-1]))
                parts = [[part for part in description.split(", ") if part.startswith(f"{shape} ")] for shape in named]
                wanted = [found or [f"no {shape}"] for found, shape in zip(parts, named, strict=True)]
                objects, _, fact = given[0].partition(": ")
                assert objects == ", ".join(part for found in wanted for part in found)
                seen = having(draft.scenes()[0], named[0])
                facts = {NUMBERS[len(seen)], seen[0].color if seen else ""}
                facts |= set(relations(seen[0], having(draft.scenes()[0], named[1])[0])) if len(named) == 2 else {""}
                assert fact in facts and bool(fact) <= str(asked[-1]).endswith(YES_NO)
    assert num_reasons > 300


def test_drills_are_text_whose_answers_stand_in_what_was_said() -> None:
    dataset = WorldDataset("train", dict.fromkeys(DRILLS, 1.0), plans=1.0)
    seen: Counter[str] = Counter()
    for index in range(300):
        draft = dataset.draft(index)
        seen[draft.task] += 1
        assert not draft.scenes()
        (_, (told,)), (_, (said,)) = draft.turns[:2]
        assert isinstance(told, str) and isinstance(said, str)
        if draft.task == "recite":
            assert said == told
            words = set(said.split())
            assert not (words & set(COLORS) and words & set(SHAPES)), "could spell a held-out colour of a class"
            assert not any(splits.pair_clause(a, b) in splits.HELD_OUT for a in words & set(SHAPES) for b in words & set(SHAPES))
            continue
        given, _, asked = told.partition(". ")
        objects = [part.split()[:2] for part in given.split(", ")]
        for (shape, color), (other, _) in product(objects, objects):
            assert not {splits.color_clause(shape, color), splits.pair_clause(shape, other)} & splits.HELD_OUT
        parts = said.rpartition(". Answer: ")[0].partition(": ")[0] if draft.task == "read" else said
        for part in filter(None, parts.split(", ")):
            assert part in given.split(", ") or part.removeprefix("no ") not in given
        if draft.task == "look_up":
            assert set(asked.split(", ")) == set(re.findall("|".join(SHAPES), said))
    assert min(seen.values()) > 50 and len(seen) == 3


def test_an_answer_without_reasons_is_itself() -> None:
    assert final_answer("yes") == "yes" and final_answer("a. Answer: b. Answer: no") == "no"


def same_objects(edit: Edit) -> tuple[set[SceneObject], set[SceneObject]]:
    before, after = set(edit.before.objects), set(edit.after.objects)
    return before - after, after - before


@pytest.mark.parametrize("kind", EDITS)
def test_edits_change_only_what_they_name(kind: str) -> None:
    source = make_source(5)
    expected = {"remove": (1, 0), "add": (0, 1), "swap": (2, 2)}.get(kind, (1, 1))
    for _ in range(40):
        edit = draw_edit(source, kind)
        gone, new = same_objects(edit)
        assert (len(gone), len(new)) == expected, edit
        may_change = np.zeros((64, 64), dtype=bool)
        for item in gone | new:
            row, column = cell_of(item, 64)
            may_change[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = True
        differs = (render(edit.before) != render(edit.after)).any(axis=2)
        assert differs.any() and not (differs & ~may_change).any(), edit
        if edit.relation and edit.anchor is not None:
            assert edit.relation in relations(next(iter(new)), edit.anchor)


def test_stories_build_on_their_pictures() -> None:
    for item in story_items(40):
        story = item.story
        assert len(story.pictures) == len(item.expected) >= 1
        for scene, content in zip(story.pictures, item.expected, strict=True):
            assert sum(clause["count"] for clause in content) == len(scene.objects)
        scenes = ([story.first] if story.first else []) + list(story.pictures)
        if story.kind != "changes":
            for before, after in zip(scenes, scenes[1:], strict=False):
                assert after.objects[: len(before.objects)] == before.objects


def oracle(scene: Scene) -> list[geneval.Detection]:
    return [geneval.Detection(item.shape, 1.0, box_of(item), item.color) for item in scene.objects]


@pytest.mark.parametrize("held_out", [True, False])
def test_small_geneval_items(held_out: bool) -> None:
    items = small_geneval_items(24, held_out)
    assert items == small_geneval_items(24, held_out)
    assert Counter(item["tag"] for item in items) == dict.fromkeys(GENEVAL_TAGS, 24)
    rng = np.random.default_rng(0)
    for item in items:
        scene = ground_truth_scene(item, rng)
        asked = splits.clauses(scene) & splits.HELD_OUT
        if held_out and item["tag"] != "single_object":
            assert asked, item
        for caption_clause in item["include"]:
            if not held_out and "color" in caption_clause:
                assert splits.color_clause(caption_clause["class"], caption_clause["color"]) not in splits.HELD_OUT
        assert geneval.verdict(oracle(scene), geneval.detected_colors, item, (64, 64)).correct, (item, scene)


def test_small_mme_items_are_exactly_balanced() -> None:
    items = small_mme_items(20)
    tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for item in items:
        assert sorted(said for _, said in item.questions) == ["no", "yes"]
        for question, said in item.questions:
            assert said == answer(item.scene, question), (item, question)
            tally[question][said == "yes"] += 1
    assert all(yes == no for no, yes in tally.values())
    assert len({item.image_id for item in items}) == len(items) == 80
    assert all(not splits.has_violation(item.scene) for item in items if not item.held_out)
    assert sum(splits.has_violation(item.scene) for item in items) > 20
    with pytest.raises(ValueError, match="is odd"):
        small_mme_items(3)


def test_edit_items_say_what_must_be_seen() -> None:
    items = edit_items(36)
    assert Counter(item.edit.kind for item in items) == dict.fromkeys(EDITS, 6)
    for item in items:
        assert len(item.kept) + len(item.changed) == len(item.edit.after.objects)
