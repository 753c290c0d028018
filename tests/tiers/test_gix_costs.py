"""What GIX costs: bytes for a chunk and its ghosts, and looks at chunks, without a clock."""

import tracemalloc
from typing import Any

import pytest

from kvtier.chunks import ChunkKey
from kvtier.tiers.base import Coming
from kvtier.tiers.policies.arrivals import Arrival
from kvtier.tiers.policies.classes import FineClasses
from kvtier.tiers.policies.gix import Gix
from kvtier.tiers.policies.learner import HazardLearner
from kvtier.tiers.policies.traits import Traits
from tests.contracts.policy import key_of


class Bare:
    """An entry without a tree, for counting bytes and looks."""

    __slots__ = ("above", "is_leaf", "key", "looks", "mark")

    def __init__(self, above: "Bare | None", number: int) -> None:
        self.above = above
        self.key = ChunkKey(number.to_bytes(32, "little"))
        self.is_leaf = True
        self.looks = 0  # how often it was looked at whether it may go
        self.mark: Any = None

    @property
    def evictable(self) -> bool:
        self.looks += 1
        return self.is_leaf


@pytest.mark.parametrize(("length", "most"), [(32, 72), (128, 32)])
def test_a_chunk_costs_few_bytes_with_four_ghosts_to_each(length: int, most: int) -> None:
    requests = 20
    gix: Gix[Any] = Gix(HazardLearner(FineClasses()))
    paths = [_bare_path(number, length) for number in range((1 + 4) * requests)]
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number, path in enumerate(paths):
        _come(gix, path, float(number))
        if number >= requests:
            for entry in reversed(paths[number - requests]):
                gix.removed(entry, evicted=True)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert gix._resident == requests * length
    assert gix._shades.ghosts >= 3 * requests * length
    assert grown / gix._resident < most


def _bare_path(number: int, length: int) -> list[Bare]:
    path: list[Bare] = []
    for place in range(length):
        above = path[-1] if path else None
        path.append(Bare(above, (number << 16 | place) * 0x9E3779B97F4A7C15))
    return path


def _come(gix: Gix[Any], path: list[Bare], now_s: float) -> None:
    gix.asked([], [entry.key for entry in path], now_s)
    arrival = gix.arrival(None, [entry.key for entry in path], now_s)
    for place, entry in enumerate(path):
        gix.added(entry, Coming(arrival, place))


def _grown(gix: Gix[Any], blocks: int, step_s: float, labels: int) -> list[Bare]:
    """A path that an engine stores chunk by chunk, each an arrival of its own."""
    path = _bare_path(1, blocks)
    for number, entry in enumerate(path):
        now_s = number * step_s
        arrival = gix.arrival(entry.above, [entry.key], now_s, number % labels)
        if entry.above is not None:
            entry.above.is_leaf = False
        gix.added(entry, Coming(arrival, 0))
    return path


@pytest.mark.parametrize("step_s", [0.0, 0.01, 10.0])
def test_a_path_stored_block_by_block_is_one_segment_touched_last(step_s: float) -> None:
    gix: Gix[Any] = Gix(HazardLearner(FineClasses()))
    path = _grown(gix, 300, step_s, labels=1)
    assert {entry.mark for entry in path} == {path[0].mark}
    assert path[0].mark.traits.since_s == 299 * step_s
    gix.asked(path, [], 5000.0)
    assert gix._learner._reused.sum() == 300, "to be stored was no use"


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_giving_up_a_path_looks_at_few_chunks_for_each(labels: int) -> None:
    gix: Gix[Any] = Gix(HazardLearner(FineClasses()))
    path = _grown(gix, 300, 10.0, labels)
    for number in range(len(path) - 1, -1, -1):
        victim = next(gix.victims(3000.0))
        assert victim is path[number]
        gix.removed(victim, evicted=True)
        if number:
            path[number - 1].is_leaf = True
    assert sum(entry.looks for entry in path) <= 50 * len(path)
    assert gix._shades.ghosts == len(path)


def test_what_a_long_arrival_is_worth_is_asked_once() -> None:
    runs = [(Traits(number % 9, float(number), 2, 1), number + 1) for number in range(100)]
    keys = [key_of((number,)) for number in range(101)]
    arrival = Arrival(None, keys, runs, Traits(1, 100.0, 1, 1))
    asked: list[Traits] = []

    def worth(traits: Traits) -> float:
        asked.append(traits)
        return -abs(traits.since_s - 40.0)

    best = [arrival.best_from(place, worth).since_s for place in range(101)]
    assert best == [max(40.0, float(place)) for place in range(101)]
    assert len(asked) <= 2 * 101
    assert [arrival.traits_at(place).since_s for place in range(101)] == [*map(float, range(101))]
