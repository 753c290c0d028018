"""What each request means, over a fake store."""

import asyncio
from pathlib import Path

import pytest

from kvtier.errors import InvalidRequest, LimitReached, SessionEnded
from kvtier.sections import Limits
from kvtier.service.answers import CommitOutcome, LoadStop, ReserveOutcome
from kvtier.service.leases import Mode
from kvtier.spaces import Layout, Space
from kvtier.tiers.base import Outcome
from kvtier.tiers.tree import TierId
from tests.core import SLOT_BYTES, harness, space
from tests.fakes import MemoryStore

WRITE, EXISTS = ReserveOutcome.WRITE, ReserveOutcome.EXISTS


async def test_what_is_committed_is_held_and_nothing_else(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 4)
        lease_id, outcomes = h.reserve(session, prefix)
        assert outcomes == [WRITE] * 4
        assert h.cache.lookup(session, prefix.keys) == (0, 0)
        assert h.cache.commit(session, lease_id, [0, 1, 3]) == [
            CommitOutcome.STORED,
            CommitOutcome.STORED,
            CommitOutcome.PARENT_MISSING,
        ]
        assert h.cache.lookup(session, prefix.keys) == (2, 2)
        came, stop, _ = await h.get(session, prefix)
        assert (came, stop) == (2, LoadStop.MISS)


async def test_nothing_is_sent_twice(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        first, second = h.session(), h.session()
        prefix = h.chain_of(first, 3)
        h.put(first, prefix[:2])
        assert h.put(second, prefix) == [EXISTS, EXISTS, WRITE]


async def test_one_of_two_writers_writes(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        first, second = h.session(), h.session()
        prefix = h.chain_of(first, 2)
        _, granted = h.reserve(first, prefix)
        _, refused = h.reserve(second, prefix)
        assert granted == [WRITE, WRITE]
        assert refused == [ReserveOutcome.BEING_WRITTEN] * 2
        h.cache.end_session(first)
        assert h.put(second, prefix) == [WRITE, WRITE]


async def test_a_chunk_without_its_parent_is_refused(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 3)
        assert h.put(session, prefix[1:]) == [ReserveOutcome.PARENT_MISSING] * 2
        assert h.put(session, prefix[:1]) == [WRITE]
        assert h.put(session, prefix[1:]) == [WRITE, WRITE]
        assert h.placement.counters.refused_parent_missing == 2


async def test_a_dead_writers_chunks_are_discarded(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=4) as h:
        session = h.session()
        h.reserve(session, h.chain_of(session, 4))
        h.cache.end_session(session)
        assert h.placement.memory.arena.used_bytes == 0
        assert h.placement.counters.aborted_chunks == 4
        with pytest.raises(SessionEnded):
            h.cache.sessions.get(session.id)


async def test_room_is_made_inside_reserve_oldest_first(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=8) as h:
        h.store.refuse_writes = True
        session = h.session()
        old, new = h.chain_of(session, 8, seed=1), h.chain_of(session, 6, seed=2)
        h.put(session, old)
        assert h.put(session, new) == [WRITE] * 6
        assert h.cache.lookup(session, new.keys) == (6, 6)
        assert h.cache.lookup(session, old.keys) == (2, 2), "leaves go first"


async def test_a_prefix_longer_than_ram_keeps_its_head_and_says_so(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=8) as h:
        session = h.session()
        outcomes = h.put(session, h.chain_of(session, 12))
        assert (
            outcomes
            == [WRITE] * 8 + [ReserveOutcome.LEASE_LIMIT] + [ReserveOutcome.PARENT_MISSING] * 3
        )


async def test_leased_slots_are_never_taken(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=4) as h:
        session = h.session()
        read, other = h.chain_of(session, 4, seed=1), h.chain_of(session, 2, seed=2)
        h.put(session, read)
        _, _, lease = await h.get(session, read)
        assert h.put(session, other)[0] is ReserveOutcome.NO_ROOM
        h.cache.release(session, lease.id)
        assert h.put(session, other) == [WRITE, WRITE]


async def test_a_session_may_not_reserve_more_than_its_share(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=8, session_lease_percent=50) as h:
        session = h.session()
        lease_id, outcomes = h.reserve(session, h.chain_of(session, 6))
        assert outcomes[:4] == [WRITE] * 4
        assert outcomes[4] is ReserveOutcome.LEASE_LIMIT
        h.cache.abort(session, lease_id)
        assert h.put(session, h.chain_of(session, 4)) == [WRITE] * 4


async def test_a_load_brings_disk_chunks_in_order_and_leases_them(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 6)
        h.put(session, prefix)
        assert await h.write_behind.flush(10)
        h.only_on_disk()
        assert h.cache.lookup(session, prefix.keys) == (6, 0)
        came, stop, lease = await h.get(session, prefix)
        assert (came, stop) == (6, LoadStop.COMPLETE)
        assert h.cache.lookup(session, prefix.keys) == (6, 6)
        assert all(replica.pins == 1 for replica in lease.replicas.values())
        assert h.placement.counters.load_disk_hits == 6


async def test_two_loads_of_one_chunk_share_one_read(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 1)
        h.put(session, prefix)
        await h.write_behind.flush(10)
        h.only_on_disk()
        h.store.gate.clear()
        both = [asyncio.create_task(h.get(session, prefix)) for _ in range(2)]
        await h.store.loading.acquire()
        h.store.gate.set()
        assert [(came, stop) for came, stop, _ in await asyncio.gather(*both)] == [
            (1, LoadStop.COMPLETE)
        ] * 2
        assert len(h.store.loads) == 1


async def test_at_the_deadline_a_load_ends_with_what_has_landed(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 5)
        h.put(session, prefix)
        await h.write_behind.flush(10)
        h.only_on_disk()
        await h.get(session, prefix[:2])
        h.store.gate.clear()
        came, stop, _ = await h.get(session, prefix, deadline_s=0.02)
        assert (came, stop) == (2, LoadStop.DEADLINE)
        h.store.gate.set()
        came, stop, _ = await h.get(session, prefix)
        assert (came, stop) == (5, LoadStop.COMPLETE)


async def test_a_corrupt_chunk_is_a_miss_and_goes_with_all_that_continues_it(
    tmp_path: Path,
) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        await h.write_behind.flush(10)
        h.only_on_disk()
        h.store.outcomes[prefix.keys[1]] = Outcome.CORRUPT
        came, stop, lease = await h.get(session, prefix)
        assert (came, stop) == (1, LoadStop.CORRUPT)
        h.cache.release(session, lease.id)
        assert h.cache.lookup(session, prefix.keys) == (1, 1)
        assert len(h.store.chunks) == 1
        h.store.outcomes.clear()
        assert h.put(session, prefix) == [EXISTS, WRITE, WRITE, WRITE]


async def test_a_disk_that_fails_loses_nothing(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 2)
        h.put(session, prefix)
        await h.write_behind.flush(10)
        h.only_on_disk()
        h.store.outcomes[prefix.keys[0]] = Outcome.FAILED
        assert (await h.get(session, prefix))[:2] == (0, LoadStop.FAILED)
        h.store.outcomes.clear()
        assert (await h.get(session, prefix))[:2] == (2, LoadStop.COMPLETE)


async def test_promotion_without_room_gives_a_shorter_prefix(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=4) as h:
        session = h.session()
        long, short = h.chain_of(session, 4, seed=1), h.chain_of(session, 2, seed=2)
        h.put(session, long)
        await h.write_behind.flush(10)
        h.only_on_disk()
        h.put(session, short)
        await h.get(session, short)  # leased: two of four slots cannot go
        came, stop, _ = await h.get(session, long)
        assert (came, stop) == (2, LoadStop.NO_ROOM)


async def test_releasing_during_a_load_ends_it(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 2)
        h.put(session, prefix)
        await h.write_behind.flush(10)
        h.only_on_disk()
        h.store.gate.clear()
        lease = h.cache.open_read(session, 77)
        chunks, loading = h.cache.load(session, lease, prefix.keys, None)
        waiting = asyncio.ensure_future(anext(chunks))
        await h.store.loading.acquire()
        h.cache.release(session, 77)
        h.store.gate.set()
        with pytest.raises(StopAsyncIteration):
            await waiting
        assert loading.stop is LoadStop.RELEASED
        index = h.placement.index
        assert all(r.pins == 0 for n in session.branch.nodes for r in n.replicas if r)
        index.check()


async def test_a_load_that_is_cancelled_leaves_its_lease_to_its_owner(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 3)
        h.put(session, prefix)
        await h.write_behind.flush(10)
        h.only_on_disk()
        await h.get(session, prefix[:1])
        h.store.gate.clear()
        lease = h.cache.open_read(session, 77)
        chunks, _ = h.cache.load(session, lease, prefix.keys, None)
        await anext(chunks)
        waiting = asyncio.ensure_future(anext(chunks))
        await h.store.loading.acquire()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert not lease.ended, "the client may still be copying"
        assert lease.replicas[0].pins == 2
        h.store.gate.set()
        h.cache.release(session, 77)


async def test_prefetch_brings_chunks_without_a_lease(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 3)
        h.put(session, prefix)
        await h.write_behind.flush(10)
        h.only_on_disk()
        await h.get(session, prefix[:1])
        assert await h.cache.prefetch(session, prefix.keys) == (1, 2)
        came, _, _ = await h.get(session, prefix)
        assert came == 3


async def test_old_chunks_expire_with_all_that_continues_them(tmp_path: Path) -> None:
    async with harness(tmp_path, ttl_s=60.0) as h:
        session = h.session()
        prefix = h.chain_of(session, 3)
        h.put(session, prefix[:1])
        h.clock_s[0] += 50
        h.put(session, prefix)
        assert h.cache.lookup(session, prefix.keys)[0] == 3
        h.clock_s[0] += 11
        assert h.cache.lookup(session, prefix.keys)[0] == 0
        assert h.placement.counters.expired_chunks == 3
        assert h.put(session, prefix) == [WRITE] * 3


async def test_memory_moves_between_layouts(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=64) as h:
        h.store.refuse_writes = True
        small = h.session()
        for seed in range(8):
            h.put(small, h.chain_of(small, 8, seed=seed))
        assert h.placement.memory.arena.used_bytes == 64 * SLOT_BYTES
        layout = Layout("int8", 8, 2, 64, tokens=4, planes=2)
        large = h.session(Space("large", layout))
        prefix = h.chain_of(large, 4)
        lease_id = 1000
        answers = h.cache.reserve(large, lease_id, prefix.keys, prefix.parent)
        assert [answer.outcome for answer in answers] == [WRITE] * 4
        held = h.placement.index.chunks[TierId.CPU]
        assert held >= 64 - 4 * 2 - 2, "no more went than the room asked for, and a slab's rest"


async def test_a_disk_that_refuses_is_a_skipped_write(tmp_path: Path) -> None:
    async with harness(tmp_path, store=MemoryStore(refuse_writes=True)) as h:
        session = h.session()
        prefix = h.chain_of(session, 3)
        h.put(session, prefix)
        assert await h.write_behind.flush(10)
        assert h.cache.lookup(session, prefix.keys) == (3, 3)
        assert h.placement.counters.disk_skipped_chunks == 3


async def test_disk_stays_inside_its_capacity(tmp_path: Path) -> None:
    async with harness(tmp_path, store=MemoryStore(capacity_bytes=5 * SLOT_BYTES)) as h:
        session = h.session()
        for seed in range(4):
            h.put(session, h.chain_of(session, 3, seed=seed))
            assert await h.write_behind.flush(10)
            assert h.store.used_bytes <= 5 * SLOT_BYTES
        h.only_on_disk()
        newest = h.chain_of(session, 3, seed=3)
        assert h.cache.lookup(session, newest.keys)[0] == 3


async def test_writes_are_grouped(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        h.store.gate.clear()
        session = h.session()
        for seed in range(5):
            h.put(session, h.chain_of(session, 4, seed=seed))
        h.store.gate.set()
        await h.write_behind.flush(10)
        assert sum(h.store.transactions) == 20
        assert len(h.store.transactions) < 20


async def test_evict_removes_chunks_and_what_continues_them(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        assert await h.cache.evict(session, [prefix.keys[2]], whole_space=False) == 2
        assert h.cache.lookup(session, prefix.keys)[0] == 2
        assert await h.cache.evict(session, [], whole_space=True) == 2


async def test_limits_are_kept(tmp_path: Path) -> None:
    limits = Limits(sessions=2, spaces=2, session_lease_percent=100)
    async with harness(tmp_path, limits=limits) as h:
        first = h.session(space(model="a"))
        h.session(space(model="b"))
        with pytest.raises(LimitReached, match=r"limits\.sessions"):
            h.session(space(model="a"))
        h.put(first, h.chain_of(first, 1))
        h.cache.end_session(first)
        with pytest.raises(LimitReached, match=r"limits\.spaces"):
            h.session(space(model="c"))
        with pytest.raises(InvalidRequest, match=r"space\.layout"):
            h.session(Space("huge", Layout("int8", 4096, 64, 64, tokens=4)))


async def test_lease_ids_are_the_clients_and_are_checked(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session, stranger = h.session(), h.session()
        prefix = h.chain_of(session, 2)
        lease_id, _ = h.reserve(session, prefix)
        with pytest.raises(InvalidRequest, match="lease_id"):
            h.cache.reserve(session, lease_id, prefix.keys, prefix.parent)
        assert h.cache.commit(stranger, lease_id, [0]) == [CommitOutcome.NOT_RESERVED]
        h.cache.abort(stranger, lease_id)
        h.cache.release(session, lease_id)  # a write lease cannot be released
        assert h.cache.write_lease(session, lease_id) is not None
        assert h.cache.commit(session, lease_id, [0, 0, 9]) == [
            CommitOutcome.STORED,
            CommitOutcome.NOT_RESERVED,
            CommitOutcome.NOT_RESERVED,
        ]
        assert session.leases.find(lease_id, Mode.WRITE) is None
