"""Pins keep what they name, within bounds, for as long as they should, and nothing longer."""

import asyncio
import math
from pathlib import Path

import pytest

from kvtier.chunks import Prefix
from kvtier.service import pins as pins_module
from kvtier.service.answers import ReserveOutcome
from kvtier.service.pins import MOST_TTL_S, PINS_PER_TENANT, Pinned, Pins, PinStop, Terms
from kvtier.service.sessions import Session
from kvtier.tiers.tree import TierId
from tests.core import SLOT_BYTES, Harness, harness, space

HOUR = Terms(3600.0)
WRITE = ReserveOutcome.WRITE


def pin(h: Harness, session: Session, prefix: Prefix, terms: Terms = HOUR) -> Pinned:
    return h.cache.pin(session, prefix.keys, terms)


def unpin(h: Harness, session: Session, pinned: Pinned) -> None:
    assert pinned.pin is not None
    h.cache.pins.unpin(session, pinned.pin.id)


def held(h: Harness, session: Session, prefix: Prefix) -> int:
    return h.cache.lookup(session, prefix.keys)[0]


def flood(h: Harness, session: Session, chunks: int = 64) -> None:
    """Store more than RAM holds, one prompt after another."""
    for seed in range(1000, 1000 + chunks):
        h.put(session, h.chain_of(session, 1, seed=seed))


# ── what a pin keeps ──────────────────────────────────────────────────────────────────────────────


async def test_what_is_pinned_stays_and_what_is_unpinned_goes(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=20) as h:
        h.store.refuse_writes = True
        session = h.session()
        kept, other = h.chain_of(session, 4, seed=1), h.chain_of(session, 4, seed=2)
        h.put(session, kept)
        h.put(session, other)
        pinned = pin(h, session, kept)
        assert (pinned.chunks, pinned.stop, pinned.ttl_s) == (4, PinStop.COMPLETE, 3600)
        flood(h, session)
        assert (held(h, session, kept), held(h, session, other)) == (4, 0)
        unpin(h, session, pinned)
        unpin(h, session, pinned)  # twice does nothing
        flood(h, session)
        assert held(h, session, kept) == 0


async def test_only_the_leading_held_run_is_pinned(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 5)
        assert pin(h, session, prefix) == Pinned(None, 0, PinStop.MISS, 3600)
        h.put(session, prefix[:3])
        pinned = pin(h, session, prefix)
        assert (pinned.chunks, pinned.stop) == (3, PinStop.MISS)
        assert pin(h, session, prefix[:0]).stop is PinStop.COMPLETE


async def test_the_fastest_tier_keeps_each_chunk_and_promotion_leaves_it_there(
    tmp_path: Path,
) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        assert await h.write_behind.flush(10)
        h.only_on_disk()
        _, _, lease = await h.get(session, prefix[:2])
        h.cache.release(session, lease.id)
        pinned = pin(h, session, prefix)
        assert pinned.pin is not None
        tiers = [replica.tier for replica in pinned.pin.replicas]
        assert tiers == [TierId.CPU, TierId.CPU, TierId.DISK, TierId.DISK]
        _, _, lease = await h.get(session, prefix)
        assert [replica.tier for replica in pinned.pin.replicas] == tiers
        h.cache.release(session, lease.id)
        h.only_on_disk()
        assert h.cache.lookup(session, prefix.keys) == (4, 2), "RAM may give up what disk keeps"


async def test_pins_share_what_they_share_and_the_last_one_frees_it(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=20) as h:
        h.store.refuse_writes = True
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        whole, head, twice = (pin(h, session, prefix[:n]) for n in (4, 2, 2))
        assert [pinned.chunks for pinned in (whole, head, twice)] == [4, 2, 2]
        unpin(h, session, whole)
        flood(h, session)
        assert held(h, session, prefix) == 2
        unpin(h, session, head)
        flood(h, session)
        assert held(h, session, prefix) == 2
        unpin(h, session, twice)
        flood(h, session)
        assert held(h, session, prefix) == 0


# ── bounds ────────────────────────────────────────────────────────────────────────────────────────


async def test_the_part_that_fits_is_pinned_and_the_answer_says_why_not_more(
    tmp_path: Path,
) -> None:
    async with harness(tmp_path, slots=20, pin_percent=20) as h:
        session = h.session()
        prefix = h.chain_of(session, 10)
        h.put(session, prefix)
        pinned = pin(h, session, prefix)
        assert (pinned.chunks, pinned.stop) == (4, PinStop.TENANT_BYTES)
        again = pin(h, session, prefix)
        assert (again.chunks, again.stop) == (4, PinStop.TENANT_BYTES), "they count once"
        other = h.chain_of(session, 1, seed=2)
        h.put(session, other)
        assert pin(h, session, other) == Pinned(None, 0, PinStop.TENANT_BYTES, 3600)
        unpin(h, session, pinned)
        unpin(h, session, again)
        assert pin(h, session, other).chunks == 1
        assert h.placement.counters.pins_cut == 3
        assert h.placement.counters.pins_made == 3


async def test_what_is_before_a_chunk_counts_with_it(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=20, pin_percent=20) as h:
        session = h.session()
        prefix = h.chain_of(session, 10)
        h.put(session, prefix)
        assert pin(h, session, prefix[9:]) == Pinned(None, 0, PinStop.TENANT_BYTES, 3600)
        pinned = pin(h, session, prefix[2:])
        assert pinned.pin is not None
        assert (pinned.chunks, len(pinned.pin.replicas)) == (2, 4)


async def test_each_tier_has_its_own_bound(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=20, pin_percent=20) as h:
        h.store.capacity_bytes = 20 * SLOT_BYTES
        h.placement.shares.capacity[TierId.DISK] = h.store.capacity_bytes  # type: ignore[index]
        session = h.session()
        prefix, other = h.chain_of(session, 6, seed=1), h.chain_of(session, 6, seed=2)
        h.put(session, prefix)
        assert await h.write_behind.flush(10)
        h.only_on_disk()
        h.put(session, other)
        assert pin(h, session, prefix).chunks == 4
        assert pin(h, session, other).chunks == 4


async def test_no_tenant_has_more_than_so_many_pins(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session, neighbour = h.session(), h.session(space(tenant="other"))
        for each in (session, neighbour):
            h.put(each, h.chain_of(each, 1))
        made = [pin(h, session, h.chain_of(session, 1)) for _ in range(PINS_PER_TENANT)]
        assert all(pinned.chunks for pinned in made)
        refused = pin(h, session, h.chain_of(session, 1))
        assert refused == Pinned(None, 0, PinStop.TENANT_PINS, 3600)
        assert pin(h, neighbour, h.chain_of(neighbour, 1)).chunks == 1
        unpin(h, session, made[0])
        assert pin(h, session, h.chain_of(session, 1)).chunks == 1


async def test_pins_of_many_chunks_are_bounded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pins_module, "CHUNKS_PER_TENANT", 10)
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        made = [pin(h, session, prefix) for _ in range(3)]
        assert [pinned.chunks for pinned in made] == [4, 4, 2]
        assert made[2].stop is PinStop.TENANT_PINS


async def test_a_tenant_that_pins_everything_leaves_others_their_room(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=20, pin_percent=20) as h:
        h.store.refuse_writes = True
        greedy, other = h.session(space(tenant="greedy")), h.session(space(tenant="other"))
        for seed in range(20):
            prefix = h.chain_of(greedy, 1, seed=seed)
            h.put(greedy, prefix)
            pin(h, greedy, prefix, Terms(math.inf))
        assert len(h.cache.pins.listed(greedy)) == 4
        prefix = h.chain_of(other, 10, seed=1)
        assert h.put(other, prefix) == [WRITE] * 10
        assert held(h, other, prefix) == 10


async def test_all_tenants_together_leave_some_room(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=20, pin_percent=30) as h:
        h.store.refuse_writes = True
        chunks = []
        for name in ("a", "b", "c"):
            session = h.session(space(tenant=name))
            h.put(session, h.chain_of(session, 10))
            chunks.append(pin(h, session, h.chain_of(session, 10)))
        assert [pinned.chunks for pinned in chunks] == [6, 4, 0]
        assert chunks[1].stop is PinStop.ALL_BYTES
        late = h.session(space(tenant="d"))
        assert h.put(late, h.chain_of(late, 2)) == [WRITE] * 2


async def test_pins_are_their_tenants(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        mine, ours = h.session(space(tenant="a")), h.session(space(model="x", tenant="a"))
        theirs = h.session(space(tenant="b"))
        for session in (mine, theirs):
            h.put(session, h.chain_of(session, 2))
        pinned = pin(h, mine, h.chain_of(mine, 2), Terms(60, end_with_session=True))
        h.pin_clock_s[0] += 10
        assert pinned.pin is not None
        [(listed, left_s)] = h.cache.pins.listed(ours)
        assert (listed, left_s, listed.nbytes) == (pinned.pin, 50, 2 * SLOT_BYTES)
        assert h.cache.pins.listed(theirs) == []
        unpin(h, theirs, pinned)
        assert len(h.cache.pins.listed(mine)) == 1
        unpin(h, ours, pinned)
        assert h.cache.pins.listed(mine) == []


# ── when pins end ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("asked_s", "granted_s"),
    [
        (math.nan, 1),
        (-5, 1),
        (0, 1),
        (1, 1),
        (300, 300),
        (10**9, MOST_TTL_S),
        (math.inf, MOST_TTL_S),
    ],
)
async def test_times_to_live_are_clamped_and_counted(
    tmp_path: Path, asked_s: float, granted_s: float
) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        h.put(session, h.chain_of(session, 1))
        assert pin(h, session, h.chain_of(session, 1), Terms(asked_s)).ttl_s == granted_s
        assert h.placement.counters.clamped_hints == (asked_s != granted_s)
        h.pin_clock_s[0] = math.nextafter(granted_s, 0)
        assert len(h.cache.pins.listed(session)) == 1
        h.pin_clock_s[0] = granted_s
        assert h.cache.pins.listed(session) == []


async def test_a_pin_ends_by_its_clock_before_room_is_made_whatever_the_wall_says(
    tmp_path: Path,
) -> None:
    async with harness(tmp_path, slots=20) as h:
        h.store.refuse_writes = True
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        pin(h, session, prefix, Terms(60))
        for wall_s in (10**9, 0.0):  # a jump forward, and one back
            h.clock_s[0] = wall_s
            flood(h, session)
            assert held(h, session, prefix) == 4
        h.pin_clock_s[0] = 60
        flood(h, session)
        assert held(h, session, prefix) == 0
        assert h.placement.counters.pins_expired == 1


async def test_the_first_to_expire_does_not_take_others_with_it(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        h.put(session, h.chain_of(session, 1))
        for ttl_s in (30, 10, 20):
            pin(h, session, h.chain_of(session, 1), Terms(ttl_s))
        for now_s, left in [(9, [21, 1, 11]), (10, [20, 10]), (25, [5]), (31, [])]:
            h.pin_clock_s[0] = now_s
            assert [left_s for _, left_s in h.cache.pins.listed(session)] == left


async def test_a_tick_ends_what_has_expired(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        go, waiting = asyncio.Semaphore(0), asyncio.Semaphore(0)
        now_s = [0.0]

        async def tick() -> None:
            waiting.release()
            await go.acquire()

        pins = Pins(h.placement, 20, lambda: now_s[0], tick)
        session = h.session()
        prefix = h.chain_of(session, 1)
        h.put(session, prefix)
        pins.pin(session, session.branch.nodes[prefix[0]].path(), 1, Terms(5))
        replica = session.branch.nodes[prefix[0]].in_cpu
        assert replica is not None
        pins.start()
        await waiting.acquire()
        for at_s, holds in [(4.0, 1), (5.0, 0)]:
            now_s[0] = at_s
            go.release()
            await waiting.acquire()  # for the next tick: this one was heeded
            assert replica.pins == holds
        await pins.close()
