"""The worker's offloads: chunks out of the engine's blocks, in a thread beside the engine."""

import logging
import queue
import threading
from collections import Counter
from collections.abc import Sequence

from kvtier.client import Offloaded
from kvtier.connectors.vllm.copies import Copies
from kvtier.connectors.vllm.loader import Stored, blocks_of
from kvtier.connectors.vllm.orders import OffloadOrder, Run
from kvtier.connectors.vllm.tally import Tally

logger = logging.getLogger(__name__)

# How long a step that needs an offload's blocks waits for it before it is given up. A chunk is
# copied in a few milliseconds; what takes longer waits for the service.
FENCE_WAIT_S = 0.02
_DRAIN_S = 5.0

StoredCounts = Counter[tuple[int, int, bytes]]
"""(offload, chunk's place in its request, space digest): 1 for each chunk this worker stored."""


class Offloader:
    """Carries out offloads in the order of their numbers."""

    def __init__(
        self, parts: Sequence[Stored], copies: Copies, deadline_s: float, tally: Tally
    ) -> None:
        self._parts = {stored.part.digest: stored for stored in parts if stored.writer}
        self._copies = copies
        self._deadline_s = deadline_s
        self._tally = tally
        self._queue: queue.SimpleQueue[tuple[OffloadOrder, object] | None] = queue.SimpleQueue()
        self._state = threading.Condition()
        self._submitted = 0  # the last number given
        self._done = 0  # all up to this one have left their blocks
        self._given_up = 0  # all up to this one must not touch their blocks any more
        self._copying = False
        self._stored: StoredCounts = Counter()
        self._thread = threading.Thread(target=self._run, name="kvtier-offload", daemon=True)
        self._thread.start()

    def submit(self, order: OffloadOrder, after: object) -> None:
        """Offload what the blocks hold once the engine's work up to the mark `after` is done."""
        self._submitted = order.number
        self._queue.put((order, after))

    def fence(self, number: int) -> None:
        """Return once no offload up to `number` reads its blocks. Waits a little for those that are
        not done, then gives up what they have not copied yet."""
        if self._done >= number:
            return
        with self._state:
            target = min(number, self._submitted)
            if self._given_up < target:
                if self._state.wait_for(lambda: self._done >= target, FENCE_WAIT_S):
                    return
                self._given_up = target
            self._state.wait_for(lambda: not self._copying or self._done >= target)

    def give_up(self) -> None:
        """Return once no offload reads any block; what is not copied yet is given up at once."""
        with self._state:
            self._given_up = self._submitted
            self._state.wait_for(lambda: not self._copying)

    def take_stored(self) -> StoredCounts:
        """What was stored since the last call."""
        with self._state:
            stored, self._stored = self._stored, Counter()
        return stored

    def close(self) -> None:
        """Finish what is under way, or give it up after some seconds."""
        self._queue.put(None)
        self._thread.join(timeout=_DRAIN_S)
        with self._state:
            self._given_up = max(self._given_up, self._submitted)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            order, after = item
            try:
                if order.number > self._given_up:
                    self._offload(order, after)
                else:
                    self._tally.add(fenced_offloads=1)
            except Exception:
                logger.exception("kvtier: an offload failed")
            with self._state:
                self._done = order.number
                self._state.notify_all()
            del item, order, after

    def _offload(self, order: OffloadOrder, after: object) -> None:
        for digest, run in order.runs.items():
            stored = self._parts.get(digest)
            if stored is None:
                continue  # another worker's
            outcome = self._offload_part(stored, run, order.number, after)
            self._count(order.number, run, stored, outcome)

    def _offload_part(self, stored: Stored, run: Run, number: int, after: object) -> Offloaded:
        with stored.client.offload(run.prefix, self._deadline_s) as offload:
            for slot in offload:
                self._copies.reach(after)  # out of the fence's way: it would wait for it
                if not self._enter(number):
                    self._tally.add(fenced_offloads=1)
                    break
                try:
                    blocks = blocks_of(stored.part, run, slot.index)
                    self._copies.gather(stored.pages, slot.data, blocks, slot.span)
                finally:
                    self._leave()
                del slot
        return offload.outcome

    def _enter(self, number: int) -> bool:
        """Begin to read blocks; False when they may not be read any more."""
        with self._state:
            if number <= self._given_up:
                return False
            self._copying = True
            return True

    def _leave(self) -> None:
        with self._state:
            self._copying = False
            self._state.notify_all()

    def _count(self, number: int, run: Run, stored: Stored, outcome: Offloaded) -> None:
        digest = stored.part.digest
        with self._state:
            for index in outcome.stored:
                self._stored[number, run.first + index, digest] = 1
        self._tally.add(
            offloaded_chunks=len(outcome.stored),
            offloaded_bytes=len(outcome.stored) * stored.pages.nbytes,
            existing_chunks=len(outcome.existing),
            refused_chunks=len(outcome.refused),
        )
