"""RAM to VRAM, behind the loads: chunks that an engine on the device asked for and found in RAM."""

import asyncio
from collections.abc import Iterable
from functools import partial

from kvtier.kernels.device import Urgency
from kvtier.service.placement import Placement, Refusal
from kvtier.service.vram import Vram
from kvtier.tiers.base import Outcome
from kvtier.tiers.tree import Node, Replica, State, TierId

# One part in so many of the tier's bytes: more at once would push out what was raised just before.
_UNDER_WAY_SHARE = 2


class Raisings:
    """All copies from RAM to VRAM. They cost no memory of their own: what there is no room for is
    not raised, and is asked for again by the next hit. `under_way_bytes` have not arrived yet."""

    def __init__(self, placement: Placement, vram: Vram) -> None:
        self._placement = placement
        self._vram = vram
        self.under_way_bytes = 0

    def raise_up(self, nodes: Iterable[Node]) -> None:
        """Start raising chunks of one prefix, in prompt order, as far as there is room."""
        if self._vram.lost:
            return
        for node in nodes:
            if node.in_gpu is not None:
                continue
            source = node.ready(TierId.CPU)
            if source is None or not self._start(node, source):
                return

    def _start(self, node: Node, source: Replica) -> bool:
        placement, nbytes = self._placement, node.branch.nbytes
        if (self.under_way_bytes + nbytes) * _UNDER_WAY_SHARE > self._vram.arena.nbytes:
            return False
        index = placement.index
        above = node.parent.ready(TierId.GPU) if node.parent is not None else None
        [coming] = placement.coming(TierId.GPU, [node])
        index.pin(source)  # now: the room may cost RAM, for what VRAM alone has is brought down
        if above is not None:
            index.pin(above)  # the room must not be its own parent's
        try:
            target = placement.begin_in(
                TierId.GPU,
                node.branch,
                lambda slot: index.begin(node, TierId.GPU, slot, coming),
                coming,
            )
        finally:
            if above is not None:
                index.unpin(above)
        if isinstance(target, Refusal):
            index.unpin(source)
            return False
        self.under_way_bytes += nbytes
        haul = self._vram.bus.move(
            self._vram.span(target.slot), self._vram.ram_span(source.slot), Urgency.OFFLOADS
        )
        haul.outcome.add_done_callback(partial(self._finish, source, target))
        return True

    def _finish(self, source: Replica, target: Replica, outcome: "asyncio.Future[Outcome]") -> None:
        index = self._placement.index
        self.under_way_bytes -= source.slot.nbytes
        # Meanwhile: it must not come back.
        evicted = source.state is not State.READY or self._vram.lost
        arrived = not outcome.cancelled() and outcome.result() is Outcome.HIT
        if arrived and not evicted and index.commit(target):
            self._placement.counters.raised_chunks += 1
        else:
            index.abort(target)
        index.unpin(source)
