"""Packing: nothing lost, nothing twice, rows full, and an interrupted run continues exactly."""

import itertools
import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from orthus.data.packing import PackedLoader, choose_row, shuffled
from orthus.data.schema import BadItem, Example, Turn
from orthus.processing import OrthusProcessor, build_processor

WORDS = ["red", "blue", "circle", "star", "left", "of", "two"]
IMG, PAD = 7, 1


class Endless:
    """Examples that name their own index, so that a batch tells which it holds."""

    def __getitem__(self, index: int) -> Example:
        draw = random.Random(index)
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 12)))
        image = Image.new("RGB", (8, 8), (index % 256, index // 256 % 256, draw.randrange(256)))
        if index % 3 == 0:
            return Example((Turn("user", (f"{index}",)), Turn("assistant", (text,))), "text")
        if index % 3 == 1:
            return Example((Turn("user", (f"{index}", text)), Turn("assistant", (image,))), "draw")
        return Example((Turn("user", (f"{index}", image)), Turn("assistant", (text, image))), "edit")


class Sized(Endless):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


@pytest.fixture(scope="module")
def processor() -> OrthusProcessor:
    return build_processor([" ".join(WORDS)] * 9, 320, 8, num_image_tokens=4, unconditional_prompt="")


def examples_of(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of every example of a batch, padding left out."""
    found = []
    for ids, positions, labels in zip(*(batch[name].tolist() for name in ("input_ids", "position_ids", "labels")), strict=True):
        starts = [place for place, position in enumerate(positions) if position == 0] + [len(ids)]
        for start, end in itertools.pairwise(starts):
            assert positions[start:end] == list(range(end - start))
            if ids[start] != PAD:
                found.append((ids[start:end], labels[start:end]))
            else:
                assert set(ids[start:end]) == {PAD} and set(labels[start:end]) == {-100}
    return found


def index_of(processor: OrthusProcessor, ids: list[int]) -> int:
    text = processor.tokenizer.decode([token for token in ids if token >= 8])
    return int("".join(itertools.takewhile(str.isdigit, text)))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_packed_examples_are_those_of_render_with_their_pictures(processor: OrthusProcessor) -> None:
    loader = PackedLoader(Endless(), processor, rows_per_batch=3, row_length=64)
    for batch in itertools.islice(loader, 4):
        assert all(batch[name].shape == (3, 64) and batch[name].dtype == torch.int64 for name in ("input_ids", "labels"))
        images = []
        for ids, labels in examples_of(batch):
            rendered = processor.render(Endless()[index_of(processor, ids)].turns)
            assert (ids, labels) == (rendered.input_ids, rendered.labels) and labels[0] == -100
            images += rendered.images
        assert torch.equal(batch["pixel_values"], processor.image_processor.pixel_values(images))
        assert (batch["input_ids"] == IMG).sum() == 4 * len(images)


def test_rows_are_full_and_order_is_nearly_kept(processor: OrthusProcessor) -> None:
    loader = PackedLoader(Endless(), processor, rows_per_batch=4, row_length=96)
    seen = [index_of(processor, ids) for batch in itertools.islice(loader, 20) for ids, _ in examples_of(batch)]
    assert len(seen) == len(set(seen)) == loader.examples.total()
    assert set(range(max(seen) - 64)) <= set(seen)  # whatever is not out yet is still in the buffer
    assert loader.fill >= 0.95 and loader.num_tokens == 20 * 4 * 96
    assert loader.examples == Counter({0: "text", 1: "draw", 2: "edit"}[index % 3] for index in seen)


def test_ranks_share_the_examples_without_overlap(processor: OrthusProcessor) -> None:
    for start in (0, 1, 7):
        seen = []
        for rank in range(3):
            loader = PackedLoader(Endless(), processor, 2, 64, rank=rank, world_size=3, start_index=start, buffer_size=1)
            mine = [index_of(processor, ids) for batch in itertools.islice(loader, 3) for ids, _ in examples_of(batch)]
            assert mine == [start + (rank - start) % 3 + 3 * number for number in range(len(mine))]
            seen += mine
        assert len(seen) == len(set(seen))


@pytest.mark.parametrize("dataset", [Endless(), Sized(50)])
def test_resumed_equals_uninterrupted(processor: OrthusProcessor, dataset: Endless) -> None:
    def loader(num_threads: int = 0) -> PackedLoader:
        return PackedLoader(dataset, processor, 2, 64, rank=1, world_size=2, start_index=5, seed=3, num_threads=num_threads)

    whole, resumed = loader(), loader(num_threads=3)
    for _ in range(3):
        next(whole)
    state = whole.state_dict()
    resumed.load_state_dict(state)
    assert all(same(next(whole), next(resumed)) for _ in range(5))
    assert whole.state_dict() == resumed.state_dict() != state
    assert same(next(loader()), next(loader()))


def test_a_state_of_another_loader_is_refused(processor: OrthusProcessor) -> None:
    state = PackedLoader(Endless(), processor, 2, 64).state_dict()
    for arguments in ({"rank": 1, "world_size": 2}, {"row_length": 32}, {"seed": 1}, {"buffer_size": 8}):
        with pytest.raises(ValueError, match="make them equal"):
            PackedLoader(Endless(), processor, **{"rows_per_batch": 2, "row_length": 64, **arguments}).load_state_dict(state)


@pytest.mark.parametrize("seed", [None, 0])
def test_a_dataset_with_a_length_is_read_epoch_by_epoch(processor: OrthusProcessor, seed: int | None) -> None:
    loader = PackedLoader(Sized(20), processor, 1, 64, seed=seed, buffer_size=1)
    batches = itertools.chain.from_iterable(examples_of(batch) for batch in loader)
    seen = [index_of(processor, ids) for ids, _ in itertools.islice(batches, 60)]
    epochs = [seen[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert (epochs[0] == epochs[1]) == (epochs[0] == sorted(epochs[0])) == (seed is None)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 1000])
def test_shuffled_is_a_permutation_for_every_length(length: int) -> None:
    assert sorted(shuffled(index, length, (0, 0)) for index in range(length)) == list(range(length))


def test_shuffled_needs_no_memory_and_looks_uniform() -> None:
    places = np.array([shuffled(index, 2**31, (7, 0)) for index in range(2000)]) / 2**31
    assert abs(places.mean() - 0.5) < 0.03 and abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.1
    assert [shuffled(index, 100, (7, 0)) for index in range(9)] != [shuffled(index, 100, (7, 1)) for index in range(9)]


def test_choose_row_is_optimal_and_never_starves_the_first() -> None:
    draw = random.Random(0)
    for _ in range(50):
        room = draw.randrange(10, 40)
        lengths = [draw.randrange(2, room + 1) for _ in range(9)]
        chosen = choose_row(lengths, room)
        others = [sum(part) for size in range(9) for part in itertools.combinations(lengths[1:], size)]
        assert chosen[0] == 0 and chosen == sorted(set(chosen))
        assert sum(lengths[place] for place in chosen) == lengths[0] + max(t for t in others if lengths[0] + t <= room)


def test_long_examples_are_counted_and_reported(processor: OrthusProcessor) -> None:
    class WithLong(Endless):
        def __getitem__(self, index: int) -> Example:
            return Example((Turn("user", ("red " * 99,)),), "long") if index in (3, 40) else super().__getitem__(index)

    loader = PackedLoader(WithLong(), processor, 2, 64, max_dropped_fraction=0.02)
    with pytest.warns(UserWarning, match="'long' has 102 tokens, more than row_length = 64: dropped") as warned:
        first = next(loader)
    assert len(warned) == 1 and loader.dropped == {"long": 2}  # one warning for each task
    resumed = PackedLoader(WithLong(), processor, 2, 64, max_dropped_fraction=0.02)
    resumed.load_state_dict(loader.state_dict())
    assert resumed.dropped == {"long": 2} and first["input_ids"].shape == (2, 64)
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match="dropped 2 of .*row_length or max_dropped_fraction"),
    ):
        warnings.simplefilter("ignore")
        next(PackedLoader(WithLong(), processor, 2, 64))


@pytest.mark.parametrize("num_threads", [0, 2])
def test_bad_items_are_counted_by_source_and_too_many_end_the_run(processor: OrthusProcessor, num_threads: int) -> None:
    class Damaged(Endless):
        def __getitem__(self, index: int) -> Example:
            if index % 40 == 7:
                raise BadItem("shards", f"00.tar, sample {index}: the picture is cut off")
            return super().__getitem__(index)

    loader = PackedLoader(Damaged(), processor, 2, 64, max_dropped_fraction=0.05, num_threads=num_threads)
    with pytest.warns(UserWarning, match="source 'shards': 00.tar, sample 7: the picture is cut off: dropped") as warned:
        seen = [index_of(processor, ids) for batch in itertools.islice(loader, 20) for ids, _ in examples_of(batch)]
    assert len(warned) == 1 and loader.bad["shards"] >= 3 and not [index for index in seen if index % 40 == 7]
    resumed = PackedLoader(Damaged(), processor, 2, 64, max_dropped_fraction=0.05)
    resumed.load_state_dict(loader.state_dict())
    assert resumed.bad == loader.bad and same(next(resumed), next(loader))
    strict = PackedLoader(Damaged(), processor, 2, 64, num_threads=num_threads)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"dropped 2 .*'bad in shards': 2.*sample 47.*repair"):
        warnings.simplefilter("ignore")
        next(strict)


@pytest.mark.parametrize("fraction", [0.0, 0.99])
def test_a_dataset_of_only_long_examples_ends_in_an_error(processor: OrthusProcessor, fraction: float) -> None:
    with warnings.catch_warnings(), pytest.raises(ValueError, match="raise row_length"):
        warnings.simplefilter("ignore")
        next(PackedLoader(Endless(), processor, 1, 4, max_dropped_fraction=fraction))


def test_text_only_batches_have_no_pixels_and_bad_examples_are_named(processor: OrthusProcessor) -> None:
    class Texts:
        def __getitem__(self, index: int) -> Example:
            return Example((Turn("user", ("red" if index < 70 else "",)),), "plain")

    loader = PackedLoader(Texts(), processor, 1, 16)
    assert sorted(next(loader)) == ["input_ids", "labels", "position_ids"]
    with pytest.raises(ValueError, match="example 70 of task 'plain': empty prompt"):
        for _ in range(9):
            next(loader)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank = 2"),
        ({"rank": -1}, "rank = -1"),
        ({"rows_per_batch": 0}, "rows_per_batch=0"),
        ({"row_length": 0}, "row_length=0"),
        ({"buffer_size": 0}, "buffer_size=0"),
        ({"start_index": -1}, "start_index = -1"),
        ({"max_dropped_fraction": 1.0}, "= 1.0"),
        ({"dataset": Sized(0)}, "dataset is empty"),
    ],
)
def test_impossible_settings_are_refused(processor: OrthusProcessor, arguments: dict, message: str) -> None:
    defaults = {"dataset": Endless(), "processor": processor, "rows_per_batch": 2, "row_length": 64}
    with pytest.raises(ValueError, match=message):
        PackedLoader(**{**defaults, **arguments})
