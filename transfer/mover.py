"""How bytes move between RAM and a store: in order of urgency, bounded, joinable and cancellable.

Loads that a client waits for go first, prefetches after them on all lanes but one, and writes
behind only while no client waits. The mover lives on the event loop; the copies run on the store's
own threads.
"""

import asyncio
import heapq
import logging
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count
from typing import Self

from kvtier.tiers.base import Outcome, Record, Store, StoreJob

logger = logging.getLogger(__name__)


class Priority(IntEnum):
    """Who waits for a load; the smaller value goes first."""

    DEMAND = 0
    PREFETCH = 1


@dataclass(slots=True, eq=False)
class Ticket:
    """One load. Everyone who wants the chunk holds the same ticket and awaits `outcome`."""

    record: Record
    into: memoryview
    priority: Priority
    outcome: "asyncio.Future[Outcome]"
    started: bool = False

    def cancel(self) -> bool:
        """Give up a load that has not started: its outcome is then FAILED. False once it has."""
        if not self.started and not self.outcome.done():
            self.outcome.set_result(Outcome.FAILED)
        return not self.started


@dataclass(slots=True, eq=False)
class _Lanes:
    waiting: list[tuple[Priority, int, Ticket]] = field(default_factory=list)
    sequence: "count[int]" = field(default_factory=count)
    demand: int = 0  # DEMAND loads waiting or running
    prefetching: int = 0  # PREFETCH loads running


class Mover:
    """Moves chunks between RAM spans and one store. At most `loads_in_flight` loads run at once."""

    def __init__(self, store: Store, loads_in_flight: int) -> None:
        self._store = store
        self._lanes = _Lanes()
        self._work = asyncio.Event()
        self._calm = asyncio.Event()
        self._calm.set()
        self._limit = loads_in_flight
        self._prefetch_limit = max(1, loads_in_flight - 1)  # a lane is free for who comes next
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> Self:
        """Start the lanes; needs the running loop."""
        self._tasks = [
            asyncio.create_task(self._run_loads(), name=f"kvtier-load-{lane}")
            for lane in range(self._limit)
        ]
        return self

    def load(self, record: Record, into: memoryview, priority: Priority) -> Ticket:
        """Queue a load of one chunk into a RAM span that stays reserved until the outcome is
        known."""
        ticket = Ticket(record, into, priority, asyncio.get_running_loop().create_future())
        self._push(ticket)
        return ticket

    def prioritise(self, ticket: Ticket, priority: Priority) -> None:
        """Move a waiting load to where those who want it now have it."""
        if ticket.started or ticket.outcome.done() or ticket.priority is priority:
            return
        if ticket.priority is Priority.DEMAND:
            ticket.outcome.remove_done_callback(self._one_demand_less)
            self._one_demand_less(ticket.outcome)
        ticket.priority = priority
        self._push(ticket)  # its older entry is skipped when it comes up

    async def store(self, jobs: list[StoreJob]) -> list[Record | None]:
        """Write chunks in one transaction, once no client waits for a load."""
        await self._calm.wait()
        try:
            return await self._store.store(jobs)
        except Exception:  # a store's mistake costs these chunks, not the service
            logger.exception("%d chunks were not written", len(jobs))
            return [None] * len(jobs)

    async def close(self) -> None:
        """Stop the lanes. Waiting loads end as FAILED, running ones finish first."""
        for _, _, ticket in self._lanes.waiting:
            ticket.cancel()
        self._lanes.waiting.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._calm.set()

    def _push(self, ticket: Ticket) -> None:
        lanes = self._lanes
        heapq.heappush(lanes.waiting, (ticket.priority, next(lanes.sequence), ticket))
        if ticket.priority is Priority.DEMAND:
            lanes.demand += 1
            self._calm.clear()
            ticket.outcome.add_done_callback(self._one_demand_less)
        self._work.set()

    def _one_demand_less(self, _: "asyncio.Future[Outcome]") -> None:
        self._lanes.demand -= 1
        if self._lanes.demand == 0:
            self._calm.set()

    def _pop(self) -> Ticket | None:
        lanes = self._lanes
        while lanes.waiting:
            priority, _, ticket = lanes.waiting[0]
            stale = ticket.outcome.done() or ticket.started or ticket.priority is not priority
            if not stale and priority is Priority.PREFETCH:
                if lanes.prefetching == self._prefetch_limit:
                    break
                lanes.prefetching += 1
            heapq.heappop(lanes.waiting)
            if not stale:
                return ticket
        self._work.clear()
        return None

    async def _run_loads(self) -> None:
        while True:
            await self._work.wait()
            ticket = self._pop()
            if ticket is None:
                continue
            ticket.started = True
            ahead = ticket.priority is Priority.PREFETCH
            outcome = Outcome.FAILED
            try:
                outcome = await self._store.load(ticket.record, ticket.into)
            except Exception:  # a store's mistake costs this chunk, not the lane
                logger.exception("a chunk was not read")
            finally:
                self._lanes.prefetching -= ahead
                self._work.set()
                if not ticket.outcome.done():
                    ticket.outcome.set_result(outcome)
