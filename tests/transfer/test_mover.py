"""Order, joining, cancelling and stopping of loads."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvtier.chunks import ChunkKey
from kvtier.spaces import Layout, Space
from kvtier.tiers.base import ChunkMeta, Outcome, Record, StoreJob
from kvtier.transfer.mover import Mover, Priority
from tests.fakes import MemoryStore

SPACE = Space("m", Layout("int8", 1, 1, 8, tokens=1, planes=1))


def job(number: int) -> StoreJob:
    key = ChunkKey(number.to_bytes(32, "big"))
    meta = ChunkMeta(key, ChunkKey(SPACE.digest), SPACE, 1.0)
    return StoreJob(meta, memoryview(bytes([number]) * 8))


@asynccontextmanager
async def mover_over(
    store: MemoryStore, chunks: int, lanes: int = 1
) -> AsyncIterator[tuple[Mover, list[Record]]]:
    mover = Mover(store, loads_in_flight=lanes).start()
    stored = await mover.store([job(number) for number in range(chunks)])
    try:
        yield mover, [record for record in stored if record is not None]
    finally:
        store.gate.set()
        await mover.close()


def order(store: MemoryStore) -> list[int]:
    return [int.from_bytes(key, "big") for key in store.loads]


async def test_demand_goes_before_prefetch() -> None:
    store = MemoryStore()
    async with mover_over(store, 5) as (mover, records):
        store.gate.clear()
        tickets = [mover.load(records[0], memoryview(bytearray(8)), Priority.PREFETCH)]
        await store.loading.acquire()  # the only lane is taken now
        for number, priority in ((1, Priority.PREFETCH), (2, Priority.DEMAND)):
            tickets.append(mover.load(records[number], memoryview(bytearray(8)), priority))
        store.gate.set()
        outcomes = await asyncio.gather(*(ticket.outcome for ticket in tickets))
        assert outcomes == [Outcome.HIT] * 3
        assert order(store) == [0, 2, 1]


async def test_a_prefetch_that_someone_waits_for_moves_forward() -> None:
    store = MemoryStore()
    async with mover_over(store, 4) as (mover, records):
        store.gate.clear()
        spans = [memoryview(bytearray(8)) for _ in records]
        first = mover.load(records[0], spans[0], Priority.DEMAND)
        await store.loading.acquire()
        early = mover.load(records[1], spans[1], Priority.PREFETCH)
        late = mover.load(records[2], spans[2], Priority.PREFETCH)
        mover.prioritise(late, Priority.DEMAND)
        store.gate.set()
        await asyncio.gather(first.outcome, early.outcome, late.outcome)
        assert order(store) == [0, 2, 1]
        assert [bytes(span) for span in spans[:3]] == [bytes([n]) * 8 for n in range(3)]


async def test_a_load_that_nobody_waits_for_any_more_holds_up_no_write() -> None:
    store = MemoryStore()
    async with mover_over(store, 2) as (mover, records):
        store.gate.clear()
        spans = [memoryview(bytearray(8)) for _ in records]
        running = mover.load(records[0], spans[0], Priority.PREFETCH)
        await store.loading.acquire()
        left = mover.load(records[1], spans[1], Priority.DEMAND)
        mover.prioritise(left, Priority.PREFETCH)
        store.gate.set()
        async with asyncio.timeout(30):
            await mover.store([job(9)])
        assert await asyncio.gather(running.outcome, left.outcome) == [Outcome.HIT] * 2


async def test_what_has_not_started_can_be_given_up() -> None:
    store = MemoryStore()
    async with mover_over(store, 3) as (mover, records):
        store.gate.clear()
        running = mover.load(records[0], memoryview(bytearray(8)), Priority.DEMAND)
        await store.loading.acquire()
        waiting = mover.load(records[1], memoryview(bytearray(8)), Priority.DEMAND)
        assert waiting.cancel()
        assert not running.cancel()
        assert await waiting.outcome is Outcome.FAILED
        store.gate.set()
        assert await running.outcome is Outcome.HIT
        assert order(store) == [0]


async def test_writes_wait_until_nobody_waits_for_a_load() -> None:
    store = MemoryStore()
    async with mover_over(store, 1) as (mover, records):
        store.gate.clear()
        load = mover.load(records[0], memoryview(bytearray(8)), Priority.DEMAND)
        await store.loading.acquire()
        write = asyncio.create_task(mover.store([job(9)]))
        store.gate.set()
        await load.outcome
        assert store.transactions == [1], "the write did not begin before the load was done"
        await write
        assert store.transactions == [1, 1]


async def test_closing_ends_everything_that_waits() -> None:
    store = MemoryStore()
    async with mover_over(store, 3) as (mover, records):
        store.gate.clear()
        tickets = [
            mover.load(record, memoryview(bytearray(8)), Priority.DEMAND) for record in records
        ]
        await store.loading.acquire()
        await mover.close()
        outcomes = await asyncio.gather(*(ticket.outcome for ticket in tickets))
        assert outcomes == [Outcome.FAILED] * 3
