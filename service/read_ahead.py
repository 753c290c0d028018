"""From disk to RAM before a load asks: what a session named in Prefetch, or looked up.

A guess, so it costs nobody anything that matters: it is read behind every load, evicts nothing that
the policy values higher, makes way where a load or an offload needs its room, and is given up when
its session ends or its load does. Nothing is brought that nobody named. Why:
docs/decisions/0015-read-ahead.md.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import partial

from kvtier.chunks import ChunkKey
from kvtier.service.batch import Batch
from kvtier.service.pace import Pace
from kvtier.service.placement import Placement
from kvtier.service.promotion import Promotion, Promotions
from kvtier.service.sessions import Session, Sessions
from kvtier.tiers.arena import slot_bytes_of
from kvtier.tiers.base import Outcome
from kvtier.tiers.tree import Node, Replica, TierId
from kvtier.transfer.mover import Priority

_IN_MEMORY = (TierId.GPU, TierId.CPU)
# What all sessions together may have under way, in shares of one.
_SESSIONS = 2
# Chunks that begin to be brought between two turns of the loop, each some 40 microseconds.
_MOST_AT_ONCE = 128
# Chunks that came and were not asked for yet, remembered to count those that are.
_MOST_REMEMBERED = 16_384


class ReadAhead:
    """What sessions have on its way. One of them may have `percent` of RAM under way at once, all
    together twice that: what is beyond is not brought."""

    def __init__(
        self, placement: Placement, promotions: Promotions, sessions: Sessions, percent: int
    ) -> None:
        self._sessions = sessions
        self._starting: set[asyncio.Task[tuple[int, int]]] = set()
        self._placement = placement
        self._promotions = promotions
        self._most_bytes = placement.memory.arena.nbytes * percent // 100
        self._under_way_bytes = 0
        self._claims: dict[Session, dict[Node, Promotion]] = {}
        self._unused: OrderedDict[Node, Replica] = OrderedDict()

    def start(self, session: Session, run: Sequence[Node]) -> None:
        """Bring chunks in a moment."""
        task = asyncio.create_task(self.bring(session, run), name="kvtier-read-ahead")
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def bring(self, session: Session, run: Sequence[Node]) -> tuple[int, int]:
        """Start bringing chunks of one prefix, in prompt order, as far as there is room and while
        the session lasts; returns (in RAM or VRAM already, on their way for this session)."""
        there = coming = 0
        if not run or session not in self._sessions:
            return there, coming
        batch, pace = self._promotions.batch(run), Pace(_MOST_AT_ONCE)
        for index, node in enumerate(run):
            if any(node.ready(tier) for tier in _IN_MEMORY):
                there += 1
            elif node in self._claims.get(session, ()) or self._begin(session, batch, index):
                coming += 1
            else:
                break
            if await pace.stepped():
                batch.renew()
                if session not in self._sessions:
                    break
        return there, coming

    def give_up(self, session: Session, keys: Iterable[ChunkKey]) -> int:
        """A session no longer wants chunks; returns how many were on their way for it."""
        nodes = session.branch.nodes
        given_up = 0
        for key in keys:
            node = nodes.get(key)
            given_up += node is not None and self._leave(session, node)
        return given_up

    def end(self, session: Session) -> None:
        """The asker has gone."""
        for node in reversed(list(self._claims.get(session, ()))):
            self._leave(session, node)

    def load_began(self, run: Iterable[Node]) -> None:
        """A load asks for chunks: count those that were brought ahead of it."""
        if self._unused:
            for node in run:
                replica = self._unused.pop(node, None)
                used = replica is not None and node.in_cpu is replica
                self._placement.counters.prefetch_used_chunks += used

    def load_ended(self, session: Session, run: Iterable[Node]) -> None:
        """A load of the session no longer waits: what it did not wait for is not wanted."""
        if session in self._claims:
            for node in run:
                self._leave(session, node)

    def _begin(self, session: Session, batch: Batch, index: int) -> bool:
        node = batch.nodes[index]
        nbytes = slot_bytes_of(node.branch.nbytes)
        claims = self._claims.get(session, {})
        if (
            not node.ready(TierId.DISK)  # evicted just now, to make room for those before it
            or (len(claims) + 1) * nbytes > self._most_bytes
            or self._under_way_bytes + nbytes > _SESSIONS * self._most_bytes
        ):
            return False
        promotion = self._promotions.join(batch, index, Priority.PREFETCH)
        if promotion is None:
            return False
        self._claims.setdefault(session, {})[node] = promotion
        self._under_way_bytes += nbytes
        promotion.outcome.add_done_callback(partial(self._land, session, promotion))
        return True

    def _land(
        self, session: Session, promotion: Promotion, outcome: "asyncio.Future[Outcome]"
    ) -> None:
        node, target = promotion.source.node, promotion.target
        if self._claims.get(session, {}).get(node) is promotion:
            self._leave(session, node)
        if outcome.result() is Outcome.HIT and promotion.ahead and node.in_cpu is target:
            self._unused[node] = target
            if len(self._unused) > _MOST_REMEMBERED:
                self._unused.popitem(last=False)

    def _leave(self, session: Session, node: Node) -> bool:
        """End a session's claim; False when it has none."""
        claims = self._claims.get(session, {})
        promotion = claims.pop(node, None)
        if promotion is None:
            return False
        if not claims:
            del self._claims[session]
        self._under_way_bytes -= slot_bytes_of(node.branch.nbytes)
        self._promotions.leave(promotion, Priority.PREFETCH)
        return True
