"""The worker's loads: chunks from the service into the engine's blocks."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvtier.client import Client
from kvtier.connectors.vllm.copies import Copies, Landed
from kvtier.connectors.vllm.orders import LoadOrder, Run
from kvtier.connectors.vllm.paged import Pages
from kvtier.connectors.vllm.parts import Part
from kvtier.connectors.vllm.tally import Tally

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stored:
    """One part as a worker knows it: where it lies in the engine, and who keeps it."""

    part: Part
    pages: Pages
    client: Client
    writer: bool  # of several workers with the same bytes, one writes


class Loader:
    """Fills blocks. For one thread at a time."""

    def __init__(
        self, parts: Sequence[Stored], copies: Copies, deadline_s: float, tally: Tally
    ) -> None:
        self._parts = {stored.part.digest: stored for stored in parts}
        self._copies = copies
        self._deadline_s = deadline_s
        self._tally = tally

    def load(self, order: LoadOrder) -> int:
        """Carry out an order; returns up to which token of the request it succeeded: `order.stop`,
        or the first one that could not be had."""
        started_s = time.monotonic()
        reached = order.stop
        try:
            for digest, run in order.runs.items():
                stored = self._parts.get(digest)
                if stored is not None:  # else another worker's
                    reached = min(reached, self._load_part(stored, run, order))
        except Exception:
            logger.exception("kvtier: a load failed")
            reached = order.start
        self._tally.add(load_seconds=time.monotonic() - started_s)
        if reached < order.stop:
            self._tally.add(failed_loads=1)
        return reached

    def _load_part(self, stored: Stored, run: Run, order: LoadOrder) -> int:
        tokens = stored.part.space.layout.tokens
        if not stored.client.connected:
            # The scheduler's side is connected, or it would not have ordered this.
            stored.client.wait_ready(self._deadline_s)
        with stored.client.load(run.prefix, self._deadline_s) as loaded:
            landed = [
                Landed(
                    chunk.data,
                    blocks_of(stored.part, run, chunk.index),
                    max(0, order.start - (run.first + chunk.index) * tokens),
                )
                for chunk in loaded
            ]
            self._copies.scatter(stored.pages, landed)
        self._tally.add(loaded_chunks=len(landed), loaded_bytes=len(landed) * stored.pages.nbytes)
        if len(landed) == len(run.prefix):
            return order.stop
        return max(order.start, (run.first + len(landed)) * tokens)


def blocks_of(part: Part, run: Run, index: int) -> Mapping[int, Sequence[int]]:
    """The block ids of one chunk of a run, for each group."""
    tokens = part.space.layout.tokens
    return {
        group: run.blocks[group][
            index * tokens // block_tokens : (index + 1) * tokens // block_tokens
        ]
        for group, block_tokens in part.groups
    }
