"""One load: the longest held run, leased as it lands and answered in prompt order."""

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial

from kvtier.service.answers import Landed, LoadStop
from kvtier.service.leases import Lease, Leases
from kvtier.service.placement import Placement
from kvtier.service.promotion import Promotion, Promotions
from kvtier.service.raising import Raisings
from kvtier.tiers.base import Outcome
from kvtier.tiers.index import Node, Replica, TierId
from kvtier.transfer.mover import Priority

_STOPS = {
    Outcome.MISS: LoadStop.MISS,
    Outcome.CORRUPT: LoadStop.CORRUPT,
    Outcome.FAILED: LoadStop.FAILED,
}


class Loading:
    """A load under way. What is in an arena that the client reaches is leased at once and what is
    elsewhere is pinned by its promotion, so that nothing of the run can be evicted while it is
    brought. With `raisings` the client reaches VRAM, and what it found in RAM is raised."""

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

    async def chunks(self, run: list[Node], deadline_s: float | None) -> AsyncIterator[Landed]:
        """Yields the chunks of a held run as they land; where it ends early, `stop` says why.

        The run must be held when the first chunk is asked for. `deadline_s` is in seconds from
        then.
        """
        until = None if deadline_s is None else time.monotonic() + deadline_s
        try:
            wanted = self._begin(run)
            done = 0
            while done < wanted:
                landed = self._landed_from(done)
                if landed.chunks:
                    done += len(landed.chunks)
                    yield landed
                elif not await self._await_landing(done, until):
                    return
            if self._raisings is not None:
                self._raisings.raise_up(run)
        finally:
            for promotion in self._awaited.values():
                self._promotions.leave(promotion)

    def _begin(self, run: list[Node]) -> int:
        """Lease what can be reached, start the rest; returns how many chunks there is room for."""
        for index, node in enumerate(run):
            replica = self._reachable(node)
            if replica is not None:
                self._leases.add_read(self._lease, index, replica)
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
        counters = self._placement.counters
        replica = node.ready(TierId.GPU) if self._raisings is not None else None
        if replica is not None:
            counters.load_vram_hits += 1
            return replica
        replica = node.ready(TierId.CPU)
        if replica is not None:
            counters.load_ram_hits += 1
        return replica

    def _land(self, index: int, promotion: Promotion, outcome: "asyncio.Future[Outcome]") -> None:
        # Runs right after the promotion's own commit, before anything could evict the chunk.
        replica = promotion.target.node.ready(TierId.CPU)
        if outcome.result() is Outcome.HIT and replica is not None and not self._lease.ended:
            self._leases.add_read(self._lease, index, replica)
            if promotion.source.tier is TierId.DISK:
                self._placement.counters.load_disk_hits += 1
            else:
                self._placement.counters.load_vram_hits += 1

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
