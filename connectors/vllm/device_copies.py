"""Copies between the engine's blocks and chunks through kvtier's own device.

Loads: the copy engine brings chunks from the registered arena to staging, and a kernel scatters
them from there; chunks in VRAM, and small parts of chunks in RAM, the kernel reads where they are.
Offloads: a kernel gathers a chunk in staging, the copy engine brings it to its slot. No thread of
torch is in the way, and no byte passes through pageable memory.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import torch

from kvtier.client.paged_loading import LEAST_COPY_BYTES
from kvtier.connectors.vllm.copies import Copies, Filling, Landed, copies_for
from kvtier.connectors.vllm.paged import Pages
from kvtier.connectors.vllm.slices import Slice, Tables, each_layer, whole
from kvtier.errors import InvalidRequest
from kvtier.kernels.device import Device, DeviceError, Event, Place, Span, Stream, Urgency
from kvtier.kernels.devices import open_device
from kvtier.kernels.paged import Job

logger = logging.getLogger(__name__)

# From so many bytes of each layer on, a load is brought layer by layer. A guess until it is
# measured: what a bus brings while the host makes the jobs of one more layer.
LEAST_LAYER_BYTES = 16 << 20
_ALIGNMENT = 256  # of what is staged, for the kernels' widest accesses
_LOAD_BUFFERS = 2  # one is filled while another is emptied
_JOB_BYTES = 256 << 20  # of one kernel: far fewer items than it can count


def open_copies(pages: Sequence[Pages]) -> tuple[Copies, Device | None]:
    """The copies of all parts of an engine and, where they are a device's, that: clients connect
    with it, and it is closed after them. A device that cannot be had is said in the log."""
    where = pages[0].device
    if where.type != "cuda":
        return copies_for(where), None
    device: Device | None = None
    try:
        device = open_device(f"cuda:{where.index or 0}")
        return DeviceCopies(device, lambda: _current(device, where), pages), device
    except (DeviceError, InvalidRequest) as error:
        logger.warning("kvtier: copies with torch, VRAM is not used: %s", error)
        if device is not None:
            device.close()
    return copies_for(where), None


def _current(device: Device, where: torch.device) -> Stream:
    """The stream to which this thread of the engine gives its work."""
    return device.stream_of(torch.cuda.current_stream(where).cuda_stream)


@dataclass(slots=True, eq=False)
class _Buffer:
    """Room for a chunk in staging. It may be filled once `free` is done."""

    span: Span
    free: Event | None = None


class DeviceCopies:
    """The engine's blocks are on a device of kvtier's. `engine` is the stream of the thread that
    asks; `pages` are all parts whose chunks are moved.

    Takes staging for three chunks of the device's memory and moves a chunk once, to see that it
    can. A chunk that the device does not reach goes the way of torch. Parts of chunks in RAM of at
    least `least_copy_bytes` are staged; loads come by layer from `least_layer_bytes` of each on.

    Raises DeviceError when the device has no room or cannot run kernels, InvalidRequest when the
    blocks are not what kernels move.
    """

    takes_vram = True

    def __init__(
        self,
        device: Device,
        engine: Callable[[], Stream],
        pages: Sequence[Pages],
        *,
        least_copy_bytes: int = LEAST_COPY_BYTES,
        least_layer_bytes: int = LEAST_LAYER_BYTES,
    ) -> None:
        self._device = device
        self._engine = engine
        self._whole = {each: whole(each) for each in pages}
        self._layers = {each: each_layer(each) for each in pages}
        self._least_copy_bytes = least_copy_bytes
        self._least_layer_bytes = least_layer_bytes
        self._torch = copies_for(pages[0].device)
        room = -(-max(each.nbytes for each in pages) // _ALIGNMENT) * _ALIGNMENT
        self._staging = device.allocate((1 + _LOAD_BUFFERS) * room)
        spans = [self._staging.span(n * room, room) for n in range(1 + _LOAD_BUFFERS)]
        self._outgoing, self._buffers = spans[0], [_Buffer(span) for span in spans[1:]]
        # Two for loads: on one, the bus would rest while a chunk is scattered.
        self._copies = device.stream(Urgency.LOADS)
        self._scatters = device.stream(Urgency.LOADS)
        self._gathers = device.stream(Urgency.OFFLOADS)
        self._closed = False
        self._lock = threading.Lock()  # of the streams of loads and their buffers
        self._try()

    def mark(self) -> object:
        return self._engine().record()

    def reach(self, mark: object) -> None:
        cast(Event, mark).synchronize()

    def scatter(self, pages: Pages, chunks: Sequence[Landed], after: object) -> None:
        spans = _spans(chunks)
        if spans is None:
            self.reach(after)
            self._torch.scatter(pages, chunks, self._torch.mark())
        else:
            (ready,) = self._queue([self._whole[pages]], chunks, spans, after)
            self.wait_for(ready)

    def begin(
        self, pages: Pages, chunks: Sequence[Landed], after: object, *, by_layer: bool
    ) -> Filling | None:
        spans = _spans(chunks)
        if spans is None:
            self.scatter(pages, chunks, after)
            return None
        layers = self._layers[pages]
        if by_layer and len(chunks) * layers[0].nbytes >= self._least_layer_bytes:
            ready = self._queue(layers, chunks, spans, after)
            return _Filling(self, dict(zip(pages.layer_names, ready, strict=True)), ready[-1])
        (done,) = self._queue([self._whole[pages]], chunks, spans, after)
        try:
            self.order(done)
        except BaseException:
            self._settle()
            raise
        return _Filling(self, {}, done)

    def gather(
        self,
        pages: Pages,
        data: memoryview,
        blocks: Mapping[int, Sequence[int]],
        span: Span | None,
    ) -> None:
        if span is None:
            self._torch.gather(pages, data, blocks, None)
            return
        pages.check(blocks)
        filled = self._staging.span(self._outgoing.offset, pages.nbytes)
        try:
            self._launch(self._gathers, self._whole[pages].gather(filled, blocks))
            self._device.copy(self._gathers, [(span, filled)])
        finally:
            self._gathers.synchronize()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._settle()
            with suppress(DeviceError):
                self._gathers.synchronize()
                self._device.release(self._staging)
        self._torch.close()

    def order(self, event: Event) -> None:
        """What this thread of the engine begins next comes after the event."""
        self._engine().wait(event)

    def wait_for(self, ready: Event) -> None:
        """Wait for what was queued. Raises DeviceError when it failed; then, too, nothing is read
        any more."""
        try:
            ready.synchronize()
        except DeviceError:
            self._settle()
            raise

    def _queue(
        self,
        slices: Iterable[Slice],
        chunks: Sequence[Landed],
        spans: Sequence[Span],
        after: object,
    ) -> list[Event]:
        """Queue each slice of all chunks; returns when each is ready. Where it raises, nothing is
        under way."""
        with self._lock:
            if self._closed:
                raise DeviceError("copies: closed")
            try:
                tables = Tables(chunks)
                self._scatters.wait(cast(Event, after))
                return [self._queue_slice(each, spans, tables) for each in slices]
            except BaseException:
                self._settle()
                raise

    def _queue_slice(self, each: Slice, spans: Sequence[Span], tables: Tables) -> Event:
        staged: list[int] = []
        direct: list[int] = []
        for chunk, span in enumerate(spans):
            in_ram = span.region.place is Place.HOST
            through = in_ram and each.nbytes >= self._least_copy_bytes
            (staged if through else direct).append(chunk)
        for batch in _batches(direct, _JOB_BYTES // each.nbytes):
            sources = [each.of(spans[chunk]) for chunk in batch]
            self._launch(self._scatters, each.scatter(sources, batch, tables))
        for batch in _batches(staged, self._outgoing.nbytes // each.nbytes):
            buffer = self._buffers.pop(0)
            self._buffers.append(buffer)
            sources = self._fill(buffer, [each.of(spans[chunk]) for chunk in batch])
            self._launch(self._scatters, each.scatter(sources, batch, tables))
            buffer.free = self._scatters.record()
        return self._scatters.record()

    def _fill(self, buffer: _Buffer, sources: Sequence[Span]) -> list[Span]:
        """Copy sources into a buffer, one after the other; returns where they are then."""
        if buffer.free is not None:
            self._copies.wait(buffer.free)
        inside = [
            self._staging.span(buffer.span.offset + place * source.nbytes, source.nbytes)
            for place, source in enumerate(sources)
        ]
        self._device.copy(self._copies, list(zip(inside, sources, strict=True)))
        self._scatters.wait(self._copies.record())
        return inside

    def _launch(self, stream: Stream, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._device.launch(stream, job.kernel, job.threads, job.job)

    def _settle(self) -> None:
        """Wait until no load is under way, as far as a device at fault can say."""
        for stream in (self._copies, self._scatters):
            with suppress(DeviceError):
                stream.synchronize()

    def _try(self) -> None:
        """Gather a chunk of block 0, which is the engine's for nothing, behind the engine's work.
        Raises DeviceError."""
        try:
            self._gathers.wait(self._engine().record())
            for pages, each in self._whole.items():
                tokens = pages.block_tokens.items()
                blocks = {group: [0] * (pages.shape[2] // count) for group, count in tokens}
                filled = self._staging.span(self._outgoing.offset, pages.nbytes)
                self._launch(self._gathers, each.gather(filled, blocks))
            self._gathers.synchronize()
        except BaseException:
            self.close()
            raise


@dataclass(frozen=True, slots=True)
class _Filling:
    """Chunks under way, ahead of the engine's work: when each layer is ready that is waited for by
    itself, and when all is."""

    copies: DeviceCopies
    ready: dict[str, Event]
    done: Event

    def before(self, layer: str) -> None:
        if (ready := self.ready.get(layer)) is not None:
            self.copies.order(ready)

    def finish(self) -> None:
        self.copies.wait_for(self.done)


def _spans(chunks: Sequence[Landed]) -> list[Span] | None:
    """Where a device reaches chunks; None when it does not."""
    spans = [chunk.span for chunk in chunks if chunk.span is not None]
    return spans if len(spans) == len(chunks) else None


def _batches(chunks: Sequence[int], count: int) -> Iterable[Sequence[int]]:
    """At most so many at a time, one at least."""
    step = max(1, count)
    return (chunks[start : start + step] for start in range(0, len(chunks), step))
