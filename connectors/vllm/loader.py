"""The worker's loads: chunks from the service into the engine's blocks."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvtier.client import Client, LoadedChunk
from kvtier.connectors.vllm.copies import Copies, Landed
from kvtier.connectors.vllm.lookups import Secured
from kvtier.connectors.vllm.orders import LoadOrder, Run
from kvtier.connectors.vllm.paged import Pages
from kvtier.connectors.vllm.parts import Part
from kvtier.connectors.vllm.tally import Tally

logger = logging.getLogger(__name__)

# A call that is given less time than any call takes would only look as if the service had failed.
_LEAST_S = 0.05


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
        self._prepared: dict[str, Secured] = {}

    def prepare(self, request: str, secured: Secured) -> None:
        """Take over what is secured for a request; its next load uses it and lets go of it."""
        self._prepared[request] = secured

    def load(self, order: LoadOrder, deadline_s: float | None = None) -> int:
        """Carry out an order; returns up to which token of the request it succeeded: `order.stop`,
        or the first one that could not be had until the deadline."""
        started_s = time.monotonic()
        reached = order.stop
        secured = self._prepared.pop(order.request, None)
        until_s = started_s + (deadline_s or self._deadline_s)
        try:
            for digest, run in order.runs.items():
                stored = self._parts.get(digest)
                if stored is not None:  # else another worker's
                    reached = min(reached, self._load_part(stored, run, order, secured or until_s))
        except Exception:
            logger.exception("kvtier: a load failed")
            reached = order.start
        finally:
            if secured is not None:
                secured.release()
        self._tally.add(load_seconds=time.monotonic() - started_s)
        if reached < order.stop:
            self._tally.add(failed_loads=1)
        return reached

    def _load_part(
        self, stored: Stored, run: Run, order: LoadOrder, source: Secured | float
    ) -> int:
        """Load one part's run from what is secured or, until a time, from the service."""
        if isinstance(source, Secured):
            first = run.first - source.first
            chunks = source.chunks[stored.part.digest][first : first + len(run.prefix)]
            return self._scatter(stored, run, order, chunks)
        if not stored.client.connected:
            # The scheduler's side is connected, or it would not have ordered this.
            stored.client.wait_ready(max(0.0, source - time.monotonic()))
        left_s = max(_LEAST_S, source - time.monotonic())
        with stored.client.load(run.prefix, left_s) as loaded:
            return self._scatter(stored, run, order, list(loaded))

    def _scatter(
        self, stored: Stored, run: Run, order: LoadOrder, chunks: Sequence[LoadedChunk]
    ) -> int:
        """Copy a run's leading chunks into their blocks; up to which token that is."""
        tokens = stored.part.space.layout.tokens
        landed = [
            Landed(
                chunk.data,
                blocks_of(stored.part, run, index),
                max(0, order.start - (run.first + index) * tokens),
            )
            for index, chunk in enumerate(chunks)
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
