"""Loads straight into an engine's blocks: all of each chunk at once, or layer by layer."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self, TypeAlias

from kvtier.client.loading import Loaded
from kvtier.client.paged_health import Health
from kvtier.client.paged_jobs import fill_blocks
from kvtier.kernels.device import Device, DeviceError, Event, Place, Span, Urgency
from kvtier.kernels.paged import PagedCache, Places
from kvtier.spaces import Layout

# From this size on a copy and a kernel are faster than a kernel that reads RAM by itself. A guess:
# what starting a copy takes, in bytes of the bus. `kvtier bench gpu` is to measure it.
LEAST_COPY_BYTES = 64 << 10
# Of one kernel: few launches, and far fewer items than a kernel can count.
_JOB_BYTES = 256 << 20

Tables: TypeAlias = Sequence[Sequence[int]]
"""For each chunk the ids of the blocks that hold its tokens, in order."""


@dataclass(frozen=True, slots=True)
class Part:
    """What of every chunk is moved before the next part of any: all of it, or one layer.

    Where that is contiguous, as in every quantised chunk, it is a chunk of its own, of `nbytes`
    from `offset` in the other, with a cache and a layout to match. Else `layers` says which ones of
    the whole it is.
    """

    cache: PagedCache
    layout: Layout
    nbytes: int  # the layout's, which takes too long to ask for each chunk
    offset: int = 0
    layers: range | None = None

    def of(self, chunk: Span) -> Span:
        """Where a chunk has it."""
        return chunk.region.span(chunk.offset + self.offset, self.nbytes)


def parts_of(cache: PagedCache, layout: Layout, *, by_layer: bool) -> list[Part]:
    """The parts of a load, in order."""
    whole = layout.nbytes
    if not by_layer:
        return [Part(cache, layout, whole)]
    outside = layout.shape[: layout.axes.split(",").index("layer")]
    if math.prod(outside) > 1:
        each = range(layout.layers)
        return [Part(cache, layout, whole, layers=range(n, n + 1)) for n in each]
    one, nbytes = replace(layout, layers=1), whole // layout.layers
    return [
        Part(replace(cache, bases=(planes,)), one, nbytes, offset=n * nbytes)
        for n, planes in enumerate(cache.bases)
    ]


def goes_through_staging(part: Part, place: Place, least_copy_bytes: int) -> bool:
    """Whether the copy engine brings a part of a chunk to the device first. Else a kernel reads it
    where it is: in VRAM, or in RAM if it is small or lies in pieces."""
    contiguous = part.layers is None
    return place is Place.HOST and contiguous and part.nbytes >= least_copy_bytes


class PagedLoad:
    """A load into an engine's blocks, under way. `chunks` is how many leading chunks of the prefix
    are. Finish it, or use it as a context manager."""

    def __init__(
        self,
        loaded: Loaded | None,
        chunks: Sequence[Span],
        ready: Sequence[Event],
        health: Health,
    ) -> None:
        self.chunks = len(chunks)
        in_vram = [n for n, span in enumerate(chunks) if span.region.place is Place.DEVICE]
        self._before_vram = in_vram[0] if in_vram else self.chunks
        self._loaded = loaded
        self._health = health
        self._ready = ready
        self._right = 0

    def ready(self, layer: int) -> Event:
        """From when on the blocks have that layer of all chunks. Layers come in order; of a load
        that is not by layer, all together."""
        return self._ready[layer if len(self._ready) > 1 else 0]

    def finish(self) -> int:
        """Wait until nothing is read any more, and release the chunks; returns how many leading
        ones are right. What the blocks of the others hold is undefined.

        Chunks in VRAM are right only if the service says afterwards that it still held them. If it
        died, its memory may have been another's while it was read. Finishing again returns the
        same.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            try:
                self._right = self._count_right(loaded)
            finally:
                loaded.__exit__(None, None, None)
        return self._right

    def _count_right(self, loaded: Loaded) -> int:
        if not self.chunks:
            return 0
        try:
            self._ready[-1].synchronize()
        except DeviceError as error:
            self._health.note("nothing is loaded", error)
            return 0
        if self._before_vram < self.chunks and not loaded.release():
            return self._before_vram
        return self.chunks

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()


@dataclass(slots=True, eq=False)
class _Buffer:
    """Room for a chunk in staging. It may be filled once `free` is done."""

    span: Span
    free: Event | None = None


class Loads:
    """All loads of one engine. They begin on one thread at a time; any may finish them."""

    def __init__(
        self, device: Device, buffers: Iterable[Span], least_copy_bytes: int, health: Health
    ) -> None:
        self._device = device
        self._health = health
        self._least_copy_bytes = least_copy_bytes
        self._buffers = deque(_Buffer(span) for span in buffers)
        # Two: on one, the bus would rest while a chunk is scattered.
        self._copies = device.stream(Urgency.LOADS)
        self._scatters = device.stream(Urgency.LOADS)

    def begin(
        self, loading: Loaded, parts: Sequence[Part], places: Places, after: Event
    ) -> PagedLoad:
        """Queue a load to places that are to be written."""
        with ExitStack() as undo:
            loaded = undo.enter_context(loading)
            undo.callback(self._settle)
            try:
                chunks, ready = self._queue(loaded, parts, places, after)
            except DeviceError as error:
                self._health.note("nothing is loaded", error)
                self._settle()
                chunks, ready = [], [after]
            undo.pop_all()  # it is the load's now
        return PagedLoad(loaded, chunks, ready, self._health)

    def _settle(self) -> None:
        """Wait until nothing is under way, as far as a device at fault can say."""
        for stream in (self._copies, self._scatters):
            with suppress(DeviceError):
                stream.synchronize()

    def _queue(
        self, loaded: Loaded, parts: Sequence[Part], places: Places, after: Event
    ) -> tuple[list[Span], list[Event]]:
        """Queue each part of all chunks; returns the chunks, and when each part is ready. The first
        part of a chunk is queued when that lands."""
        chunks: list[Span] = []
        ready: list[Event] = []
        self._scatters.wait(after)
        source: Iterable[Span] = _landing(loaded, chunks)
        for part in parts:
            self._queue_part(part, source, places)
            ready.append(self._scatters.record())
            source = chunks
        return chunks, ready

    def _queue_part(self, part: Part, chunks: Iterable[Span], places: Places) -> None:
        direct = _Batch(part, places, _JOB_BYTES)
        staged = _Batch(part, places, self._buffers[0].span.nbytes)
        for index, chunk in enumerate(chunks):
            through = goes_through_staging(part, chunk.region.place, self._least_copy_bytes)
            batch = staged if through else direct
            batch.sources.append(part.of(chunk))
            batch.chunks.append(index)
            if batch.full:
                self._send(batch, through=through)
        self._send(direct, through=False)
        self._send(staged, through=True)

    def _send(self, batch: "_Batch", *, through: bool) -> None:
        """Queue a batch, and empty it."""
        if not batch.sources:
            return
        if through:
            buffer = self._fill_buffer(batch)
            self._scatter(batch)
            buffer.free = self._scatters.record()
        else:
            self._scatter(batch)
        batch.clear()

    def _fill_buffer(self, batch: "_Batch") -> _Buffer:
        """Copy a batch into staging, where its sources are then."""
        buffer = self._buffers.popleft()
        self._buffers.append(buffer)
        if buffer.free is not None:
            self._copies.wait(buffer.free)
        inside = [
            buffer.span.region.span(buffer.span.offset + place * source.nbytes, source.nbytes)
            for place, source in enumerate(batch.sources)
        ]
        self._device.copy(self._copies, list(zip(inside, batch.sources, strict=True)))
        self._scatters.wait(self._copies.record())
        batch.sources = inside
        return buffer

    def _scatter(self, batch: "_Batch") -> None:
        part, places = batch.part, batch.places[batch.chunks]
        job = fill_blocks(part.cache, part.layout, batch.sources, places, part.layers)
        self._device.launch(self._scatters, job.kernel, job.threads, job.job)


@dataclass(slots=True)
class _Batch:
    """Parts of some `chunks` that go together, and the places of all chunks."""

    part: Part
    places: Places
    most_bytes: int
    sources: list[Span] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return (len(self.sources) + 1) * self.part.nbytes > self.most_bytes

    def clear(self) -> None:
        self.sources, self.chunks = [], []


def _landing(loaded: Loaded, chunks: list[Span]) -> Iterator[Span]:
    """Chunks as they land, noted in `chunks`, as far as this session's device reaches them."""
    for chunk in loaded:
        if chunk.span is None:
            return
        chunks.append(chunk.span)
        yield chunk.span
