"""Mixtures: shares, epochs, purity; and what a million items cost."""

import io
import pickle
import random
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orthus.data import packing
from orthus.data.schema import Example, Turn
from orthus.data.sources import Mixture, SourceSettings, open_mixture, open_source
from orthus.data.sources.order import CYCLE, EpochOrder, shuffled, slots_of

NUM_ITEMS = 1_000_000
RANKS, LANES = 4, 2


class Numbers:
    """Items computed from their index, in blocks of uneven sizes."""

    def __init__(self, block_sizes: list[int], mixed: int = 16) -> None:
        self.block_sizes, self.mixed = block_sizes, mixed

    def __len__(self) -> int:
        return sum(self.block_sizes)

    def __getitem__(self, index: int) -> Example:
        return Example((Turn("assistant", (str(index),)),), "text")


def test_the_permutation_is_that_of_the_loader() -> None:
    for length in (1, 2, 5, 1000, 10**12):
        for index in {0, length // 3, length - 1}:
            assert shuffled(index, length, (3, 4)) == packing.shuffled(index, length, (3, 4))


@pytest.mark.parametrize("sizes", [[7], [3, 0, 4, 1, 9, 2], [5] * 40])
@pytest.mark.parametrize("mixed", [1, 4])
def test_every_item_once_per_epoch_and_in_another_order(sizes: list[int], mixed: int) -> None:
    order = EpochOrder(sizes, mixed, (0, 1))
    epochs = [[order(epoch, place) for place in range(sum(sizes))] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(sum(sizes))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert [order(2, place) for place in range(sum(sizes))] == epochs[2]  # after its plan was let go


def test_few_shards_are_open_at_once_and_mixed_well() -> None:
    order = EpochOrder([50] * 100, 8, (0, 0))
    blocks = np.array([order(0, place) // 50 for place in range(5000)])
    groups = blocks[:4800].reshape(12, 400)
    assert all(len(set(group)) == 8 for group in groups.tolist())  # 8 shards to the end, then 8 others
    assert np.mean(groups[:, :-1] == groups[:, 1:]) < 0.2  # a neighbour is of the same shard in one of eight cases


def test_shares_are_exact_over_a_cycle_and_even_within() -> None:
    weights = [6.0, 3.0, 0.99, 0.01]
    mixture = Mixture([Numbers([100])] * 4, weights, seed=1)
    numbers = np.array([mixture.locate(position)[0] for position in range(2 * CYCLE)])
    for cycle in numbers.reshape(2, CYCLE):
        assert np.bincount(cycle, minlength=4).tolist() == [6000, 3000, 990, 10] == list(mixture.slots)
    expected = np.arange(1, 2 * CYCLE + 1)[:, None] * np.array(weights) / sum(weights)
    got = np.cumsum(numbers[:, None] == np.arange(4), axis=0)
    assert np.abs(got - expected).max() < 6
    halves = np.array([np.mean(numbers[rank::8] == 0) for rank in range(8)])  # no rank sees one source only
    assert np.abs(halves - 0.6).max() < 0.05
    assert slots_of([1, 1, 1]) == (3334, 3333, 3333)
    with pytest.raises(ValueError, match="weight 1e-05 of source 1 is less than 1/10000"):
        slots_of([1, 1e-5])


def test_a_mixture_is_a_pure_function_of_the_position() -> None:
    sources = [Numbers([70, 30, 150]), Numbers([40]), Numbers([9] * 50, mixed=3)]
    mixture = Mixture(sources, [0.5, 0.3, 0.2], seed=5)
    walked = [mixture.locate(position) for position in range(3000)]
    for number, source in enumerate(sources):  # each source goes through its own epochs, one after the other
        mine = [(epoch, index) for owner, epoch, index in walked if owner == number]
        whole = len(mine) // len(source)
        for epoch in range(whole):
            part = mine[epoch * len(source) : (epoch + 1) * len(source)]
            assert {e for e, _ in part} == {epoch} and sorted(index for _, index in part) == list(range(len(source)))
    clone = pickle.loads(pickle.dumps(mixture))
    positions = random.Random(0).sample(range(3000), 500)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(clone.locate, positions)) == [walked[position] for position in positions]
    assert clone.locate(10**12 + 7) == mixture.locate(10**12 + 7)
    number, _, index = walked[17]
    assert mixture[17] == sources[number][index]
    assert [Mixture(sources, [0.5, 0.3, 0.2], seed=6).locate(p) for p in range(100)] != walked[:100]
    with pytest.raises(IndexError, match="position -1"):
        mixture[-1]


def test_wrong_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match="1 sources have 2 weights"):
        Mixture([Numbers([3])], [1, 1], seed=0)
    with pytest.raises(ValueError, match="source 1 of the mixture is empty"):
        Mixture([Numbers([3]), Numbers([0])], [1, 1], seed=0)
    with pytest.raises(ValueError, match="weights="):
        Mixture([], [], seed=0)


def test_a_million_items_each_once_across_ranks_and_lanes() -> None:
    """4 ranks x 2 lanes read an epoch of a million items in 500 shards: a bitmap is filled exactly, in under 2 MB of heap."""
    sizes = np.random.default_rng(0).multinomial(NUM_ITEMS, [1 / 500] * 500).tolist()
    mixture = Mixture([Numbers(sizes)], [1.0], seed=3)
    seen = np.zeros(NUM_ITEMS, np.uint8)
    samples: dict[int, tuple[int, int, int]] = {}
    streams = RANKS * LANES
    tracemalloc.start()
    for stream in range(0, streams, 4):  # traced: one lane of every second rank, 1,000 positions each
        for position in range(stream, 1000 * streams, streams):
            mixture.locate(position)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    for stream in range(streams):
        for position in range(stream, NUM_ITEMS, streams):
            found = mixture.locate(position)
            assert found[1] == 0
            seen[found[2]] += 1
            if position % 9973 == 0:
                samples[position] = found
    assert seen.min() == seen.max() == 1
    fresh = Mixture([Numbers(sizes)], [1.0], seed=3)
    assert all(fresh.locate(position) == found for position, found in reversed(samples.items()))
    assert fresh.locate(NUM_ITEMS)[1] == 1


def test_a_million_lines_are_read_anywhere_in_flat_memory(tmp_path: Path) -> None:
    """The index of a million lines is mapped, 24 bytes each: opening and 2,000 reads take under 1 MB of heap."""
    path = tmp_path / "x.jsonl"
    with open(path, "w") as file:
        file.writelines(f'{{"text": "{number * 7919 % NUM_ITEMS}"}}\n' for number in range(NUM_ITEMS))
    settings = SourceSettings("text", str(path))
    open_source(settings)
    assert (tmp_path / "x.jsonl.index.npy").stat().st_size < 24 * NUM_ITEMS + 1000
    tracemalloc.start()
    source = open_source(settings)
    assert len(source) == NUM_ITEMS
    for index in random.Random(0).sample(range(NUM_ITEMS), 2000):
        assert source[index].turns[0].segments == (str(index * 7919 % NUM_ITEMS),)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_shards_of_ten_thousand_members_each(tmp_path: Path) -> None:
    """Each of 5,000 pictures and captions: every item once per epoch, the right picture with each caption."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number in range(5_000):
                stream = io.BytesIO()
                Image.new("L", (2, 1), number % 251).save(stream, "PNG")
                for ending, data in (("png", stream.getvalue()), ("txt", f"{shard} {number}".encode())):
                    info = tarfile.TarInfo(f"{number:06d}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    open_source(SourceSettings("webdataset", str(tmp_path)))
    assert (tmp_path / "0.tar.index.npy").stat().st_size < 60 * 5_000
    mixture = open_mixture([SourceSettings("webdataset", str(tmp_path))], seed=0)
    places = [mixture.locate(position)[2] for position in range(20_000)]
    assert sorted(places[:10_000]) == sorted(places[10_000:]) == list(range(10_000)) and places[:10_000] != places[10_000:]
    tracemalloc.start()
    for position in range(123, 20_000, 37):
        _, _, index = mixture.locate(position)
        user, assistant = mixture[position].turns
        shard, number = divmod(index, 5_000)
        assert user.segments == (f"{shard} {number}",)
        assert assistant.segments[0].getpixel((0, 0)) == (number % 251,) * 3  # type: ignore[union-attr]
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_epochs_differ_where_neighbours_could_stay() -> None:
    order = EpochOrder([1000] * 4, 16, (0, 0))
    first = [order(0, place) for place in range(4000)]
    followers = dict(pairwise(first))
    second = [order(1, place) for place in range(4000)]
    assert sum(followers.get(a) == b for a, b in pairwise(second)) < 20
