"""RAM to VRAM, behind the loads: chunks that an engine on the device asked for and found in RAM."""

import asyncio
from collections.abc import Sequence
from functools import partial

from kvtier.kernels.device import Urgency
from kvtier.service.batch import Batch
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

    def raise_up(self, nodes: Sequence[Node]) -> None:
        """Start raising chunks of one prefix, in prompt order, as far as there is room."""
        if self._vram.lost or not nodes:
            return
        batch = Batch(self._placement, TierId.GPU, nodes)
        for index, node in enumerate(nodes):
            if node.in_gpu is not None:
                continue
            source = node.ready(TierId.CPU)
            if source is None or not self._start(batch, index, source):
                return

    def _start(self, batch: Batch, index: int, source: Replica) -> bool:
        node = batch.nodes[index]
        placement, nbytes = self._placement, node.branch.nbytes
        if (self.under_way_bytes + nbytes) * _UNDER_WAY_SHARE > self._vram.arena.nbytes:
            return False
        tree, coming = placement.index, batch.coming(index)
        above = node.parent.ready(TierId.GPU) if node.parent is not None else None
        tree.pin(source)  # now: the room may cost RAM, for what VRAM alone has is brought down
        if above is not None:
            tree.pin(above)  # the room must not be its own parent's
        try:
            target = placement.begin_in(
                batch.claim,
                lambda slot: tree.begin(node, TierId.GPU, slot, coming),
                coming,
            )
        finally:
            if above is not None:
                tree.unpin(above)
        if isinstance(target, Refusal):
            tree.unpin(source)
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
