"""The service's own core over tiers that hold no bytes: what decides is real, what moves is not."""

import itertools
import mmap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from kvtier.kernels.shared_memory import SharedMemory
from kvtier.metrics import Counters
from kvtier.sections import Disk, Limits, Tenants
from kvtier.service.cache import Cache, Retained
from kvtier.service.demotion import Demotion, Writing
from kvtier.service.history import History
from kvtier.service.learning import Learning
from kvtier.service.pins import Pins
from kvtier.service.placement import Memory, Placement, Rules, Tiers
from kvtier.service.promotion import Promotions
from kvtier.service.sessions import Sessions
from kvtier.service.write_behind import WriteBehind
from kvtier.spaces import Layout, Space
from kvtier.tiers.arena import SLOT_ALIGN
from kvtier.tiers.base import Outcome, Record, StoreJob
from kvtier.tiers.policies.registry import make_family
from kvtier.tiers.tree import TierId
from kvtier.transfer.mover import Mover

# A chunk fills one slot of the arena.
SPACE = Space("kvtier-trace", Layout("int8", layers=1, heads=1, head_dim=8, tokens=256, planes=2))
CHUNK_BYTES = SLOT_ALIGN
assert SPACE.layout.nbytes == CHUNK_BYTES


class Records:
    """A Store that keeps the records of chunks and nothing else; it never fails and never waits."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._ids = itertools.count(1)
        self._kept: dict[int, Record] = {}

    def worst_bytes(self, nbytes: int) -> int:
        return nbytes

    def records(self) -> list[Record]:
        return list(self._kept.values())

    def spaces(self) -> dict[bytes, Space]:
        return {SPACE.digest: SPACE} if self._kept else {}

    async def load(self, record: Record, into: memoryview) -> Outcome:
        return Outcome.HIT if record.id in self._kept else Outcome.MISS

    async def store(self, jobs: list[StoreJob]) -> list[Record | None]:
        return [self._keep(job) for job in jobs]

    def _keep(self, job: StoreJob) -> Record:
        meta, nbytes = job.meta, len(job.source)
        space = meta.space.digest
        record = Record(next(self._ids), meta.key, meta.parent, space, nbytes, meta.created_s)
        self._kept[record.id] = record
        self.used_bytes += nbytes
        return record

    def delete(self, record: Record) -> None:
        del self._kept[record.id]
        self.used_bytes -= record.stored_bytes

    async def flush(self) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Core:
    """The parts that a replay drives, and where it reads what came of it."""

    cache: Cache
    placement: Placement
    write_behind: WriteBehind


@asynccontextmanager
async def running(
    policy: str, chunks: dict[TierId, int], writing: Writing, clock: Callable[[], float]
) -> AsyncIterator[Core]:
    """A core with room for so many chunks in RAM and on disk; joined as `service/build.py` does.

    Its only session may reserve all of RAM: requests come one after the other.
    """
    memory = Memory(_untouched(chunks[TierId.CPU] * CHUNK_BYTES))
    store = Records(chunks[TierId.DISK] * CHUNK_BYTES)
    families = {tier: make_family(policy) for tier in TierId}
    rules = Rules(lambda tier: families[tier].policy())
    counters, settings = Counters(), Disk()
    limits = Limits(session_lease_percent=100)
    placement = Placement(Tiers(memory, store), History(limits.history), counters, rules, clock)
    placement.on_asked = Learning({t.name: f.learner for t, f in families.items()}, None).asked
    mover = Mover(store, settings.read_threads).start()
    write_behind = WriteBehind(placement, mover, settings.commit_bytes, 0.0)
    demotion = Demotion(placement, writing, write_behind)
    placement.on_commit, placement.on_hit = demotion.committed, demotion.asked
    placement.is_unsaved, placement.passes = demotion.is_unsaved, demotion.passes
    write_behind.start()
    sessions = Sessions(placement.index, 1, memory.region.path, counters.add_aborted)
    retained = Retained(0.0, limits, settings.read_ahead_percent)
    pins = Pins(placement, Tenants().pin_percent)
    cache = Cache(placement, Promotions(placement, mover), sessions, retained, pins)
    try:
        yield Core(cache, placement, write_behind)
    finally:
        await sessions.close()
        await write_behind.close()
        await mover.close()


def _untouched(nbytes: int) -> SharedMemory:
    """Memory that nobody reads or writes, so that it takes none."""
    mapping = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return SharedMemory(Path(), mapping, fd=-1)
