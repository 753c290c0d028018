"""The worker's loads: chunks from the service into the engine's blocks."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvtier.client import Client, LoadedChunk
from kvtier.connectors.vllm.copies import Copies, Filling, Landed
from kvtier.connectors.vllm.lookups import Secured
from kvtier.connectors.vllm.orders import LoadOrder, Run
from kvtier.connectors.vllm.paged import Pages
from kvtier.connectors.vllm.parts import Part
from kvtier.connectors.vllm.tally import Tally
from kvtier.kernels.device import DeviceError, Place

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


@dataclass(frozen=True, slots=True)
class _Way:
    """How a load gets into blocks: behind the engine's work up to the mark `after`, by layer or all
    at once. What is `secured` stays where it is until it is let go of, so its copies may be under
    way when the load returns; others are done."""

    after: object
    by_layer: bool
    secured: Secured | None
    under_way: list[Filling] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A load in line that the engine's own work waits for, and what it reads."""

    order: LoadOrder
    secured: Secured
    fillings: Sequence[Filling]
    started_s: float

    def finish(self) -> bool:
        """Wait for it and let go; whether it succeeded."""
        try:
            for filling in self.fillings:
                filling.finish()
        except DeviceError as error:
            logger.warning("kvtier: a load failed: %s", error)
            return False
        finally:
            self.secured.release()
        return True


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
        self._under_way: list[_UnderWay] = []

    def prepare(self, request: str, secured: Secured) -> None:
        """Take over what is secured for a request; its next load uses it and lets go of it."""
        self._prepared[request] = secured

    def load(
        self,
        order: LoadOrder,
        after: object,
        deadline_s: float | None = None,
        *,
        by_layer: bool = False,
    ) -> int:
        """Carry out an order, behind the engine's work up to the mark `after`; returns up to which
        token of the request it succeeded: `order.stop`, or the first one that could not be had
        until the deadline. What was secured may still be under way then, ahead of the engine's
        work: see `settle`. `by_layer`: the engine calls `before_layer` before it reads a layer."""
        started_s = time.monotonic()
        reached = order.stop
        secured = self._prepared.pop(order.request, None)
        way = _Way(after, by_layer, secured)
        until_s = started_s + (deadline_s or self._deadline_s)
        try:
            for digest, run in order.runs.items():
                stored = self._parts.get(digest)
                if stored is not None:  # else another worker's
                    reached = min(reached, self._load_part(stored, run, order, until_s, way))
        except Exception:
            logger.exception("kvtier: a load failed")
            reached = order.start
        finally:
            if secured is not None and way.under_way:
                self._under_way.append(_UnderWay(order, secured, way.under_way, started_s))
            elif secured is not None:
                secured.release()
        if not way.under_way:
            self._tally.add(load_seconds=time.monotonic() - started_s)
        if reached < order.stop:
            self._tally.add(failed_loads=1)
        return reached

    def before_layer(self, name: str) -> None:
        """What the engine begins next sees that layer of what is under way."""
        for each in self._under_way:
            for filling in each.fillings:
                filling.before(name)

    def settle(self) -> list[LoadOrder]:
        """Return once no load is under way; those that failed although they were begun."""
        if not self._under_way:
            return []
        ended, self._under_way = self._under_way, []
        failed = [each.order for each in ended if not each.finish()]
        seconds = sum(time.monotonic() - each.started_s for each in ended)
        self._tally.add(load_seconds=seconds, failed_loads=len(failed))
        return failed

    def _load_part(
        self, stored: Stored, run: Run, order: LoadOrder, until_s: float, way: _Way
    ) -> int:
        """Load one part's run from what is secured or, until a time, from the service."""
        if way.secured is not None:
            first = run.first - way.secured.first
            chunks = way.secured.chunks[stored.part.digest][first : first + len(run.prefix)]
            return self._scatter(stored, run, order, chunks, way)
        if not stored.client.connected:
            # The scheduler's side is connected, or it would not have ordered this.
            stored.client.wait_ready(max(0.0, until_s - time.monotonic()))
        left_s = max(_LEAST_S, until_s - time.monotonic())
        if order.background and self._copies.takes_vram:
            return self._load_with_vram(stored, run, order, left_s, way)
        with stored.client.load(run.prefix, left_s) as loaded:
            return self._scatter(stored, run, order, list(loaded), way)

    def _load_with_vram(
        self, stored: Stored, run: Run, order: LoadOrder, left_s: float, way: _Way
    ) -> int:
        """As `_load_part`, with chunks in VRAM taken where they are. They count only if the service
        says afterwards that it held them: if it died, its memory may have been another's."""
        with stored.client.load(run.prefix, left_s, in_vram=True) as loaded:
            chunks = list(loaded)
            reached = self._scatter(stored, run, order, chunks, way)
            in_vram = next((chunk.index for chunk in chunks if _is_in_vram(chunk)), None)
            if in_vram is not None and not loaded.release():
                return min(reached, _reached(stored.part, run, order, in_vram))
        return reached

    def _scatter(
        self, stored: Stored, run: Run, order: LoadOrder, chunks: Sequence[LoadedChunk], way: _Way
    ) -> int:
        """Copy a run's leading chunks into their blocks; up to which token that is."""
        tokens = stored.part.space.layout.tokens
        landed = [
            Landed(
                chunk.data,
                blocks_of(stored.part, run, index),
                max(0, order.start - (run.first + index) * tokens),
                chunk.span,
            )
            for index, chunk in enumerate(chunks)
        ]
        if way.secured is None:
            self._copies.scatter(stored.pages, landed, way.after)
        else:
            # Of the last block's tokens the forward may write one, before it waits for the layer.
            by_layer = way.by_layer and order.stop % tokens == 0
            filling = self._copies.begin(stored.pages, landed, way.after, by_layer=by_layer)
            if filling is not None:
                way.under_way.append(filling)
        self._tally.add(loaded_chunks=len(landed), loaded_bytes=len(landed) * stored.pages.nbytes)
        return _reached(stored.part, run, order, len(landed))


def _is_in_vram(chunk: LoadedChunk) -> bool:
    return chunk.span is not None and chunk.span.region.place is Place.DEVICE


def _reached(part: Part, run: Run, order: LoadOrder, chunks: int) -> int:
    """Up to which token an order succeeded with so many leading chunks of a run."""
    if chunks == len(run.prefix):
        return order.stop
    return max(order.start, (run.first + chunks) * part.space.layout.tokens)


def blocks_of(part: Part, run: Run, index: int) -> Mapping[int, Sequence[int]]:
    """The block ids of one chunk of a run, for each group."""
    tokens = part.space.layout.tokens
    return {
        group: run.blocks[group][
            index * tokens // block_tokens : (index + 1) * tokens // block_tokens
        ]
        for group, block_tokens in part.groups
    }
