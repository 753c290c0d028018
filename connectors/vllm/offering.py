"""Which chunks each step offers to the service, and which offers must leave their blocks first.

A chunk is offered with the step that completes it. Three rules keep that right:

* KV computed on top of a failed load is garbage. So while the outcome of a step that loads is not
  known, nothing is offered; what has become due is offered by a later step.
* Nothing is written to a block while an offload reads it: see `fence`.
* Only tokens whose ids are known have keys: drafts and placeholders are never stored.
"""

from collections.abc import Iterable, Iterator, Sequence

from kvtier.connectors.vllm.fence import Fence
from kvtier.connectors.vllm.matching import BlockTable, run_of
from kvtier.connectors.vllm.orders import OffloadOrder, Run
from kvtier.connectors.vllm.parts import Part
from kvtier.connectors.vllm.tracking import NEVER, Tracked


class Offering:
    """Makes offload orders, numbered from 1."""

    def __init__(self, parts: Sequence[Part], *, output: bool) -> None:
        self._parts = tuple(parts)
        self._output = output
        self._fence = Fence()
        self._number = 0
        self._parting: list[OffloadOrder] = []
        self._forgotten = 0
        self._unconfirmed: set[int] = set()

    @property
    def held_back(self) -> bool:
        """Whether a step that loads is still under way."""
        return bool(self._unconfirmed)

    def await_confirmation(self, step: int) -> None:
        """This step loads: nothing is offered until it is confirmed."""
        self._unconfirmed.add(step)

    def confirmed(self, steps: Iterable[int]) -> None:
        """The outcome of these steps is known."""
        self._unconfirmed.difference_update(steps)

    def fence(self, blocks: Iterable[int]) -> int:
        """The offload that must have left its blocks before these are written; 0 if none. Orders of
        ended requests that would read them are dropped."""
        if not blocks and not self._forgotten:
            return 0
        written = set(blocks)
        self._parting = [order for order in self._parting if written.isdisjoint(_read_by(order))]
        forgotten, self._forgotten = self._forgotten, 0
        return max({forgotten} | self._fence.written(written))

    def forget(self) -> None:
        """What blocks hold is no longer what was offered: orders that no worker has are dropped,
        and the next step's fence is one for all others."""
        self._parting = []
        self._forgotten = self._number

    def due(self, tracked: Tracked, computed: int) -> bool:
        """Whether the first `computed` tokens hold a chunk that was not offered yet."""
        return self._full(tracked, computed) > min(tracked.offered)

    def offer(self, tracked: Tracked, table: BlockTable, computed: int) -> OffloadOrder | None:
        """The order for all chunks among the first `computed` tokens that are due; it goes out with
        the step that is being planned."""
        order = self._order(tracked, table, computed)
        if order is not None:
            self._fence.reading(order.number, _read_by(order))
        return order

    def offer_at_end(
        self, tracked: Tracked, table: BlockTable, computed: int
    ) -> OffloadOrder | None:
        """As `offer`, for a request that has ended: it goes out with the next step, unless its
        blocks are written before."""
        order = self._order(tracked, table, computed) if self.due(tracked, computed) else None
        if order is not None:
            self._parting.append(order)
        return order

    def parting(self) -> list[OffloadOrder]:
        """The orders of requests that have ended since the last step; they go out now."""
        parting, self._parting = self._parting, []
        for order in parting:
            self._fence.reading(order.number, _read_by(order))
        return parting

    def _order(self, tracked: Tracked, table: BlockTable, computed: int) -> OffloadOrder | None:
        full = self._full(tracked, computed)
        tracked.key(full)
        runs: dict[bytes, Run] = {}
        reached = []
        for part, first in zip(self._parts, tracked.offered, strict=True):
            reached.append(max(first, full))
            if first >= full:
                continue
            run = run_of(tracked, part, table, first, full)
            if any(0 in blocks for blocks in run.blocks.values()):
                # The engine no longer has it: what would continue it can never be stored.
                reached[-1] = NEVER
            else:
                runs[part.digest] = run
        tracked.set_offered(reached)
        if not runs:
            return None
        self._number += 1
        return OffloadOrder(self._number, tracked.request.request_id, runs)

    def _full(self, tracked: Tracked, computed: int) -> int:
        request = tracked.request
        known = request.num_tokens if self._output else request.num_prompt_tokens
        return min(computed, known, request.num_tokens) // tracked.chains.chunk_tokens


def _read_by(order: OffloadOrder) -> Iterator[int]:
    """The blocks that an order reads."""
    for run in order.runs.values():
        for blocks in run.blocks.values():
            yield from blocks
