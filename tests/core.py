"""A cache without a wire, over a fake store, for tests of decisions."""

import itertools
import mmap
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvtier.chunks import ChunkKey, Prefix, chain, pack_tokens
from kvtier.kernels.device import Device, Urgency
from kvtier.kernels.shared_memory import SharedMemory
from kvtier.metrics import Counters
from kvtier.sections import Limits
from kvtier.service.answers import CommitOutcome, LoadStop, ReserveOutcome
from kvtier.service.cache import Cache, Retained
from kvtier.service.demotion import Demotion, When, Writing
from kvtier.service.history import History
from kvtier.service.leases import Lease
from kvtier.service.pins import Pins
from kvtier.service.placement import Memory, Placement, Rules, Tiers
from kvtier.service.promotion import Promotions
from kvtier.service.raising import Raisings
from kvtier.service.sessions import Session, Sessions
from kvtier.service.vram import Vram
from kvtier.service.vram_loss import watch
from kvtier.service.write_behind import WriteBehind
from kvtier.spaces import Layout, Space
from kvtier.tiers.policies.registry import make_family
from kvtier.tiers.tree import Replica, Tenant, TierId
from kvtier.transfer.bus import Bus, Pacing
from kvtier.transfer.mover import Mover
from tests.fakes import MemoryStore

CHUNK_TOKENS = 4
SLOT_BYTES = 4096


def space(model: str = "m", weights: str = "", tenant: str = "") -> Space:
    """A space whose chunks fill one 4 KiB slot each."""
    layout = Layout("int8", 4, 2, 64, tokens=CHUNK_TOKENS, planes=2)
    return Space(model, layout, weights=weights, tenant=tenant)


@dataclass
class Harness:
    """The parts of a cache, and the steps that tests take."""

    cache: Cache
    placement: Placement
    store: MemoryStore
    write_behind: WriteBehind
    promotions: Promotions
    clock_s: list[float]
    pin_clock_s: list[float]
    raisings: Raisings | None = None
    _lease_ids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def session(self, of: Space | None = None, *, in_vram: bool = False) -> Session:
        return self.cache.open_session("test", of or space(), tethered=False, in_vram=in_vram)

    def bytes_of(self, replica: Replica) -> bytes:
        """What an arena holds of a replica now."""
        if replica.tier is TierId.CPU:
            return bytes(self.placement.memory.view(replica.slot))
        assert self.vram is not None
        return self.read_vram(replica)

    def raisings_idle(self) -> bool:
        """Whether nothing is on its way up."""
        return self.raisings is None or self.raisings.under_way_bytes == 0

    @property
    def vram(self) -> Vram | None:
        return self.placement.vram

    def read_vram(self, replica: Replica) -> bytes:
        """A replica's bytes, copied out of the device."""
        vram = self.placement.vram
        assert vram is not None
        memory = memoryview(mmap.mmap(-1, SLOT_BYTES))
        region = vram.device.register(memory)
        stream = vram.device.stream(Urgency.LOADS)
        vram.device.copy(stream, [(region.span(0, SLOT_BYTES), vram.span(replica.slot))])
        stream.synchronize()
        vram.device.release(region)
        return bytes(memory)

    def prefix(self, session: Session, tokens: Sequence[int]) -> Prefix:
        return chain(session.branch.digest, pack_tokens(tokens), CHUNK_TOKENS)

    def chain_of(self, session: Session, chunks: int, seed: int = 0) -> Prefix:
        return self.prefix(session, [seed * 100_000 + n for n in range(chunks * CHUNK_TOKENS)])

    def reserve(self, session: Session, prefix: Prefix) -> tuple[int, list[ReserveOutcome]]:
        """Reserve and fill each granted slot with the first byte of its key."""
        lease_id = next(self._lease_ids)
        answers = self.cache.reserve(session, lease_id, prefix.keys, prefix.parent)
        for key, answer in zip(prefix, answers, strict=True):
            if answer.slot is not None:
                self.placement.memory.view(answer.slot)[:] = content(key)
        return lease_id, [answer.outcome for answer in answers]

    def put(self, session: Session, prefix: Prefix) -> list[ReserveOutcome]:
        """Reserve, fill and commit."""
        lease_id, outcomes = self.reserve(session, prefix)
        granted = [i for i, outcome in enumerate(outcomes) if outcome is ReserveOutcome.WRITE]
        stored = self.cache.commit(session, lease_id, granted)
        assert stored == [CommitOutcome.STORED] * len(granted)
        return outcomes

    async def get(
        self, session: Session, prefix: Prefix, deadline_s: float | None = None
    ) -> tuple[int, LoadStop, Lease]:
        """Load, check every byte; returns how many chunks came and why no more."""
        lease = self.cache.open_read(session, next(self._lease_ids))
        chunks, loading = self.cache.load(
            session, lease, prefix.keys, deadline_s, in_vram=session.in_vram
        )
        came = 0
        async for landed in chunks:
            for index, replica in landed.chunks:
                assert index == came
                assert self.bytes_of(replica) == content(prefix.keys[index])
                came += 1
        return came, loading.stop, lease

    def only_on_disk(self) -> None:
        """Drop every RAM replica that may go."""
        index = self.placement.index
        for tenant in index.tenants:
            while (victim := self.next_victim(tenant)) is not None:
                index.drop(victim)

    def next_victim(self, tenant: Tenant, tier: TierId = TierId.CPU) -> Replica | None:
        """What a tenant would lose first."""
        return next(self.placement.index.victims(tenant, tier, self.clock_s[0]), None)


def content(key: ChunkKey) -> bytes:
    """What the tests store under a key."""
    return key * (SLOT_BYTES // len(key))


def _open_vram(device: Device, slots: int, memory: Memory) -> Vram:
    region = device.allocate(slots * SLOT_BYTES)
    vram = Vram(device, region, device.register(memory.region.view), Bus(device, Pacing()))
    vram.bus.start()
    return vram


@asynccontextmanager
async def harness(
    directory: Path,
    slots: int = 64,
    *,
    store: MemoryStore | None = None,
    ttl_s: float = 0.0,
    limits: Limits | None = None,
    session_lease_percent: int = 100,
    device: Device | None = None,
    vram_slots: int = 16,
    policy: str = "lru",
    writing: Writing | None = None,
    quota_percent: dict[TierId, int] | None = None,
    pin_percent: int = 20,
    read_ahead_percent: int = 25,
) -> AsyncIterator[Harness]:
    """A running cache with room for so many chunks in RAM and, with a device, in VRAM."""
    store = store or MemoryStore()
    limits = limits or Limits(session_lease_percent=session_lease_percent)
    clock_s, pin_clock_s = [1000.0], [0.0]
    counters, history = Counters(), History(limits.history)
    memory = Memory(SharedMemory.create(directory / "test.arena", slots * SLOT_BYTES))
    vram = _open_vram(device, vram_slots, memory) if device is not None else None
    families = {tier: make_family(policy) for tier in TierId}
    rules = Rules(lambda tier: families[tier].policy(), quota_percent or dict.fromkeys(TierId, 100))
    tiers = Tiers(memory, store, vram)
    placement = Placement(tiers, history, counters, rules, lambda: clock_s[0])
    mover = Mover(store, loads_in_flight=2).start()
    promotions = Promotions(placement, mover)
    raisings = Raisings(placement, vram) if vram is not None else None
    write_behind = WriteBehind(placement, mover, 1 << 20, 0.001)
    writing = writing or Writing(When.WRITE_THROUGH)
    demotion = Demotion(placement, writing, write_behind)
    placement.on_commit, placement.on_hit = demotion.committed, demotion.asked
    placement.is_unsaved, placement.passes = demotion.is_unsaved, demotion.passes
    write_behind.start()
    sessions = Sessions(placement.index, limits.sessions, memory.region.path, counters.add_aborted)
    retained = Retained(ttl_s, limits, read_ahead_percent)
    cache = Cache(
        placement,
        promotions,
        sessions,
        retained,
        Pins(placement, pin_percent, lambda: pin_clock_s[0]),
        raisings,
    )
    if vram is not None:
        watch(vram, placement, sessions)
    try:
        yield Harness(
            cache, placement, store, write_behind, promotions, clock_s, pin_clock_s, raisings
        )
        placement.index.check()
    finally:
        store.gate.set()
        await sessions.close()
        await write_behind.close()
        await mover.close()
        if vram is not None:
            await vram.close()
        memory.region.close(unlink=True)
