"""Stand-ins for what is slow or breaks: a store in memory whose every operation can be held up."""

import asyncio
import itertools
from dataclasses import dataclass, field

from kvtier.spaces import Space
from kvtier.tiers.base import Outcome, Record, StoreJob


@dataclass
class MemoryStore:
    """A Store in a dict. While `gate` is closed, loads and stores wait at it."""

    capacity_bytes: int = 1 << 30
    chunks: dict[int, tuple[Record, bytes]] = field(default_factory=dict)
    outcomes: dict[bytes, Outcome] = field(default_factory=dict)  # forced, by key
    refuse_writes: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    loads: list[bytes] = field(default_factory=list)  # keys in the order their loads began
    transactions: list[int] = field(default_factory=list)  # chunks in each
    loading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    _ids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def used_bytes(self) -> int:
        return sum(record.stored_bytes for record, _ in self.chunks.values())

    def worst_bytes(self, nbytes: int) -> int:
        return nbytes

    def records(self) -> list[Record]:
        return [record for record, _ in self.chunks.values()]

    def spaces(self) -> dict[bytes, Space]:
        return {}

    async def load(self, record: Record, into: memoryview) -> Outcome:
        self.loads.append(record.key)
        self.loading.release()
        await self.gate.wait()
        forced = self.outcomes.get(record.key)
        if forced is not None:
            return forced
        found = self.chunks.get(record.id)
        if found is None:
            return Outcome.MISS
        into[:] = found[1]
        return Outcome.HIT

    async def store(self, jobs: list[StoreJob]) -> list[Record | None]:
        await self.gate.wait()
        self.transactions.append(len(jobs))
        if self.refuse_writes:
            return [None] * len(jobs)
        return [self._keep(job) for job in jobs]

    def _keep(self, job: StoreJob) -> Record:
        meta = job.meta
        record = Record(
            next(self._ids),
            meta.key,
            meta.parent,
            meta.space.digest,
            len(job.source),
            meta.created_s,
        )
        self.chunks[record.id] = (record, bytes(job.source))
        return record

    def delete(self, record: Record) -> None:
        del self.chunks[record.id]

    async def flush(self) -> None:
        pass

    async def close(self) -> None:
        pass
