"""Which chunks each step offers to the service, and which offers must leave their blocks first.

A chunk is offered with the step that completes it. Three rules keep that right:

* KV computed on top of a failed load is garbage. So while the outcome of a step that loads is not
  known, nothing is offered; what has become due is offered by a later step.
* Nothing is written to a block while an offload reads it: see `fence`.
* Only tokens whose ids are known have keys: drafts and placeholders are never stored.
"""

from collections.abc import Iterable, Sequence

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
        readers = self._fence.written(blocks)
        for order in [order for order in self._parting if order.number in readers]:
            self._parting.remove(order)
            readers.remove(order.number)  # no worker has it
        return max(readers, default=0)

    def due(self, tracked: Tracked, computed: int) -> bool:
        """Whether the first `computed` tokens hold a chunk that was not offered yet."""
        return self._full(tracked, computed) > min(tracked.offered)

    def offer(self, tracked: Tracked, table: BlockTable, computed: int) -> OffloadOrder | None:
        """The order for all chunks among the first `computed` tokens that are due."""
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
        order = OffloadOrder(self._number, tracked.request.request_id, runs)
        for run in runs.values():
            for blocks in run.blocks.values():
                self._fence.reading(order.number, blocks)
        return order

    def offer_at_end(self, tracked: Tracked, table: BlockTable, computed: int) -> None:
        """As `offer`, for a request that has ended: goes with the next step, unless its blocks are
        written before."""
        if self.due(tracked, computed):
            order = self.offer(tracked, table, computed)
            if order is not None:
                self._parting.append(order)

    def parting(self) -> list[OffloadOrder]:
        """The orders of requests that have ended since the last step."""
        parting, self._parting = self._parting, []
        return parting

    def _full(self, tracked: Tracked, computed: int) -> int:
        request = tracked.request
        known = request.num_tokens if self._output else request.num_prompt_tokens
        return min(computed, known, request.num_tokens) // tracked.chains.chunk_tokens
