"""Two ways to share a data set: every image once, at the same batch boundaries, whoever is lost and whenever."""

import random

import pytest

from vitdemo.inference.cluster import share_cores
from vitdemo.inference.loop import batches_of, merge_ranges
from vitdemo.inference.schedule import SCHEDULES


def play(kind: str, todo: list[range], replicas: int, seed: int) -> list[range]:
    """The ranges that come back when replicas answer in any order and lose one answer in five."""
    chance, schedule = random.Random(seed), SCHEDULES[kind](todo, replicas)
    held: dict[int, list[range]] = {k: [] for k in range(replicas)}
    done: list[range] = []
    while sum(map(len, done)) < sum(map(len, todo)):
        for k in held:
            while len(held[k]) < schedule.ahead and (indices := schedule.take(k, chance.choice([0.0, 3.0, 500.0]))):
                held[k].append(indices)
        k = chance.choice([k for k in held if held[k]])
        if chance.random() < 0.2:
            for indices in held[k]:
                schedule.give_back(indices, k)
            held[k] = []
        else:
            done.append(held[k].pop(0))
            schedule.done(done[-1])
    assert not any(held.values()) and schedule.take(0, 1.0) is None
    return done


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("seed", range(60))
def test_every_image_once_at_the_boundaries_of_one_device(kind, seed):
    chance = random.Random(seed)
    images, size = range(chance.randrange(1, 400)), chance.choice([1, 3, 8])
    whole = batches_of(images, size)
    todo = [batch for batch in whole if chance.random() < 0.8] or whole  # resumed: some were done before
    done = play(kind, todo, chance.choice([1, 2, 3, 8]), seed)
    assert sorted(i for indices in done for i in indices) == [i for batch in todo for i in batch]
    assert all(indices.start % size == 0 for indices in done)
    assert all(len(indices) % size == 0 or indices.stop == images.stop for indices in done)


def test_batches_cut_and_joined():
    assert batches_of(range(19), 8) == [range(0, 8), range(8, 16), range(16, 19)]
    assert merge_ranges(batches_of(range(19), 8)) == [range(19)] and merge_ranges([]) == []
    assert merge_ranges([range(0, 8), range(16, 19)]) == [range(0, 8), range(16, 19)]


def test_sync_cuts_each_global_batch_into_contiguous_shards():
    schedule = SCHEDULES["sync"](batches_of(range(50), 8), 3)
    assert [schedule.take(k, 0.0) for k in range(3)] == [range(0, 8), range(8, 16), range(16, 24)]
    assert schedule.take(0, 0.0) is None  # nobody begins the next one
    for indices in (range(8, 16), range(0, 8)):
        schedule.done(indices)
    assert schedule.take(1, 0.0) is None and schedule.step_s == []
    schedule.done(range(16, 24))
    assert len(schedule.step_s) == 1
    assert [schedule.take(k, 0.0) for k in range(3)] == [range(24, 32), range(32, 40), range(40, 48)]
    for start in (24, 32, 40):
        schedule.done(range(start, start + 8))
    assert [schedule.take(k, 0.0) for k in range(3)] == [range(48, 50), None, None]  # neither padded nor dropped


def test_async_ranges_grow_with_the_rate_and_shrink_towards_the_end():
    schedule = SCHEDULES["async"](batches_of(range(10_000), 8), 2)
    lengths = [len(schedule.take(0, rate)) for rate in (0.0, 16.0, 160.0, 1e6)]
    assert lengths == [8, 80, 512, 512]  # one batch at first; 5 s of 16 images/s; 64 batches at most
    while (indices := schedule.take(0, 1e6)) and indices.stop < 10_000:
        assert len(indices) <= max(8, (10_000 - indices.start) / 4 + 8)
    assert indices.stop == 10_000


@pytest.mark.parametrize(
    "cores, count, each, shares",
    [
        ([0, 1], 1, None, [[0, 1]]),
        ([0, 1], 2, None, [[0], [1]]),
        ([4, 5, 6, 7, 9], 2, None, [[4, 5, 6], [7, 9]]),
        ([0, 1], 3, None, [[0], [1], [0]]),
        ([0, 1], 1, 1, [[0]]),
        ([0, 1, 2, 3], 3, 2, [[0, 1], [2, 3], [0, 1]]),
        ([0, 1], 2, 8, [[0, 1], [0, 1]]),
    ],
)
def test_shares_of_the_cores(cores, count, each, shares):
    assert share_cores(cores, count, each) == shares
