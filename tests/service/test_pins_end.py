"""What ends a pin, and what wins over one."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.config import Config
from kvtier.proto import cache_pb2 as pb
from kvtier.service import pins as pins_module
from kvtier.service.answers import LoadStop, ReserveOutcome
from kvtier.service.curves import curves_of
from kvtier.service.demotion import Demotion, When, Writing
from kvtier.service.explain import Explainer
from kvtier.service.pins import MOST_TTL_S, Pin, Pins, Terms
from kvtier.service.servicer import Servicer
from kvtier.tiers.base import Outcome
from kvtier.tiers.tree import TierId
from tests.core import SLOT_BYTES, harness
from tests.service.test_pins import flood, held, pin, unpin

WRITE = ReserveOutcome.WRITE


async def test_only_pins_made_so_end_with_their_session(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session, other = h.session(), h.session()
        h.put(session, h.chain_of(session, 1))
        pin(h, session, h.chain_of(session, 1), Terms(60, end_with_session=True))
        lasting = pin(h, session, h.chain_of(session, 1), Terms(60))
        others = pin(h, other, h.chain_of(other, 1), Terms(60, end_with_session=True))
        h.cache.end_session(session)
        listed = [each for each, _ in h.cache.pins.listed(other)]
        assert listed == [lasting.pin, others.pin]


async def test_at_a_stop_all_pins_end(tmp_path: Path) -> None:
    async with harness(tmp_path, writing=Writing(When.DEMOTE)) as h:
        session = h.session()
        h.put(session, h.chain_of(session, 3))
        pin(h, session, h.chain_of(session, 3))
        await h.cache.pins.close()
        assert h.cache.pins.listed(session) == []
        Demotion(h.placement, Writing(When.DEMOTE), h.write_behind).stopping()
        assert await h.write_behind.flush(60.0)
        assert h.placement.index.chunks[TierId.DISK] == 3, "and what they kept is written"


# ── many at once ──────────────────────────────────────────────────────────────────────────────────


async def test_what_has_expired_is_listed_no_more_though_it_is_ended_bit_by_bit(
    tmp_path: Path,
) -> None:
    async with harness(tmp_path) as h:
        session, pins = h.session(), h.cache.pins
        prefix = h.chain_of(session, 6)
        h.put(session, prefix)
        [last] = [session.branch.nodes[key].in_cpu for key in prefix[5:]]
        assert last is not None
        early, late = (pin(h, session, prefix, Terms(ttl_s)) for ttl_s in (10, 20))
        h.pin_clock_s[0] = 10
        assert pins.expire(steps=4), "there is more"
        assert last.pins == 1
        unpin(h, session, early)  # it knows no such pin, or ends the rest of it
        assert [each for each, _ in pins.listed(session)] == [late.pin]
        assert not pins.expire()
        assert [node.in_cpu.pins for node in session.branch.nodes if node.in_cpu] == [1] * 6


async def test_a_session_with_many_pins_ends_them_in_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pins.expire, "__defaults__", (5,))
    async with harness(tmp_path) as h:
        session, other = h.session(), h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        for _ in range(10):
            pin(h, session, prefix, Terms(60, end_with_session=True))
        lasting = pin(h, session, prefix[:1], Terms(60))
        h.cache.end_session(session)
        assert [each for each, _ in h.cache.pins.listed(other)] == [lasting.pin]
        await h.cache.pins.end_expired()
        pinned = [replica.pins for node in session.branch.nodes if (replica := node.in_cpu)]
        assert sorted(pinned) == [0, 0, 0, 1]
        assert h.placement.counters.pins_expired == 0, "they were ended before their time"


async def test_who_pins_after_many_have_expired_has_all_that_they_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pins.expire, "__defaults__", (1,))
    async with harness(tmp_path, slots=20) as h:
        explainer = Explainer(h.placement.index, h.placement.history, Config())
        servicer = Servicer(h.cache, explainer, curves_of(Config()))
        session = h.session()
        first, second = h.chain_of(session, 4, seed=1), h.chain_of(session, 4, seed=2)
        for prefix in (first, second):
            h.put(session, prefix)
        assert [pin(h, session, first, Terms(10)).chunks for _ in range(9)] == [4] * 9
        h.pin_clock_s[0] = 10
        request = pb.PinRequest(session_id=session.id, keys=b"".join(second.keys), ttl_s=60)
        context: Any = None  # as in process: the servicer asks nothing of it
        assert (await servicer.Pin(request, context)).chunks == 4


async def test_pins_that_come_and_go_leave_nothing_behind(tmp_path: Path) -> None:
    """A pin of a week that is ended at once is not remembered for a week."""
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 1)
        h.put(session, prefix)
        staying = pin(h, session, prefix, Terms(100))
        for _ in range(3 * pins_module._MOST_STALE):
            unpin(h, session, pin(h, session, prefix, Terms(MOST_TTL_S)))
            assert len(h.cache.pins._due) <= pins_module._MOST_STALE + 2
        assert [each for each, _ in h.cache.pins.listed(session)] == [staying.pin]
        h.pin_clock_s[0] = 100
        assert h.cache.pins.listed(session) == []
        assert h.placement.counters.pins_expired == 1


doings = st.lists(
    st.one_of(
        st.tuples(st.just("pin"), st.integers(1, 9), st.booleans()),
        st.tuples(st.just("unpin"), st.integers(0, 9), st.just(False)),
        st.tuples(st.just("wait"), st.integers(0, 4), st.just(False)),
        st.tuples(st.just("expire"), st.integers(1, 9), st.just(False)),
        st.tuples(st.just("leave"), st.just(0), st.just(False)),
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(doings=doings)
def test_whatever_ends_pins_and_however_slowly_each_ends_once(
    tmp_path_factory: pytest.TempPathFactory, doings: list[tuple[str, int, bool]]
) -> None:
    async def play() -> None:
        async with harness(tmp_path_factory.mktemp("pins"), pin_percent=50) as h:
            session, pins = h.session(), h.cache.pins
            prefix = h.chain_of(session, 4)
            h.put(session, prefix)
            kept: list[Pin] = []
            for name, number, flag in doings:
                if name == "pin":
                    terms = Terms(number, end_with_session=flag)
                    made = h.cache.pin(session, prefix.keys[: 1 + number % 4], terms).pin
                    kept += [made] if made is not None else []
                elif name == "unpin" and kept:
                    pins.unpin(session, kept.pop(number % len(kept)).id)
                elif name == "wait":
                    h.pin_clock_s[0] += number
                elif name == "expire":
                    pins.expire(number)
                elif name == "leave":
                    h.cache.end_session(session)
                    kept = [each for each in kept if each.session is not session]
                    session = h.session()
                kept = [each for each in kept if each.until_s > h.pin_clock_s[0]]
                assert [each for each, _ in pins.listed(session)] == kept
            h.pin_clock_s[0] += 10
            await pins.end_expired()
            assert not pins._tenants
            assert not pins._on
            assert not pins._due
            assert pins._stale == 0
            assert not any(node.in_cpu.pins for node in session.branch.nodes if node.in_cpu)

    asyncio.run(play())


# ── what wins over a pin ──────────────────────────────────────────────────────────────────────────


async def test_what_a_client_evicts_frees_its_memory_at_once(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=20) as h:
        h.store.refuse_writes = True
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        pinned = pin(h, session, prefix)
        assert await h.cache.evict(session, prefix[2:].keys, whole_space=False) == 2
        assert h.placement.memory.arena.used_bytes == 2 * SLOT_BYTES
        [(listed, _)] = h.cache.pins.listed(session)
        assert (listed, len(listed.replicas)) == (pinned.pin, 2)
        await h.cache.evict(session, [], whole_space=True)
        assert h.placement.memory.arena.used_bytes == 0
        assert h.cache.pins.listed(session) == []
        unpin(h, session, pinned)
        h.put(session, prefix)  # and its room counts no more
        assert pin(h, session, prefix).chunks == 4


async def test_what_is_evicted_while_it_is_pinned_and_read_ends_with_the_read(
    tmp_path: Path,
) -> None:
    async with harness(tmp_path) as h:
        h.store.refuse_writes = True
        session = h.session()
        prefix = h.chain_of(session, 2)
        h.put(session, prefix)
        pin(h, session, prefix)
        _, _, lease = await h.get(session, prefix)
        await h.cache.evict(session, prefix.keys, whole_space=False)
        assert h.cache.pins.listed(session) == []
        assert h.placement.memory.arena.used_bytes == 2 * SLOT_BYTES
        h.cache.release(session, lease.id)
        assert h.placement.memory.arena.used_bytes == 0


async def test_age_wins_over_a_pin(tmp_path: Path) -> None:
    async with harness(tmp_path, ttl_s=100) as h:
        h.store.refuse_writes = True
        session = h.session()
        prefix = h.chain_of(session, 2)
        h.put(session, prefix)
        pin(h, session, prefix)
        h.clock_s[0] += 101
        assert held(h, session, prefix) == 0
        assert h.placement.memory.arena.used_bytes == 0
        assert h.cache.pins.listed(session) == []


async def test_a_corrupt_chunk_is_removed_though_it_is_pinned(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 3)
        h.put(session, prefix)
        assert await h.write_behind.flush(10)
        h.only_on_disk()
        pin(h, session, prefix)
        h.store.outcomes[prefix[1]] = Outcome.CORRUPT
        came, stop, _ = await h.get(session, prefix)
        assert (came, stop) == (1, LoadStop.CORRUPT)
        assert len(h.store.chunks) == 1, "what continued it went as well"
        [(listed, _)] = h.cache.pins.listed(session)
        assert len(listed.replicas) == 1


# ── loads beside it ───────────────────────────────────────────────────────────────────────────────


async def test_a_load_outlives_the_pin_and_the_pressure_under_it(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=20) as h:
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        assert await h.write_behind.flush(10)
        h.only_on_disk()
        pinned = pin(h, session, prefix)
        h.store.gate.clear()
        loading = asyncio.ensure_future(h.get(session, prefix))
        await h.store.loading.acquire()
        unpin(h, session, pinned)
        h.store.capacity_bytes = 4 * SLOT_BYTES  # so that disk, too, would give them up
        flood(h, session, 40)
        h.store.gate.set()
        came, stop, _ = await loading  # every byte is compared
        assert (came, stop) == (4, LoadStop.COMPLETE)
