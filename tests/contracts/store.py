"""What every store keeps."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvtier.chunks import ChunkKey
from kvtier.spaces import Layout, Space
from kvtier.tiers.base import ChunkMeta, Outcome, Record, Store, StoreJob

SPACE = Space("model", Layout(dtype="bfloat16", layers=2, heads=3, head_dim=64, tokens=256))
SMALL = Space("model", Layout(dtype="uint8", layers=1, heads=1, head_dim=1, tokens=1, planes=1))

Content = Callable[[int, Space], bytes]


def job_of(number: int, source: bytes, space: Space = SPACE) -> StoreJob:
    """A job for the chunk of that number; its parent is the one before."""
    parent = ChunkKey(number.to_bytes(32, "big")) if number else ChunkKey(space.digest)
    key = ChunkKey((number + 1).to_bytes(32, "big"))
    return StoreJob(ChunkMeta(key, parent, space, 1_000.5 + number), memoryview(source))


def pattern(number: int, space: Space = SPACE) -> bytes:
    """Bytes that differ between chunks."""
    return bytes((number * 31 + step) % 251 for step in range(997)) * (
        space.layout.nbytes // 997
    ) + bytes(space.layout.nbytes % 997)


async def read(store: Store, record: Record, nbytes: int) -> tuple[Outcome, bytes]:
    target = bytearray(nbytes)
    outcome = await store.load(record, memoryview(target))
    return outcome, bytes(target)


class StoreContract:
    """Subclass it and open the store. Chunks of `SPACE` must fit a few times."""

    async def open(self, directory: Path) -> Store:
        raise NotImplementedError

    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[Store]:
        store = await self.open(tmp_path / "store")
        yield store
        await store.close()

    async def test_what_was_stored_is_loaded(self, store: Store) -> None:
        jobs = [job_of(number, pattern(number)) for number in range(4)]
        records = await store.store(jobs)
        for job, record in zip(jobs, records, strict=True):
            assert record is not None
            assert await read(store, record, job.source.nbytes) == (Outcome.HIT, job.source)

    async def test_a_record_says_what_was_stored(self, store: Store) -> None:
        job = job_of(3, pattern(3))
        [record] = await store.store([job])
        assert record is not None
        assert (record.key, record.parent) == (job.meta.key, job.meta.parent)
        assert (record.space, record.created_s) == (SPACE.digest, job.meta.created_s)
        assert record in store.records()
        assert store.spaces()[SPACE.digest] == SPACE

    async def test_a_chunk_of_one_byte(self, store: Store) -> None:
        [record] = await store.store([job_of(0, b"x", SMALL)])
        assert record is not None
        assert await read(store, record, 1) == (Outcome.HIT, b"x")

    async def test_capacity_is_accounted(self, store: Store) -> None:
        before = store.used_bytes
        jobs = [job_of(number, pattern(number)) for number in range(3)]
        records = await store.store(jobs)
        taken = [record.stored_bytes for record in records if record]
        assert store.used_bytes == before + sum(taken)
        assert all(0 < each <= store.worst_bytes(SPACE.layout.nbytes) for each in taken)
        for record in records:
            assert record is not None
            store.delete(record)
        assert store.used_bytes == before
        assert store.used_bytes <= store.capacity_bytes

    async def test_what_is_being_stored_is_accounted(self, store: Store) -> None:
        writing = asyncio.create_task(store.store([job_of(0, pattern(0))]))
        await asyncio.sleep(0)
        assert store.used_bytes >= SPACE.layout.nbytes or writing.done()
        await writing

    async def test_a_deleted_chunk_is_a_miss_at_once_and_after_a_flush(self, store: Store) -> None:
        first, second = await store.store([job_of(0, pattern(0)), job_of(1, pattern(1))])
        assert first is not None
        assert second is not None
        store.delete(first)
        assert (await read(store, first, SPACE.layout.nbytes))[0] is Outcome.MISS
        await store.flush()
        assert (await read(store, first, SPACE.layout.nbytes))[0] is Outcome.MISS
        assert await read(store, second, SPACE.layout.nbytes) == (Outcome.HIT, pattern(1))
        assert store.records() == [second]

    async def test_deleting_twice_is_deleting_once(self, store: Store) -> None:
        [record] = await store.store([job_of(0, pattern(0))])
        assert record is not None
        store.delete(record)
        store.delete(record)
        await store.flush()
        store.delete(record)
        assert store.used_bytes == 0
        assert store.records() == []

    async def test_an_id_is_never_reused(self, store: Store) -> None:
        seen = set()
        for _ in range(5):
            [record] = await store.store([job_of(0, pattern(0))])
            assert record is not None
            assert record.id not in seen
            seen.add(record.id)
            store.delete(record)

    async def test_one_key_may_be_stored_twice(self, store: Store) -> None:
        first, second = await store.store([job_of(0, pattern(0)), job_of(0, pattern(0))])
        assert first is not None
        assert second is not None
        store.delete(first)
        assert await read(store, second, SPACE.layout.nbytes) == (Outcome.HIT, pattern(0))

    async def test_loads_stores_and_deletes_run_side_by_side(self, store: Store) -> None:
        kept = [r for r in await store.store([job_of(n, pattern(n)) for n in range(3)]) if r]
        doomed = [r for r in await store.store([job_of(n, pattern(n)) for n in range(3, 6)]) if r]
        loads = [read(store, record, SPACE.layout.nbytes) for record in kept * 3]
        stores = [store.store([job_of(n, pattern(n))]) for n in range(6, 9)]
        pending = asyncio.gather(asyncio.gather(*loads), asyncio.gather(*stores))
        for record in doomed:
            store.delete(record)
        loaded, stored = await pending
        assert loaded == [(Outcome.HIT, pattern(n)) for n in range(3)] * 3
        assert all(record for batch in stored for record in batch)
        assert {r.id for r in store.records()}.isdisjoint(r.id for r in doomed)

    async def test_nothing_is_stored_from_no_jobs(self, store: Store) -> None:
        assert await store.store([]) == []

    async def test_an_unknown_record_is_a_miss(self, store: Store) -> None:
        [record] = await store.store([job_of(0, pattern(0))])
        assert record is not None
        stranger = replace(record, id=record.id + 1_000)
        assert (await read(store, stranger, SPACE.layout.nbytes))[0] is Outcome.MISS
        store.delete(stranger)
        assert store.records() == [record]

    async def test_closing_twice_is_closing_once(self, store: Store) -> None:
        await store.close()
        await store.close()
