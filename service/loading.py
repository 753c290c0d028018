"""One load: the longest held run, leased as it lands and answered in prompt order."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from itertools import islice

from kvtier.service.answers import Landed, LoadStop
from kvtier.service.batch import Batch
from kvtier.service.leases import Lease, Leases
from kvtier.service.overlaps import Overlap
from kvtier.service.placement import Placement
from kvtier.service.promotion import Promotion, Promotions
from kvtier.service.raising import Raisings
from kvtier.tiers.base import Outcome
from kvtier.tiers.tree import Node, Replica, TierId
from kvtier.transfer.mover import Priority

_STOPS = {
    Outcome.MISS: LoadStop.MISS,
    Outcome.CORRUPT: LoadStop.CORRUPT,
    Outcome.FAILED: LoadStop.FAILED,
}
# Chunks that begin to be brought between two turns of the loop, each some 40 microseconds.
_MOST_AT_ONCE = 128
_HITS = {TierId.GPU: "vram", TierId.CPU: "ram", TierId.DISK: "disk"}


class Loading:
    """A load under way. What is in an arena that the client reaches is leased at once and what is
    elsewhere is pinned until its promotion pins it, so that nothing of the run can be evicted while
    it is brought. With `raisings` the client reaches VRAM, and what it found in RAM is raised.
    `overlap` is the chunk after the run that the prompt leaves half-way, where one was found.
    `on_end` is called when it no longer waits for anything."""

    def __init__(
        self,
        placement: Placement,
        promotions: Promotions,
        raisings: Raisings | None,
        leases: Leases,
        lease: Lease,
    ) -> None:
        self._placement = placement
        self._promotions = promotions
        self._raisings = raisings
        self._leases = leases
        self._lease = lease
        self._run: list[Node] = []
        self._reach = 0  # how many chunks of it can come
        self._batch: Batch | None = None
        self._sources: dict[int, Replica] = {}  # of what is to be brought, pinned
        self._awaited: dict[int, Promotion] = {}
        self.stop = LoadStop.COMPLETE
        self.overlap: Overlap | None = None
        self.on_end: Callable[[], None] = lambda: None

    async def chunks(self, run: list[Node], deadline_s: float | None) -> AsyncIterator[Landed]:
        """Yields the chunks of a held run as they land, then the overlap; where it ends early,
        `stop` says why.

        All must be held when the first chunk is asked for. `deadline_s` is in seconds from then.
        """
        until = math.inf if deadline_s is None else time.monotonic() + deadline_s
        try:
            overlap = self.overlap
            self._begin(run if overlap is None else [*run, overlap.node])
            done = 0
            while done < self._bring_some():
                landed = self._landed_from(done)
                if landed.chunks:
                    done += len(landed.chunks)
                    if overlap is not None and done > overlap.index:
                        self._placement.counters.load_partial_tokens += overlap.tokens
                    yield landed
                elif not await self._await_landing(done, until):
                    return
            if self._raisings is not None:  # once they are read: until then the bus is the client's
                self._lease.on_release = partial(self._raisings.raise_up, run)
        finally:
            self._let_go_of_sources()
            for promotion in self._awaited.values():
                self._promotions.leave(promotion, Priority.DEMAND)
            self.on_end()

    def overlapping(self, index: int) -> int:
        """How many tokens of a chunk are the prompt's; 0 where it is the one of that key."""
        overlap = self.overlap
        return overlap.tokens if overlap is not None and overlap.index == index else 0

    def _begin(self, run: list[Node]) -> None:
        """Lease what can be reached, and keep the rest where it is."""
        self._run, self._reach = run, len(run)
        for index, node in enumerate(run):
            replica = self._reachable(node)
            if replica is not None:
                self._take(index, replica, replica.tier)
                continue
            source = node.ready(TierId.GPU) or node.ready(TierId.DISK)
            assert source is not None, "a chunk of the run is not held"
            self._placement.index.pin(source)
            self._sources[index] = source
        self._batch = self._promotions.batch(run) if self._sources else None

    def _bring_some(self) -> int:
        """Start bringing some more of what is elsewhere; returns how many chunks can come."""
        if self._batch is None or self._lease.ended:
            return self._reach
        self._batch.renew()
        for index in list(islice(self._sources, _MOST_AT_ONCE)):
            stop = self._bring(self._batch, index)
            if stop is not None:
                self.stop, self._reach = stop, index
                self._let_go_of_sources()
                break
            self._placement.index.unpin(self._sources.pop(index))  # its promotion has pinned it
        return self._reach

    def _bring(self, batch: Batch, index: int) -> LoadStop | None:
        """Start bringing a chunk; why that cannot be."""
        node = self._run[index]
        replica = self._reachable(node)
        if replica is not None:  # another load has brought it meanwhile
            self._take(index, replica, replica.tier)
            return None
        if not node.held:
            return LoadStop.MISS
        promotion = self._promotions.join(batch, index, Priority.DEMAND)
        if promotion is None:
            return LoadStop.NO_ROOM
        self._awaited[index] = promotion
        promotion.outcome.add_done_callback(partial(self._land, index, promotion))
        return None

    def _let_go_of_sources(self) -> None:
        for source in self._sources.values():
            self._placement.index.unpin(source)
        self._sources.clear()

    def _reachable(self, node: Node) -> Replica | None:
        replica = node.ready(TierId.GPU) if self._raisings is not None else None
        return replica or node.ready(TierId.CPU)

    def _take(self, index: int, replica: Replica, source: TierId) -> None:
        """Lease a chunk that was found in a tier, and count it, unless no key asked for it."""
        self._leases.add_read(self._lease, index, replica)
        if self.overlap is None or index < self.overlap.index:
            self._placement.counters.add_hit(_HITS[source])

    def _land(self, index: int, promotion: Promotion, outcome: "asyncio.Future[Outcome]") -> None:
        # Runs right after the promotion's own commit, before anything could evict the chunk.
        replica = promotion.target.node.ready(TierId.CPU)
        if outcome.result() is Outcome.HIT and replica is not None and not self._lease.ended:
            self._take(index, replica, promotion.source.tier)

    def _landed_from(self, start: int) -> Landed:
        chunks = []
        index = start
        while not self._lease.ended and (replica := self._lease.replicas.get(index)) is not None:
            chunks.append((index, replica))
            index += 1
        return Landed(chunks)

    async def _await_landing(self, index: int, until: float) -> bool:
        """Give way before more is brought, or wait for one chunk; False when it will not come, with
        `stop` set."""
        promotion = self._awaited.get(index)
        if self._sources:
            await asyncio.sleep(0)
            if time.monotonic() < until and not self._lease.ended:
                return True
        elif promotion is not None:
            remaining = None if until == math.inf else max(0.0, until - time.monotonic())
            await asyncio.wait({promotion.outcome}, timeout=remaining)
        if self._lease.ended:  # only that takes away what was in RAM
            self.stop = LoadStop.RELEASED
            return False
        if promotion is None or not promotion.outcome.done():
            self.stop = LoadStop.DEADLINE
            self._placement.counters.load_deadlines += 1
        elif index not in self._lease.replicas:
            self.stop = _STOPS.get(promotion.outcome.result(), LoadStop.MISS)
        return index in self._lease.replicas
