"""Disk or VRAM to RAM: one promotion per chunk, shared by everyone who waits for it."""

from asyncio import Future
from dataclasses import dataclass
from typing import Protocol

from kvtier.kernels.device import Urgency
from kvtier.service.history import Loss
from kvtier.service.placement import Placement
from kvtier.tiers.base import Outcome
from kvtier.tiers.index import Node, Replica, State, TierId
from kvtier.transfer.mover import Mover, Priority, Ticket


class Copy(Protocol):
    """A copy under way."""

    @property
    def outcome(self) -> "Future[Outcome]": ...
    def cancel(self) -> bool:
        """Give up a copy that was not begun; False once it was."""
        ...


@dataclass(slots=True, eq=False)
class Promotion:
    """A chunk on its way into a RAM slot. `waiters` counts the loads that want it."""

    source: Replica
    target: Replica
    copy: Copy
    waiters: int = 0

    @property
    def outcome(self) -> "Future[Outcome]":
        return self.copy.outcome


class Promotions:
    """All promotions under way. `mover` reads the disk tier, where there is one."""

    def __init__(self, placement: Placement, mover: Mover | None) -> None:
        self._placement = placement
        self._mover = mover
        self._live: dict[Node, Promotion] = {}

    def join(self, node: Node, priority: Priority) -> Promotion | None:
        """Promote a chunk that is on disk or in VRAM and not in RAM, or join its promotion; None:
        no room."""
        promotion = self._live.get(node)
        if promotion is None:
            promotion = self._start(node, priority)
        elif isinstance(promotion.copy, Ticket):
            assert self._mover is not None
            self._mover.raise_priority(promotion.copy, priority)
        if promotion is not None and priority is Priority.DEMAND:
            promotion.waiters += 1
        return promotion

    def leave(self, promotion: Promotion) -> None:
        """A load no longer waits. A promotion that nobody wants is given up if it has not
        started."""
        promotion.waiters -= 1
        if promotion.waiters == 0 and not promotion.outcome.done() and promotion.copy.cancel():
            self._finish(promotion, Outcome.FAILED)  # now, so that nobody can join what is over

    def _start(self, node: Node, priority: Priority) -> Promotion | None:
        source = node.ready(TierId.GPU) or node.ready(TierId.DISK)
        assert source is not None, "promotion of a chunk that no other tier holds"
        index, nbytes = self._placement.index, node.branch.space.layout.nbytes
        index.pin(source)
        target = self._placement.begin_in(
            TierId.CPU, nbytes, lambda slot: index.begin_copy(node, TierId.CPU, slot)
        )
        if target is None:
            index.unpin(source)
            return None
        copy = self._begin(source, target, priority)
        promotion = self._live[node] = Promotion(source, target, copy)
        # Added first, so it runs before anyone who awaits the outcome.
        copy.outcome.add_done_callback(lambda done: self._finish(promotion, done.result()))
        return promotion

    def _begin(self, source: Replica, target: Replica, priority: Priority) -> Copy:
        if source.tier is TierId.DISK:
            assert self._mover is not None, "a chunk on disk without a disk tier"
            into = self._placement.memory.view(target.slot)
            return self._mover.load(source.record, into, priority)
        vram = self._placement.vram
        assert vram is not None, "a chunk in VRAM without a VRAM tier"
        urgency = Urgency.LOADS if priority is Priority.DEMAND else Urgency.OFFLOADS
        return vram.bus.move(vram.ram_span(target.slot), vram.span(source.slot), urgency)

    def _finish(self, promotion: Promotion, outcome: Outcome) -> None:
        node = promotion.source.node
        if self._live.get(node) is not promotion:
            return  # given up before its outcome was known
        index, counters = self._placement.index, self._placement.counters
        del self._live[node]
        evicted = promotion.source.state is not State.READY  # meanwhile: it must not come back
        if outcome is Outcome.HIT and not evicted and index.commit(promotion.target):
            if promotion.source.tier is TierId.DISK:
                counters.promoted_chunks += 1
            else:
                counters.lowered_chunks += 1
                self._placement.on_commit([node])  # disk may not have it
        else:
            index.abort(promotion.target)
        if outcome is Outcome.CORRUPT:
            counters.corrupt_chunks += 1
            self._placement.lose(node, Loss.CORRUPT, "its checksum on disk was wrong")
        elif outcome is Outcome.MISS:
            self._placement.lose(node, Loss.CORRUPT, "the disk tier no longer had it")
        index.unpin(promotion.source)
        if outcome is Outcome.FAILED and promotion.source.tier is TierId.GPU:
            self._do_without(promotion.source)

    def _do_without(self, source: Replica) -> None:
        """Where another tier has what VRAM could not give, the next load is to ask that one."""
        if source.node.ready_count > 1 and self._placement.index.is_evictable(source):
            self._placement.evict(source)
