"""The worker's side: carries out each step's orders on this rank's share of the KV."""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvtier.client import Client
from kvtier.connectors.vllm.copies import Copies
from kvtier.connectors.vllm.loader import Loader, Stored
from kvtier.connectors.vllm.lookups import Secured
from kvtier.connectors.vllm.offloader import Offloader
from kvtier.connectors.vllm.orders import LoadOrder, StepOrders, StepReport
from kvtier.connectors.vllm.tally import Tally

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Arrivals:
    """Requests whose background loads ended, and those of them that failed."""

    finished: set[str]
    failed: set[str]


class Working:
    """One worker. Its methods are called by the engine, one at a time, in each step's order.

    An engine all of whose requests wait for background loads goes through idle steps as fast as it
    can, which takes from whoever loads the processor that he needs. So an idle step waits up to
    `idle_wait_s` for a load to end.
    """

    def __init__(
        self,
        parts: Sequence[Stored],
        copies: Copies,
        deadline_s: float,
        block_tokens: int,
        idle_wait_s: float = 0.0,
    ) -> None:
        self.tally = Tally()
        self._parts = tuple(parts)
        self._copies = copies
        self._block_tokens = block_tokens  # of the only group, where loads are in line
        self._idle_wait_s = idle_wait_s
        self._idle = False
        self._loader = Loader(parts, copies, deadline_s, self.tally)
        self._offloader = Offloader(parts, copies, deadline_s, self.tally)
        self._report = StepReport()
        self._bad_blocks: set[int] = set()
        # Layers before which the engine has never asked: it may never do so.
        self._silent = {name for stored in parts for name in stored.pages.layer_names}
        self._background = _BackgroundLoads(
            Loader(parts, copies, deadline_s, self.tally), deadline_s
        )

    def prepare(self, request: str, secured: Secured) -> None:
        """Take over what is secured for a load in line; see `Loader.prepare`."""
        self._loader.prepare(request, secured)

    @property
    def clients(self) -> dict[bytes, Client]:
        """This worker's clients, by the digest of their space."""
        return {stored.part.digest: stored.client for stored in self._parts}

    def forget(self) -> None:
        """Return once nothing under way reads the engine's blocks; what is not copied is given
        up."""
        self._offloader.give_up()

    def before_writing(self, orders: StepOrders) -> None:
        """Before the step writes to any block."""
        if orders.fence:
            self._offloader.fence(orders.fence)

    def load(self, orders: StepOrders, *, by_layer: bool = False) -> None:
        """Load now what this step's forward needs, and begin what it does not. `by_layer`: the
        forward calls `before_layer` as often as it ever did."""
        self._idle = orders.idle
        if orders.loads:
            self._load(orders.loads, by_layer=by_layer and not self._silent)
        if orders.confirm:
            self._report.confirmed.add(orders.step)

    def before_layer(self, name: str) -> None:
        """The forward is about to read a layer of the cache."""
        self._silent.discard(name)
        self._loader.before_layer(name)

    def offload(self, orders: StepOrders) -> None:
        """Begin to offload; the step's forward has been given to the device."""
        if orders.offloads:
            mark = self._copies.mark()
            for order in orders.offloads:
                self._offloader.submit(order, mark)

    def arrivals(self) -> Arrivals:
        """The background loads that ended since the last call."""
        arrivals = self._background.take(self._idle_wait_s if self._idle else 0.0)
        self._report.failed |= arrivals.failed
        return arrivals

    def bad_blocks(self) -> set[int]:
        """Blocks that this step should have loaded and did not. Waits for what is under way ahead
        of the forward, so that nothing of it is left behind the step."""
        for order in self._loader.settle():
            self._failed(order, order.start)
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def report(self) -> StepReport | None:
        """What the scheduler's side must know of this step; None for nothing."""
        self._report.stored += self._offloader.take_stored()
        if not self._report:
            return None
        report, self._report = self._report, StepReport()
        return report

    def close(self) -> None:
        """End the threads and the sessions."""
        self._background.close()
        self._offloader.close()
        self._copies.close()
        for stored in self._parts:
            stored.client.close()

    def _load(self, orders: Sequence[LoadOrder], *, by_layer: bool) -> None:
        mark = self._copies.mark()
        for order in orders:
            if order.background:
                self._background.begin(order, mark)
            elif (reached := self._loader.load(order, mark, by_layer=by_layer)) < order.stop:
                self._failed(order, reached)

    def _failed(self, order: LoadOrder, reached: int) -> None:
        """Name the blocks of all tokens from `reached` on: the engine computes them anew."""
        self._report.failed.add(order.request)
        for run in order.runs.values():
            tokens = run.prefix.chunk_tokens
            for blocks in run.blocks.values():
                lost = max(0, reached - run.first * tokens) // self._block_tokens
                self._bad_blocks |= set(blocks[lost:]) - {0}


def asks_by_layer(forward_context: Any) -> bool:
    """Whether vLLM's forward calls `before_layer`: a full CUDA graph runs none of our code. Where
    the context names no attention, vLLM has not decided yet or there is no forward."""
    mode = getattr(forward_context, "cudagraph_runtime_mode", None)
    decided = getattr(forward_context, "attn_metadata", None) is not None
    return decided and getattr(mode, "name", "") in {"NONE", "PIECEWISE"}


class _BackgroundLoads:
    """Loads beside the engine's steps, one after the other. The deadline of each counts from its
    order, so that those behind a slow one do not wait longer than it."""

    def __init__(self, loader: Loader, deadline_s: float) -> None:
        self._loader = loader
        self._deadline_s = deadline_s
        self._queue: queue.SimpleQueue[tuple[LoadOrder, object, float] | None]
        self._queue = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._under_way = 0
        self._arrivals = Arrivals(set(), set())
        self._thread: threading.Thread | None = None

    def begin(self, order: LoadOrder, mark: object) -> None:
        """Load behind the engine's work up to a mark."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kvtier-load", daemon=True)
            self._thread.start()
        with self._changed:
            self._under_way += 1
        self._queue.put((order, mark, time.monotonic() + self._deadline_s))

    def take(self, wait_s: float) -> Arrivals:
        """What has ended since the last call, or ends while it waits."""
        with self._changed:
            if wait_s and self._under_way and not self._arrivals.finished:
                self._changed.wait(wait_s)
            arrivals, self._arrivals = self._arrivals, Arrivals(set(), set())
        return arrivals

    def close(self) -> None:
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            order, mark, until_s = item
            reached = order.start
            try:
                left_s = until_s - time.monotonic()
                if left_s > 0:
                    reached = self._loader.load(order, mark, left_s)
            finally:  # whatever happens, the engine waits for this request
                with self._changed:
                    self._under_way -= 1
                    self._changed.notify_all()
                    self._arrivals.finished.add(order.request)
                    if reached < order.stop:
                        self._arrivals.failed.add(order.request)
