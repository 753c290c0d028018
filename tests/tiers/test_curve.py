"""The live hit-ratio curve: what it says of other capacities is what a full replay says."""

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.chunks import ChunkKey
from kvtier.tiers.base import Coming
from kvtier.tiers.curve import Curve, Request
from kvtier.tiers.curve_family import sampled_family
from kvtier.tiers.curve_popular import Popular
from kvtier.tiers.curve_replay import Chunk, MakeFamily, Replay
from kvtier.tiers.policies.registry import FAMILIES, Family, NothingToLearn

Timed = tuple[float, list[ChunkKey]]
CAPACITIES = (3, 5, 8, 16)


def chain(*words: int) -> list[ChunkKey]:
    """The keys of a prompt: each stands for the words up to it."""
    keys, above = [], b""
    for word in words:
        above = sha256(above + word.to_bytes(4, "little")).digest()
        keys.append(ChunkKey(above))
    return keys


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(lambda words: chain(*words))
workloads = st.lists(prompts, max_size=60)


class PlainLru:
    """LRU by the definition: the least of (last request, leaves before their parents)."""

    def __init__(self) -> None:
        self._order: dict[Chunk, tuple[int, int]] = {}
        self._requests = 0

    def asked(self, path: Sequence[Chunk], beyond: Sequence[ChunkKey], now_s: float) -> None:
        self._requests += 1
        for depth, chunk in enumerate(path):
            self._order[chunk] = (self._requests, -depth)

    def hinted(self, path: Sequence[Chunk], label: int, now_s: float) -> None: ...

    def arrival(
        self, above: Chunk | None, keys: Sequence[ChunkKey], now_s: float, label: int = 0
    ) -> None:
        return None

    def admits(self, coming: Coming, over: Chunk) -> bool:
        return True

    def added(self, entry: Chunk, coming: Coming) -> None:
        self._order[entry] = (self._requests, -len(entry.path()) + 1)

    def removed(self, entry: Chunk, *, evicted: bool) -> None:
        del self._order[entry]

    def victims(self, now_s: float) -> Iterator[Chunk]:
        while left := [chunk for chunk in self._order if chunk.evictable]:
            yield min(left, key=self._order.__getitem__)

    def reuse(self, entry: Chunk, now_s: float) -> float:
        return 1.0

    def label(self, entry: Chunk) -> int:
        return 0

    def likely(self, coming: Coming) -> float:
        return 1.0

    def closed(self) -> None: ...


def plain_lru(weight: int) -> Family:
    return Family(PlainLru, NothingToLearn())


def hits_by_recency(workload: Sequence[Sequence[ChunkKey]], capacity: int) -> int:
    """LRU by its stack, without a tree: a prompt's chunks go on top, its first one last."""
    stack: OrderedDict[ChunkKey, None] = OrderedDict()
    hits = 0
    for keys in workload:
        run = 0
        while run < len(keys) and keys[run] in stack:
            run += 1
        hits += run
        for key in reversed(keys):
            stack[key] = None
            stack.move_to_end(key)
        while len(stack) > capacity:
            stack.popitem(last=False)
    return hits


def fed(curve: Curve, workload: Sequence[Sequence[ChunkKey]], nbytes: int = 1) -> Curve:
    popular = Popular()
    for now_s, keys in enumerate(workload):
        popular.count(keys)
        for _ in curve.steps(Request(nbytes, keys, float(now_s)), popular.run(keys)):
            pass
    return curve


def sessions(seed: int, *, systems: int, requests: int) -> list[Timed]:
    """Chats that grow turn by turn under system prompts; the first of those begins half of them."""
    draw = random.Random(seed)
    openings = [[system] * draw.randint(2, 20) for system in range(systems)]
    chats: list[list[int]] = []
    made: list[Timed] = []
    now_s, fresh = 0.0, 10_000
    for _ in range(requests):
        now_s += draw.expovariate(1.0)
        if not chats or draw.random() < 1 / 6:
            chats.append([*openings[0 if draw.random() < 0.5 else draw.randrange(systems)]])
        chat = chats[-1 - min(len(chats) - 1, int(draw.expovariate(1 / 60)))]
        for _ in range(draw.randint(1, 6)):
            fresh += 1
            chat.append(fresh)
        made.append((now_s, chain(*chat)))
    return made


# ── at rate 1 ─────────────────────────────────────────────────────────────────────────────────────


@given(workloads)
def test_at_rate_1_the_curve_is_the_replay(workload: list[list[ChunkKey]]) -> None:
    curve = fed(Curve(CAPACITIES, plain_lru, most_chunks=1000), workload)
    asked = sum(map(len, workload))
    assert curve.rate == 1
    for point in curve.points():
        exact = 100 * hits_by_recency(workload, point.capacity_bytes) / max(1, asked)
        assert point.hit_percent == pytest.approx(exact)


@given(workloads)
def test_more_room_never_hits_less_with_a_stack_policy(workload: list[list[ChunkKey]]) -> None:
    points = fed(Curve(CAPACITIES, plain_lru, most_chunks=1000), workload).points()
    percents = [point.hit_percent for point in points]
    assert percents == sorted(percents)


@given(workloads, st.sampled_from([1, 7, 1 << 20]))
def test_capacities_are_bytes(workload: list[list[ChunkKey]], nbytes: int) -> None:
    by_chunk = fed(Curve(CAPACITIES, plain_lru, most_chunks=1000), workload)
    scaled = [nbytes * capacity + nbytes // 2 for capacity in CAPACITIES]
    by_byte = fed(Curve(scaled, plain_lru, most_chunks=1000), workload, nbytes)
    assert [p.hit_percent for p in by_byte.points()] == [p.hit_percent for p in by_chunk.points()]


@pytest.mark.parametrize("policy", FAMILIES)
@settings(max_examples=25)
@given(workload=workloads, times=st.lists(st.floats(0, 1e9), min_size=60, max_size=60))
def test_any_clock_will_do(policy: str, workload: list[list[ChunkKey]], times: list[float]) -> None:
    curve = Curve(CAPACITIES, partial(sampled_family, policy), most_chunks=1000)
    for now_s, keys in zip(times, workload, strict=False):
        for _ in curve.steps(Request(1, keys, now_s), 0):
            pass
    assert all(0 <= point.hit_percent <= 100 for point in curve.points())


@dataclass(frozen=True)
class Agreement:
    """Hit percentages of the chunks asked for: sampled, and with every chunk replayed."""

    predicted_percent: float
    replayed_percent: float
    rate: float  # of the sample


def compare(
    requests: Sequence[Timed],
    capacities: Sequence[int],
    make_family: MakeFamily,
    most_chunks: int,
) -> list[Agreement]:
    """Requests through a curve, and in full at each of its capacities."""
    curve, popular = Curve(capacities, make_family, most_chunks), Popular()
    replays = [Replay(capacity, make_family(1)) for capacity in capacities]
    hits = [0] * len(replays)
    for now_s, keys in requests:
        popular.count(keys)
        for _ in curve.steps(Request(1, keys, now_s), popular.run(keys)):
            pass
        for place, replay in enumerate(replays):
            hits[place] += replay.ask(keys, [1] * len(keys), now_s)
            if replay.learner.due:
                replay.learner.learn()
    asked = sum(len(keys) for _, keys in requests)
    return [
        Agreement(point.hit_percent, 100 * hit / asked, curve.rate)
        for point, hit in zip(curve.points(), hits, strict=True)
    ]


# ── sampled ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "systems"), [*((policy, 40) for policy in FAMILIES), ("lru", 1), ("gix", 1)]
)
def test_a_sample_agrees_with_the_full_replay(policy: str, systems: int) -> None:
    requests = sessions(systems, systems=systems, requests=1500)
    unique = len({key for _, keys in requests for key in keys})
    capacities = [unique * percent // 100 for percent in (10, 20)]
    found = compare(requests, capacities, partial(sampled_family, policy), most_chunks=1000)
    assert found[0].rate < 1
    for at in found:
        assert abs(at.predicted_percent - at.replayed_percent) <= 2, at


def test_what_everybody_asks_for_does_not_depend_on_the_sample() -> None:
    """One prompt of six chunks before every question: each of the six is in one time of 16."""
    requests = [(float(asked), chain(1, 1, 1, 1, 1, 1, 2 + asked)) for asked in range(4000)]
    (found,) = compare(requests, [4000], partial(sampled_family, "lru"), most_chunks=250)
    assert found.rate == 1 / 16
    assert found.replayed_percent == pytest.approx(100 * 6 / 7, abs=0.1)
    assert found.predicted_percent == pytest.approx(found.replayed_percent, abs=1)


@given(st.integers(1, 64), st.integers(0, 1000), st.sampled_from([1, 1 << 20]))
def test_what_a_replay_holds_is_bounded(most_chunks: int, seed: int, first_bytes: int) -> None:
    """Also when the chunks that set the rate were larger than those that follow."""
    draw = random.Random(seed)
    curve = Curve([1 << 20], plain_lru, most_chunks)
    for now_s in range(200):
        keys = chain(*(draw.randrange(1 << 30) for _ in range(draw.randint(1, 6))))
        for _ in curve.steps(Request(1 if now_s else first_bytes, keys, float(now_s)), 0):
            pass
        assert curve.most_held <= 2 * most_chunks
    assert curve.rate < 1


def test_one_huge_prompt_is_not_replayed_at_once() -> None:
    curve = Curve(CAPACITIES, plain_lru, most_chunks=1 << 20)
    assert all(cost < 2100 for cost in curve.steps(Request(1, chain(*range(5000)), 0.0), 0))
    assert curve.sampled_chunks == 2048


def test_a_curve_of_nothing_is_zero() -> None:
    curve = Curve(CAPACITIES, plain_lru, most_chunks=10)
    assert [point.hit_percent for point in curve.points()] == [0.0] * len(CAPACITIES)
    assert (curve.rate, curve.sampled_chunks, curve.seen_bytes) == (1, 0, 0)


# ── what everybody asks for ───────────────────────────────────────────────────────────────────────


def test_a_shared_prompt_is_popular_and_its_continuations_are_not() -> None:
    popular = Popular()
    for question in range(2000):
        popular.count(chain(1, 1, 1, 1, 1, 100 + question, 7))
    assert popular.run(chain(1, 1, 1, 1, 1, 100, 7)) == 5
    assert popular.run(chain(1, 1, 2)) == 2


def test_what_is_no_longer_asked_for_is_forgotten() -> None:
    popular = Popular()
    old, new = chain(1, 1), chain(2, 2)
    for _ in range(100):
        popular.count(old)
    assert popular.run(old) == 2
    for _ in range(100_000):
        popular.count(new)
    assert (popular.run(old), popular.run(new)) == (0, 2)


def test_counting_takes_no_more_room_than_it_may() -> None:
    popular = Popular()
    for question in range(30_000):
        popular.count(chain(question % 3, question))
        assert len(popular._counts) <= 4096 + 2
    assert popular.run(chain(0, 0)) == 1


# ── offered ───────────────────────────────────────────────────────────────────────────────────────


def test_what_is_only_offered_is_stored_and_not_counted() -> None:
    """As the answers are that an engine offloads: nobody asked for them before the next turn."""
    curve = Curve([100], plain_lru, most_chunks=1000)
    turns = [(chain(1, 2), True), (chain(1, 2, 3, 4), False), (chain(1, 2, 3, 4, 5), True)]
    for now_s, (keys, reads) in enumerate(turns):
        for _ in curve.steps(Request(1, keys, float(now_s), reads), 0):
            pass
    assert curve.requests == 2
    assert curve.sampled_chunks == 7
    assert curve.points()[0].hit_percent == pytest.approx(100 * 4 / 7)


@given(workloads)
def test_offers_leave_uses_as_they_were(workload: list[list[ChunkKey]]) -> None:
    """With room for all, offering what is there changes nothing."""
    asked, offered = Curve([1000], plain_lru, 1000), Curve([1000], plain_lru, 1000)
    for keys in workload:
        for _ in asked.steps(Request(1, keys, 0.0), 0):
            pass
        for reads in (True, False):
            for _ in offered.steps(Request(1, keys, 0.0, reads), 0):
                pass
    assert asked.points() == offered.points()
