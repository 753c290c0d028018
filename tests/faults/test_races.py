"""What happens between two awaits of one operation is what another one does there."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.chunks import ChunkKey
from kvtier.config import Config
from kvtier.errors import KvtierError
from kvtier.proto import cache_pb2 as pb
from kvtier.service.answers import KeyState, LoadStop, ReserveOutcome
from kvtier.service.curves import curves_of
from kvtier.service.explain import Explainer
from kvtier.service.servicer import Servicer
from kvtier.spaces import Layout, Space
from kvtier.tiers.base import Outcome, Record, StoreJob
from kvtier.transfer.paths import inline
from tests.core import SLOT_BYTES, Harness, content, harness
from tests.fakes import MemoryStore
from tests.sidecar import HANG_S

WRITE = ReserveOutcome.WRITE
CONTEXT: Any = None  # as in process: the servicer asks nothing of it


class BreakingStore(MemoryStore):
    """Raises what no store should, as often as `breaks` says. `storing` is released by each
    transaction that begins."""

    def __init__(self) -> None:
        super().__init__()
        self.breaks = 0
        self.storing = asyncio.Semaphore(0)

    async def load(self, record: Record, into: memoryview) -> Outcome:
        self._break()
        return await super().load(record, into)

    async def store(self, jobs: list[StoreJob]) -> list[Record | None]:
        self._break()
        self.storing.release()
        return await super().store(jobs)

    def _break(self) -> None:
        if self.breaks:
            self.breaks -= 1
            raise MemoryError("no memory to decode with")


def servicer_of(h: Harness) -> Servicer:
    return Servicer(
        h.cache, Explainer(h.placement.index, h.placement.history, Config()), curves_of(Config())
    )


async def written(h: Harness) -> None:
    """Return once everything is on the disk that can be."""
    assert await h.write_behind.flush(HANG_S)


# ── Eviction meets a copy under way ──


async def test_what_is_evicted_while_it_is_written_to_disk_stays_evicted(tmp_path: Path) -> None:
    store = BreakingStore()
    async with harness(tmp_path, store=store) as h:
        h.store.gate.clear()
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        await store.storing.acquire()
        assert await h.cache.evict(session, [], whole_space=True) == 4
        explainer = Explainer(h.placement.index, h.placement.history, Config())
        told = explainer.explain(session.branch, prefix.keys, b"", [])
        assert {each.state for each in told} == {KeyState.EVICTED}
        h.store.gate.set()
        await written(h)
        assert h.cache.lookup(session, prefix.keys) == (0, 0)
        assert h.store.chunks == {}
        assert h.placement.memory.arena.used_bytes == 0


async def test_what_is_evicted_while_it_is_promoted_stays_evicted(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        await written(h)
        h.only_on_disk()
        h.store.gate.clear()
        load = asyncio.create_task(h.get(session, prefix))
        await h.store.loading.acquire()
        assert await h.cache.evict(session, prefix.keys[:1], whole_space=False) == 4
        h.store.gate.set()
        came, stop, lease = await load
        assert (came, stop) == (0, LoadStop.MISS)
        session.leases.end(lease)
        assert h.cache.lookup(session, prefix.keys) == (0, 0)
        assert h.placement.memory.arena.used_bytes == 0
        assert h.store.chunks == {}


async def test_what_is_evicted_while_it_is_read_keeps_its_bytes(tmp_path: Path) -> None:
    """The reader's slots are not reused before its lease ends, whoever wants room."""
    async with harness(tmp_path, slots=8) as h:
        session, other = h.session(), h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        _, _, lease = await h.get(session, prefix)
        await h.cache.evict(other, [], whole_space=True)
        later = h.chain_of(other, 8, seed=1)
        assert h.put(other, later) == [WRITE] * 4 + [ReserveOutcome.NO_ROOM] * 4
        for index, replica in lease.replicas.items():
            assert bytes(h.placement.memory.view(replica.slot)) == content(prefix[index])
        session.leases.end(lease)
        assert h.put(other, later)[4:] == [WRITE] * 4


async def test_a_prefetch_that_evicts_what_it_was_to_bring_next_just_stops(
    tmp_path: Path,
) -> None:
    """The prompt's first half is on disk, its second half in RAM alone, and RAM is full."""
    async with harness(tmp_path, slots=8) as h:
        session = h.session()
        prefix = h.chain_of(session, 8)
        h.put(session, prefix[:4])
        await written(h)
        h.only_on_disk()
        h.store.refuse_writes = True
        h.put(session, prefix[4:])
        h.put(session, h.chain_of(session, 4, seed=1))
        session_reads = await h.get(session, h.chain_of(session, 4, seed=1))
        in_ram, promoting = await h.cache.prefetch(session, prefix.keys)
        assert in_ram + promoting < 8
        session.leases.end(session_reads[2])
        h.placement.index.check()


async def test_a_chunk_stored_again_while_its_old_copy_is_read(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 2)
        h.put(session, prefix)
        _, _, lease = await h.get(session, prefix)
        old = {replica.slot.offset for replica in lease.replicas.values()}
        await h.cache.evict(session, [], whole_space=True)
        assert h.put(session, prefix) == [WRITE] * 2
        _, _, second = await h.get(session, prefix)
        assert old.isdisjoint(replica.slot.offset for replica in second.replicas.values())
        session.leases.end(lease)
        session.leases.end(second)
        assert h.cache.lookup(session, prefix.keys) == (2, 2)


# ── A session ends in the middle of a call ──


def large_space() -> Space:
    """Chunks of two and a half messages."""
    return Space("large", Layout("int8", 40, 1, 65536, tokens=1, planes=1))


async def test_a_get_stops_when_its_session_ends_and_sends_nothing_of_others(
    tmp_path: Path,
) -> None:
    async with harness(tmp_path, slots=640) as h:
        servicer, session = servicer_of(h), h.session(large_space())
        key = ChunkKey(b"k" * 32)
        [answer] = h.cache.reserve(session, 1, [key], session.branch.digest)
        assert answer.slot is not None
        h.placement.memory.view(answer.slot)[:] = b"k" * answer.slot.nbytes
        h.cache.commit(session, 1, [0])
        call = servicer.Get(pb.GetRequest(session_id=session.id, keys=key), CONTEXT)
        first = pb.GetResponse.FromString(inline.write_get(await anext(call)))
        assert set(first.piece.data) == {ord("k")}
        h.cache.end_session(session)
        await h.cache.evict(session, [], whole_space=True)
        h.placement.memory.region.view[:] = bytes(h.placement.memory.region.nbytes)
        with pytest.raises(KvtierError):
            await anext(call)
        assert h.placement.memory.arena.used_bytes == 0


async def test_a_put_stops_when_its_session_ends(tmp_path: Path) -> None:
    """From then on the slots may be another client's: not one byte more may be written."""
    async with harness(tmp_path, slots=8) as h:
        servicer, session, other = servicer_of(h), h.session(), h.session()
        prefix, theirs = h.chain_of(session, 2), h.chain_of(session, 2, seed=1)
        h.cache.reserve(session, 7, prefix.keys, prefix.parent)
        sent: asyncio.Queue[pb.PutRequest] = asyncio.Queue()

        async def messages() -> AsyncIterator[pb.PutRequest]:
            while True:
                yield await sent.get()
                sent.task_done()

        put = asyncio.create_task(servicer.Put(messages(), CONTEXT))
        half = pb.ChunkPiece(index=0, data=b"x" * (SLOT_BYTES // 2))
        sent.put_nowait(pb.PutRequest(header=pb.PutHeader(session_id=session.id, lease_id=7)))
        sent.put_nowait(pb.PutRequest(piece=half))
        await sent.join()
        h.cache.end_session(session)
        assert h.put(other, theirs) == [WRITE] * 2
        sent.put_nowait(pb.PutRequest(piece=half))
        with pytest.raises(KvtierError):
            await put
        assert (await h.get(other, theirs))[0] == 2
        assert h.cache.lookup(other, prefix.keys) == (0, 0)


async def test_a_session_that_ends_during_promotions_leaves_nothing_leased(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=8) as h:
        session, other = h.session(), h.session()
        prefix = h.chain_of(session, 6)
        h.put(session, prefix)
        await written(h)
        h.only_on_disk()
        h.store.gate.clear()
        load = asyncio.create_task(h.get(session, prefix))
        await h.store.loading.acquire()
        h.cache.end_session(session)
        h.store.gate.set()
        came, stop, _ = await load
        assert (came, stop) == (0, LoadStop.RELEASED)
        await asyncio.gather(*(ended.outcome for ended in h.promotions._live.values()))
        h.only_on_disk()
        assert h.placement.memory.arena.used_bytes == 0
        assert (await h.get(other, prefix))[0] == 6


# ── A tier breaks in the middle of an operation ──


async def test_a_read_that_raises_is_a_miss_and_the_next_one_works(tmp_path: Path) -> None:
    store = BreakingStore()
    async with harness(tmp_path, store=store) as h:
        session = h.session()
        prefix = h.chain_of(session, 10)
        h.put(session, prefix)
        await written(h)
        h.only_on_disk()
        store.breaks = 5  # more than there are lanes
        came, stop, lease = await asyncio.wait_for(h.get(session, prefix), HANG_S)
        session.leases.end(lease)
        assert (came, stop) == (0, LoadStop.FAILED)
        assert (await asyncio.wait_for(h.get(session, prefix), HANG_S))[0] == 10


async def test_a_write_that_raises_is_a_skipped_chunk_and_the_next_one_works(
    tmp_path: Path,
) -> None:
    store = BreakingStore()
    async with harness(tmp_path, store=store) as h:
        session = h.session()
        store.breaks = 1
        h.put(session, h.chain_of(session, 2))
        await written(h)
        h.put(session, h.chain_of(session, 2, seed=1))
        await written(h)
        assert {key for _, (record, _) in store.chunks.items() for key in [record.key]} == {
            *h.chain_of(session, 2, seed=1)
        }
        assert h.placement.counters.disk_skipped_chunks == 2
        assert h.cache.lookup(session, h.chain_of(session, 2).keys) == (2, 2)
