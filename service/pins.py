"""Pins: prefixes that clients keep from being evicted, for a time and within bounds.

A pin holds each chunk in the fastest tier that has it, and all that is before its first chunk, for
that could not go either. It covers less when chunks are removed for another
reason than room: a client's wish, their age, a wrong checksum. Pins are of this run of the service:
after a restart nothing is pinned.
"""

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import count
from typing import NamedTuple

from kvtier.service.hints import clamped
from kvtier.service.pace import Pace
from kvtier.service.placement import Placement
from kvtier.service.sessions import Session
from kvtier.tiers.tree import Branch, Node, Replica, Tenant, TierId

PINS_PER_TENANT = 1024
# In all of a tenant's pins, each as often as pins have it: what they cost to remember and to end.
CHUNKS_PER_TENANT = 1 << 18
LEAST_TTL_S = 1.0
MOST_TTL_S = 7 * 86_400.0
# Of what has expired, ended between two turns of the loop: a chunk of a pin or a pin, each some
# 0.3 microseconds. While room is looked for, for many chunks in a row, only a few.
_STEPS = 1024
_FEW_STEPS = 16
# Pins that ended before their time are dropped from the heap of all once they are so many.
_MOST_STALE = 1024
# Of a tier, by all tenants together, where one alone may not have more: the rest must do for those
# who have no pins.
_ALL_PERCENT = 50


class PinStop(Enum):
    """Why a pin keeps no more; the wire's numbers."""

    COMPLETE = 1
    MISS = 2
    TENANT_BYTES = 3
    TENANT_PINS = 4
    ALL_BYTES = 5


@dataclass(frozen=True, slots=True)
class Terms:
    """How long a pin is asked for, in seconds, and whether it ends with its session."""

    ttl_s: float
    end_with_session: bool = False


@dataclass(slots=True, eq=False)
class Pin:
    """`replicas` are what it keeps, from the root on; `session` is the one whose end is its own.

    What removes a chunk removes what continues it first, so they go from the last one on.
    """

    id: int
    branch: Branch
    session: Session | None
    until_s: float  # by the clock of `Pins`; when its session has ended, long ago
    replicas: list[Replica] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """What the chunks take of their tiers."""
        return sum(_bytes_of(replica) for replica in self.replicas)


@dataclass(frozen=True, slots=True)
class Pinned:
    """What came of asking for a pin: None when nothing is kept. `chunks` are those named that it
    keeps, `ttl_s` how long."""

    pin: Pin | None
    chunks: int
    stop: PinStop
    ttl_s: float


class _Due(NamedTuple):
    """When a pin ends, unless it has ended or ends sooner; no two have the same place."""

    until_s: float
    place: int
    pin: Pin


@dataclass(slots=True, eq=False)
class _Pinner:
    """One tenant's pins, by id, how many chunks they have, and what these take of each tier."""

    pins: dict[int, Pin] = field(default_factory=dict)
    chunks: int = 0
    nbytes: list[int] = field(default_factory=lambda: [0] * len(TierId))


async def _one_second() -> None:
    await asyncio.sleep(1.0)


class Pins:
    """All pins. A tenant's take at most `percent` of each tier. The `clock` is one that nobody
    sets; each `tick` ends what has expired, others having their turns in between, and every look
    for room ends some of it."""

    def __init__(
        self,
        placement: Placement,
        percent: int,
        clock: Callable[[], float] = time.monotonic,
        tick: Callable[[], Awaitable[None]] = _one_second,
    ) -> None:
        self._index = placement.index
        self._capacity = placement.shares.capacity
        self._counters = placement.counters
        self._percent = percent
        self._clock = clock
        self._tick = tick
        self._tenants: dict[str, _Pinner] = {}
        self._nbytes = [0] * len(TierId)
        self._on: dict[Replica, list[Pin]] = {}
        self._due: list[_Due] = []  # a heap
        self._stale = 0  # of them, how many say nothing any more
        self._places = count()
        self._ticking: asyncio.Task[None] | None = None
        self._index.on_detached = self._lost
        placement.before_room = partial(self.expire, _FEW_STEPS)
        placement.shares.pinned = self._pinned

    def start(self) -> None:
        """Start the clock's ticks; needs the running loop."""
        self._ticking = asyncio.create_task(self._watch(), name="kvtier-pins")

    async def close(self) -> None:
        """End the ticks and all pins: what they kept is to be written like everything else."""
        if self._ticking is not None:
            self._ticking.cancel()
            with suppress(asyncio.CancelledError):
                await self._ticking
        for pin in [pin for tenant in self._tenants.values() for pin in tenant.pins.values()]:
            self._end(pin)

    async def _watch(self) -> None:
        while True:
            await self._tick()
            await self.end_expired()

    # ── what clients ask for ──────────────────────────────────────────────────────────────────────

    def pin(self, session: Session, run: Sequence[Node], wanted: int, terms: Terms) -> Pinned:
        """Keep as much of a held run as may be; `wanted` are the keys that were named. What has
        expired counts until it is ended."""
        self.expire()
        ttl_s, was_clamped = clamped(terms.ttl_s, LEAST_TTL_S, MOST_TTL_S)
        self._counters.clamped_hints += was_clamped
        stop = PinStop.COMPLETE if len(run) == wanted else PinStop.MISS
        if not run:
            return Pinned(None, 0, stop, ttl_s)
        tenant = self._tenants.setdefault(session.branch.tenant.name, _Pinner())
        if len(tenant.pins) >= PINS_PER_TENANT:
            self._counters.pins_cut += 1
            return Pinned(None, 0, PinStop.TENANT_PINS, ttl_s)
        until_s = self._clock() + ttl_s
        owner = session if terms.end_with_session else None
        pin = Pin(secrets.randbits(64) or 1, session.branch, owner, until_s)
        tenant.pins[pin.id] = pin
        self._await_end(pin)
        before = run[0].path()[:-1]
        bound = self._keep(tenant, pin, [*before, *run])
        self._counters.pins_cut += bound is not None
        chunks = len(pin.replicas) - len(before)
        if chunks <= 0:
            self._end(pin)
            return Pinned(None, 0, bound or stop, ttl_s)
        self._counters.pins_made += 1
        return Pinned(pin, chunks, bound or stop, ttl_s)

    def unpin(self, session: Session, pin_id: int) -> None:
        """End a pin of the session's tenant; unknown ones are ignored."""
        pin = self._of(session).get(pin_id)
        if pin is not None:
            self._end(pin)

    def listed(self, session: Session) -> list[tuple[Pin, float]]:
        """The pins of the session's tenant, each with the seconds that it has left."""
        self.expire()
        now_s = self._clock()
        pins = self._of(session).values()
        return [(pin, pin.until_s - now_s) for pin in pins if pin.until_s > now_s]

    def session_ended(self, session: Session) -> None:
        """End the pins that were to end with a session, some now and the rest in a moment."""
        for pin in self._of(session).values():
            if pin.session is session:
                pin.until_s = -math.inf
                self._await_end(pin)
                self._stale += 1
        self.expire()

    def _of(self, session: Session) -> dict[int, Pin]:
        tenant = self._tenants.get(session.branch.tenant.name)
        return tenant.pins if tenant is not None else {}

    # ── what ends them ────────────────────────────────────────────────────────────────────────────

    async def end_expired(self) -> None:
        """End all pins whose time is over."""
        pace = Pace(1)
        while self.expire():
            await pace.stepped()

    def expire(self, steps: int = _STEPS) -> bool:
        """End pins whose time is over, from the last chunk of each, in so many steps; False when
        there are no more."""
        now_s, due = self._clock(), self._due
        while due and due[0].until_s <= now_s:
            pin = due[0].pin
            while pin.replicas and steps:
                self._let_go_of_last(pin)
                steps -= 1
            if not steps:
                return True
            steps -= 1
            if self._is_stale(heappop(due)):
                self._stale -= 1
            else:
                self._counters.pins_expired += pin.until_s > -math.inf
                self._forget(pin)
        return False

    def _await_end(self, pin: Pin) -> None:
        heappush(self._due, _Due(pin.until_s, next(self._places), pin))

    def _is_stale(self, due: _Due) -> bool:
        tenant = self._tenants.get(due.pin.branch.tenant.name)
        is_over = tenant is None or tenant.pins.get(due.pin.id) is not due.pin
        return is_over or due.until_s != due.pin.until_s

    def _lost(self, replica: Replica) -> None:
        """A chunk was removed: its memory must not wait for the end of a pin."""
        for pin in list(self._on.get(replica, ())):
            assert pin.replicas[-1] is replica, "a chunk went before what continues it"
            self._let_go_of_last(pin)
            if not pin.replicas:
                self._end(pin)

    def _end(self, pin: Pin) -> None:
        """End a pin before its time."""
        while pin.replicas:
            self._let_go_of_last(pin)
        self._forget(pin)
        self._stale += 1
        if self._stale > max(_MOST_STALE, len(self._due) // 2):
            self._due = [due for due in self._due if not self._is_stale(due)]
            heapify(self._due)
            self._stale = 0

    def _forget(self, pin: Pin) -> None:
        name = pin.branch.tenant.name
        pins = self._tenants[name].pins
        del pins[pin.id]
        if not pins:
            del self._tenants[name]

    # ── chunks ────────────────────────────────────────────────────────────────────────────────────

    def _keep(self, tenant: _Pinner, pin: Pin, path: Sequence[Node]) -> PinStop | None:
        """Keep the leading chunks of a path; the bound that kept it from more."""
        for node in path:
            replica = next(found for tier in TierId if (found := node.ready(tier)) is not None)
            if tenant.chunks == CHUNKS_PER_TENANT:
                return PinStop.TENANT_PINS
            pins = self._on.get(replica)
            if pins is None:
                bound = self._bound(tenant, replica)
                if bound is not None:
                    return bound
                pins = self._on[replica] = []
                self._count(tenant, replica, 1)
                self._index.pin(replica)
            pins.append(pin)
            pin.replicas.append(replica)
            tenant.chunks += 1
        return None

    def _bound(self, tenant: _Pinner, replica: Replica) -> PinStop | None:
        """The bound that one more replica would break."""
        tier, nbytes = replica.tier, _bytes_of(replica)
        capacity = self._capacity[tier]
        if (tenant.nbytes[tier] + nbytes) * 100 > capacity * self._percent:
            return PinStop.TENANT_BYTES
        if (self._nbytes[tier] + nbytes) * 100 > capacity * max(_ALL_PERCENT, self._percent):
            return PinStop.ALL_BYTES
        return None

    def _let_go_of_last(self, pin: Pin) -> None:
        replica = pin.replicas.pop()
        tenant = self._tenants[pin.branch.tenant.name]
        tenant.chunks -= 1
        pins = self._on[replica]
        pins.remove(pin)
        if not pins:
            del self._on[replica]
            self._count(tenant, replica, -1)
            self._index.unpin(replica)

    def _pinned(self, tenant: Tenant, tier: TierId) -> int:
        pinner = self._tenants.get(tenant.name)
        return pinner.nbytes[tier] if pinner is not None else 0

    def _count(self, tenant: _Pinner, replica: Replica, sign: int) -> None:
        nbytes = sign * _bytes_of(replica)
        tenant.nbytes[replica.tier] += nbytes
        self._nbytes[replica.tier] += nbytes


def _bytes_of(replica: Replica) -> int:
    """What a replica takes of its tier."""
    if replica.tier is TierId.DISK:
        return replica.record.stored_bytes
    return replica.slot.slab.slot_bytes
