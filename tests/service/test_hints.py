"""What engines tell: within bounds, one label of few, and each request one use."""

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.chunks import ChunkKey
from kvtier.metrics import Counters
from kvtier.proto import cache_pb2 as pb
from kvtier.service.convert import hints_of
from kvtier.service.hints import LONGEST_NEXT_USE_S, Hints, Label
from kvtier.service.uses import _KNOWN
from kvtier.tiers.policies.learner import LABELS
from kvtier.tiers.policies.lru import Arrival, Lru
from kvtier.tiers.tree import Replica, TierId
from tests.core import Harness, harness, space


@dataclass
class Recorder(Lru[Replica]):
    """An LRU that remembers what it was told."""

    asks: list[tuple[int, int]] = field(default_factory=list)  # held, not held
    said: list[tuple[list[bytes], int]] = field(default_factory=list)
    arrivals: list[tuple[int, int]] = field(default_factory=list)  # keys, label

    def __post_init__(self) -> None:
        super().__init__()

    def asked(self, path: Sequence[Replica], beyond: Sequence[ChunkKey], now_s: float) -> None:
        self.asks.append((len(path), len(beyond)))
        super().asked(path, beyond, now_s)

    def hinted(self, path: Sequence[Replica], label: int, now_s: float) -> None:
        self.said.append(([replica.key for replica in path], label))

    def arrival(
        self, above: Replica | None, keys: Sequence[ChunkKey], now_s: float, label: int = 0
    ) -> Arrival:
        self.arrivals.append((len(keys), label))
        return super().arrival(above, keys, now_s, label)

    def label(self, entry: Replica) -> int:
        return Label.TOOL_USE


def recording(h: Harness) -> Iterator[Recorder]:
    """Policies of the default tenant that remember, by TierId."""
    session = h.session()
    recorders = tuple(Recorder() for _ in TierId)
    session.branch.tenant.policies = recorders
    return iter(recorders)


# ── bounds ────────────────────────────────────────────────────────────────────────────────────────


@given(
    next_use_s=st.floats(width=32),
    priority=st.integers(-(2**31), 2**31 - 1),
    stop_reason=st.integers(0, 10),
    session_end=st.booleans(),
)
def test_whatever_is_told_is_one_label_and_what_is_out_of_range_is_counted(
    next_use_s: float, priority: int, stop_reason: int, session_end: bool
) -> None:
    counters = Counters()
    message = pb.Hints(
        expected_next_use_s=next_use_s,
        priority=priority,
        stop_reason=stop_reason,  # type: ignore[arg-type]
        session_end=session_end,
    )
    hints = hints_of(message, counters)
    assert hints.label in Label
    in_range = 0 <= next_use_s <= LONGEST_NEXT_USE_S  # not for NaN
    assert counters.clamped_hints == (not in_range) + (abs(priority) > 2)
    if not in_range and not next_use_s > 0:
        message.expected_next_use_s = 0
        assert hints_of(message, Counters()) == hints, "what makes no sense was not told"


LABELLED = [
    (pb.Hints(), Label.NONE),
    (pb.Hints(request=7), Label.NONE),
    (pb.Hints(expected_next_use_s=0.5), Label.WITHIN_20_S),
    (pb.Hints(expected_next_use_s=20), Label.WITHIN_20_S),
    (pb.Hints(expected_next_use_s=21), Label.WITHIN_200_S),
    (pb.Hints(expected_next_use_s=200), Label.WITHIN_200_S),
    (pb.Hints(expected_next_use_s=2000), Label.WITHIN_2000_S),
    (pb.Hints(expected_next_use_s=2001), Label.LATER_OR_NEVER),
    (pb.Hints(expected_next_use_s=86400), Label.LATER_OR_NEVER),
    (pb.Hints(expected_next_use_s=math.inf), Label.LATER_OR_NEVER),
    (pb.Hints(session_end=True), Label.LATER_OR_NEVER),
    (pb.Hints(stop_reason=pb.STOP_REASON_TOOL_USE), Label.TOOL_USE),
    (pb.Hints(stop_reason=pb.STOP_REASON_END_OF_TURN), Label.END_OF_TURN),
    (pb.Hints(stop_reason=pb.STOP_REASON_LENGTH), Label.NONE),
    (pb.Hints(stop_reason=pb.STOP_REASON_ABORTED), Label.NONE),
    (pb.Hints(stop_reason=99), Label.NONE),  # type: ignore[arg-type]
    (pb.Hints(priority=1), Label.NONE),
    (pb.Hints(priority=-2), Label.LOW_PRIORITY),
    (pb.Hints(priority=-(2**31)), Label.LOW_PRIORITY),
    # What tells most makes the label.
    (pb.Hints(expected_next_use_s=5, session_end=True, priority=2), Label.WITHIN_20_S),
    (pb.Hints(session_end=True, stop_reason=pb.STOP_REASON_TOOL_USE), Label.LATER_OR_NEVER),
    (pb.Hints(stop_reason=pb.STOP_REASON_TOOL_USE, priority=-1), Label.TOOL_USE),
    (pb.Hints(stop_reason=pb.STOP_REASON_LENGTH, priority=-1), Label.LOW_PRIORITY),
    (pb.Hints(expected_next_use_s=math.nan, session_end=True), Label.LATER_OR_NEVER),
]


@pytest.mark.parametrize("told", range(len(LABELLED)))
def test_the_label(told: int) -> None:
    message, label = LABELLED[told]
    assert hints_of(message, Counters()) == Hints(message.request, label)


def test_the_learner_has_a_class_for_every_label() -> None:
    assert len(Label) <= LABELS


# ── labels reach the policies ─────────────────────────────────────────────────────────────────────


async def test_new_chunks_are_labelled_and_so_are_those_before_them(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        _, ram, disk = recording(h)
        session = h.session()
        prefix = h.chain_of(session, 6)
        h.put(session, prefix[:4])
        assert await h.write_behind.flush(10)
        told = Hints(0, Label.TOOL_USE)
        ram.arrivals.clear()
        h.cache.reserve(session, 900, prefix[2:].keys, prefix[2:].parent, told)
        assert ram.arrivals == [(2, Label.TOOL_USE)]
        assert ram.said == disk.said == [([*prefix[:4]], Label.TOOL_USE)]
        assert ram.asks == disk.asks == [], "a hint is not a use"


async def test_what_was_said_goes_with_a_chunk_to_disk_and_back(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        _, ram, disk = recording(h)
        session = h.session()
        prefix = h.chain_of(session, 3)
        h.put(session, prefix)
        assert await h.write_behind.flush(10)
        assert disk.arrivals == [(3, Label.TOOL_USE)]
        h.only_on_disk()
        ram.arrivals.clear()
        _, _, lease = await h.get(session, prefix)
        session.leases.end(lease)
        assert ram.arrivals == [(3, Label.TOOL_USE)]


async def test_chunks_that_continue_what_is_held_hint_at_all_before_them(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        _, ram, _ = recording(h)
        session = h.session()
        prefix = h.chain_of(session, 6)
        h.put(session, prefix[:4])
        h.cache.reserve(
            session, 900, prefix[4:].keys, prefix[4:].parent, Hints(0, Label.LATER_OR_NEVER)
        )
        assert ram.said == [([*prefix[:4]], Label.LATER_OR_NEVER)]


async def test_a_load_and_a_lookup_hint_too_and_without_a_label_nothing_is_said(
    tmp_path: Path,
) -> None:
    async with harness(tmp_path) as h:
        _, ram, _ = recording(h)
        session = h.session()
        prefix = h.chain_of(session, 3)
        h.put(session, prefix)
        h.cache.lookup(session, prefix.keys, Hints(5, Label.LATER_OR_NEVER))
        await asyncio.sleep(0)
        lease = h.cache.open_read(session, 900)
        chunks, _ = h.cache.load(
            session, lease, prefix[:2].keys, None, hints=Hints(5, Label.WITHIN_2000_S)
        )
        assert [len(landed.chunks) async for landed in chunks] == [2]
        assert ram.said == [
            ([*prefix], Label.LATER_OR_NEVER),
            ([*prefix[:2]], Label.WITHIN_2000_S),
        ]
        h.cache.lookup(session, prefix.keys, Hints(6))
        await asyncio.sleep(0)
        h.cache.lookup(session, h.chain_of(session, 3, seed=9).keys, Hints(7, Label.LATER_OR_NEVER))
        await asyncio.sleep(0)
        assert len(ram.said) == 2, "nothing to say, or of nothing"


# ── one request is one use ────────────────────────────────────────────────────────────────────────


async def use(h: Harness, how: str, request: int, held: int = 3, of: int = 5) -> None:
    """One call for a prompt of `of` chunks of which the first `held` are stored."""
    session = h.session()
    prefix = h.chain_of(session, of)
    hints = Hints(request)
    if how == "lookup":
        assert h.cache.lookup(session, prefix.keys, hints)[0] == held
        await asyncio.sleep(0)  # the policies hear of it after the answer
    elif how == "load":
        lease = h.cache.open_read(session, 1)
        chunks, _ = h.cache.load(session, lease, prefix.keys, None, hints=hints)
        assert sum([len(landed.chunks) async for landed in chunks]) == held
    else:
        h.cache.reserve(session, 1, prefix.keys, prefix.parent, hints)
    h.cache.end_session(session)


WAYS = ["lookup", "load", "reserve"]


@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("second", WAYS)
async def test_the_first_call_with_a_number_is_the_use(
    tmp_path: Path, first: str, second: str
) -> None:
    async with harness(tmp_path) as h:
        _, ram, _ = recording(h)
        session = h.session()
        h.put(session, h.chain_of(session, 3))
        await use(h, first, request=5)
        assert ram.asks == [(3, 2)]
        await use(h, second, request=5)
        assert ram.asks == [(3, 2)]
        await use(h, second, request=6)
        assert ram.asks == [(3, 2)] * 2


async def test_without_a_number_what_reads_is_a_use(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        _, ram, _ = recording(h)
        session = h.session()
        h.put(session, h.chain_of(session, 3))
        for how, uses in [("lookup", 0), ("reserve", 0), ("load", 1), ("load", 2)]:
            await use(h, how, request=0)
            assert len(ram.asks) == uses


async def test_numbers_are_of_one_space(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        _, ram, _ = recording(h)
        other = h.session(space(model="other"))
        h.cache.lookup(other, h.chain_of(other, 2).keys, Hints(5))
        await asyncio.sleep(0)
        await use(h, "lookup", request=5, held=0)
        assert ram.asks == [(0, 2), (0, 5)]


async def test_only_so_many_numbers_are_known_and_the_latest_longest(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        _, ram, _ = recording(h)
        for request in (1, 2, 1):
            await use(h, "lookup", request, held=0)
        assert len(ram.asks) == 2
        session = h.session()
        for request in range(10, 10 + _KNOWN - 1):
            h.cache.lookup(session, h.chain_of(session, 1).keys, Hints(request))
            await asyncio.sleep(0)
        ram.asks.clear()
        await use(h, "lookup", request=1, held=0)
        assert ram.asks == [], "it was used after 2"
        await use(h, "lookup", request=2, held=0)
        assert len(ram.asks) == 1
        [known] = h.cache.uses._known.values()
        assert len(known) == _KNOWN


async def test_a_space_that_is_gone_leaves_no_numbers(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        h.cache.lookup(session, h.chain_of(session, 1).keys, Hints(5))
        await asyncio.sleep(0)
        assert len(h.cache.uses._known) == 1
        branch = session.branch
        h.cache.end_session(session)
        assert h.placement.index.forget_if_empty(branch)
        del session, branch
        assert len(h.cache.uses._known) == 0
