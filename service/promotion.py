"""Disk or VRAM to RAM: one promotion per chunk, shared by everyone who wants it."""

from asyncio import Future
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvtier.kernels.device import Urgency
from kvtier.service.batch import Batch
from kvtier.service.history import Why
from kvtier.service.placement import Placement, Refusal
from kvtier.tiers.base import Outcome
from kvtier.tiers.tree import Node, Replica, State, Tenant, TierId
from kvtier.transfer.bus import Haul
from kvtier.transfer.mover import Mover, Priority, Ticket

# Guesses given up for one chunk, before it is seen whether there is room for it.
_MOST_GIVEN_UP = 64


class Copy(Protocol):
    """A copy under way."""

    @property
    def outcome(self) -> "Future[Outcome]": ...
    def cancel(self) -> bool:
        """Give up a copy that was not begun; False once it was."""
        ...


@dataclass(slots=True, eq=False)
class Promotion:
    """A chunk on its way into a RAM slot. `wanted` counts who wants it, by Priority: loads, and
    sessions that read ahead. `kept`: placement itself wants it. `ahead`: no load has asked for the
    chunk since its promotion began."""

    source: Replica
    target: Replica
    copy: Copy
    ahead: bool = False
    kept: bool = False
    wanted: list[int] = field(default_factory=lambda: [0] * len(Priority))

    @property
    def outcome(self) -> "Future[Outcome]":
        return self.copy.outcome

    @property
    def is_guess(self) -> bool:
        """Whether nobody waits for it."""
        return not self.kept and not self.wanted[Priority.DEMAND]


class Promotions:
    """All promotions under way. `mover` reads the disk tier, where there is one."""

    def __init__(self, placement: Placement, mover: Mover | None) -> None:
        self._placement = placement
        self._mover = mover
        self._live: dict[Node, Promotion] = {}
        placement.on_lonely = self.bring_down
        placement.make_way = self._make_way

    def batch(self, nodes: Sequence[Node]) -> Batch:
        """Chunks of one prefix that a request wants in RAM, to be joined one by one."""
        return Batch(self._placement, TierId.CPU, nodes)

    def join(self, batch: Batch, index: int, priority: Priority) -> Promotion | None:
        """Promote a chunk that is on disk or in VRAM and not in RAM, or join its promotion; None:
        no room, or with PREFETCH none that it is worth. `leave` ends the interest."""
        promotion = self._live.get(batch.nodes[index]) or self._start(batch, index, priority)
        if promotion is None:
            return None
        promotion.wanted[priority] += 1
        if priority is Priority.DEMAND:
            if promotion.ahead:
                promotion.ahead = False
                self._placement.counters.prefetch_used_chunks += 1
            self._hurry(promotion)
        return promotion

    def leave(self, promotion: Promotion, priority: Priority) -> None:
        """One who joined no longer wants it. A promotion that nobody wants is given up if it has
        not started."""
        promotion.wanted[priority] -= 1
        if promotion.outcome.done() or promotion.kept:
            return
        if not any(promotion.wanted):
            self._give_up(promotion)
        elif promotion.is_guess and isinstance(promotion.copy, Ticket):
            assert self._mover is not None
            self._mover.prioritise(promotion.copy, Priority.PREFETCH)

    def bring_down(self, node: Node) -> None:
        """Give a chunk that VRAM alone has a place in RAM, whatever goes for it."""
        promotion = self._live.get(node)
        if promotion is None:
            promotion = self._start(self.batch([node]), 0, Priority.PREFETCH, kept=True)
        if promotion is not None:
            promotion.kept = True

    def _hurry(self, promotion: Promotion) -> None:
        """A load waits."""
        copy = promotion.copy
        if isinstance(copy, Ticket):
            assert self._mover is not None
            self._mover.prioritise(copy, Priority.DEMAND)
        elif isinstance(copy, Haul):
            assert self._placement.vram is not None
            self._placement.vram.bus.hurry(copy)

    def _give_up(self, promotion: Promotion) -> bool:
        """End a promotion that has not started; False when it has."""
        if promotion.outcome.done() or not promotion.copy.cancel():
            return False
        self._placement.counters.prefetch_cancelled_chunks += promotion.ahead
        self._finish(promotion, Outcome.FAILED)  # now, so that nobody can join what is over
        return True

    def _make_way(self, tier: TierId, refusal: Refusal, tenant: Tenant) -> bool:
        """Give up some of what nobody waits for and has not started, for a chunk of a tenant that
        somebody does wait for and that a tier refused; False where that is no help."""
        if tier is not TierId.CPU or refusal is Refusal.NOT_WORTH:
            return False
        guesses = [
            promotion
            for node, promotion in self._live.items()
            if promotion.is_guess and (refusal is Refusal.NO_ROOM or node.branch.tenant is tenant)
        ]
        given_up = 0
        for promotion in reversed(guesses):
            given_up += self._give_up(promotion)
            if given_up == _MOST_GIVEN_UP:
                break
        return given_up > 0

    def _start(
        self, batch: Batch, index: int, priority: Priority, *, kept: bool = False
    ) -> Promotion | None:
        node = batch.nodes[index]
        source = node.ready(TierId.GPU) or node.ready(TierId.DISK)
        assert source is not None, "promotion of a chunk that no other tier holds"
        tree, ahead = self._placement.index, priority is Priority.PREFETCH and not kept
        tree.pin(source)
        target = self._begin_target(batch, index, ahead=ahead)
        if isinstance(target, Refusal):
            tree.unpin(source)
            return None
        copy = self._begin_copy(source, target, priority)
        promotion = self._live[node] = Promotion(source, target, copy, ahead)
        self._placement.counters.prefetched_chunks += ahead
        # Added first, so it runs before anyone who awaits the outcome.
        copy.outcome.add_done_callback(lambda done: self._finish(promotion, done.result()))
        return promotion

    def _begin_target(self, batch: Batch, index: int, *, ahead: bool) -> Replica | Refusal:
        """A slot of RAM: what is read ahead gets one only where it is worth more than what goes for
        it, and nothing that is on its way makes way for it."""
        tree, node, coming = self._placement.index, batch.nodes[index], batch.coming(index)
        above = node.parent.ready(TierId.CPU) if ahead and node.parent is not None else None
        if above is not None:
            tree.pin(above)  # the room must not be its own parent's
        try:
            return self._placement.begin_in(
                batch.claim,
                lambda slot: tree.begin(node, TierId.CPU, slot, coming),
                coming if ahead else None,
                ahead=ahead,
            )
        finally:
            if above is not None:
                tree.unpin(above)

    def _begin_copy(self, source: Replica, target: Replica, priority: Priority) -> Copy:
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
            self._placement.lose(node, Why.CHECKSUM)
        elif outcome is Outcome.MISS:
            self._placement.lose(node, Why.VANISHED)
        index.unpin(promotion.source)
        if outcome is Outcome.FAILED and promotion.source.tier is TierId.GPU:
            self._do_without(promotion.source)

    def _do_without(self, source: Replica) -> None:
        """Where another tier has what VRAM could not give, the next load is to ask that one."""
        if source.node.ready_count > 1 and source.evictable:
            self._placement.evict(source)
