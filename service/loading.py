"""One load: the longest held run, leased as it lands and answered in prompt order."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

from kvtier.service.answers import Landed, LoadStop
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
_HITS = {TierId.GPU: "vram", TierId.CPU: "ram", TierId.DISK: "disk"}


class Loading:
    """A load under way. What is in an arena that the client reaches is leased at once and what is
    elsewhere is pinned by its promotion, so that nothing of the run can be evicted while it is
    brought. With `raisings` the client reaches VRAM, and what it found in RAM is raised. `overlap`
    is the chunk after the run that the prompt leaves half-way, where one was found. `on_end` is
    called when it no longer waits for anything."""

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
        self._awaited: dict[int, Promotion] = {}
        self.stop = LoadStop.COMPLETE
        self.overlap: Overlap | None = None
        self.on_end: Callable[[], None] = lambda: None

    async def chunks(self, run: list[Node], deadline_s: float | None) -> AsyncIterator[Landed]:
        """Yields the chunks of a held run as they land, then the overlap; where it ends early,
        `stop` says why.

        All must be held when the first chunk is asked for. `deadline_s` is in seconds from then.
        """
        until = None if deadline_s is None else time.monotonic() + deadline_s
        try:
            overlap = self.overlap
            wanted = self._begin(run if overlap is None else [*run, overlap.node])
            done = 0
            while done < wanted:
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
            for promotion in self._awaited.values():
                self._promotions.leave(promotion, Priority.DEMAND)
            self.on_end()

    def overlapping(self, index: int) -> int:
        """How many tokens of a chunk are the prompt's; 0 where it is the one of that key."""
        overlap = self.overlap
        return overlap.tokens if overlap is not None and overlap.index == index else 0

    def _begin(self, run: list[Node]) -> int:
        """Lease what can be reached, start the rest; returns how many chunks there is room for."""
        for index, node in enumerate(run):
            replica = self._reachable(node)
            if replica is not None:
                self._take(index, replica, replica.tier)
        for index, node in enumerate(run):
            if index in self._lease.replicas:
                continue
            promotion = self._promotions.join(node, Priority.DEMAND)
            if promotion is None:
                self.stop = LoadStop.NO_ROOM
                return index
            self._awaited[index] = promotion
            promotion.outcome.add_done_callback(partial(self._land, index, promotion))
        return len(run)

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

    async def _await_landing(self, index: int, until: float | None) -> bool:
        """Wait for one chunk; False when it will not come, with `stop` set."""
        promotion = self._awaited.get(index)
        if promotion is None:  # it was in RAM: only the lease's end takes it away
            self.stop = LoadStop.RELEASED
            return False
        outcome = promotion.outcome
        remaining = None if until is None else max(0.0, until - time.monotonic())
        await asyncio.wait({outcome}, timeout=remaining)
        if self._lease.ended:
            self.stop = LoadStop.RELEASED
            return False
        if not outcome.done():
            self.stop = LoadStop.DEADLINE
            self._placement.counters.load_deadlines += 1
        elif index not in self._lease.replicas:
            self.stop = _STOPS.get(outcome.result(), LoadStop.MISS)
        return index in self._lease.replicas
