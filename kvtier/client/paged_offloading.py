"""Offloads straight out of an engine's blocks: each chunk is gathered while another is copied."""

from collections.abc import Iterable
from contextlib import suppress

from kvtier.client.offloading import WriteSlot
from kvtier.client.paged_loading import Tables
from kvtier.kernels.device import Device, DeviceError, Event, Span, Urgency
from kvtier.kernels.paged import PagedCache, gather
from kvtier.spaces import Layout


class Offloads:
    """All offloads of one engine, one at a time. At most one chunk is on the bus."""

    def __init__(
        self, device: Device, cache: PagedCache, layout: Layout, buffers: tuple[Span, Span]
    ) -> None:
        self._device = device
        self._cache = cache
        self._layout = layout
        self._buffers = buffers
        # Two: on one, the bus would rest while a chunk is gathered.
        self._gathers = device.stream(Urgency.OFFLOADS)
        self._copies = device.stream(Urgency.OFFLOADS)

    def fill(self, slots: Iterable[WriteSlot], tables: Tables, after: Event) -> None:
        """Fill slots as far as the device reaches them; returns when no block is read any more.

        The tables are checked. Raises DeviceError: then the slot that came last is not filled, and
        its loop must end.
        """
        try:
            self._gathers.wait(after)
            self._fill(slots, tables)
            self._gathers.synchronize()  # one more than was wanted may be under way
        except BaseException:
            for stream in (self._gathers, self._copies):
                with suppress(DeviceError):
                    stream.synchronize()
            raise

    def _fill(self, slots: Iterable[WriteSlot], tables: Tables) -> None:
        ahead = -1  # what was gathered before it was asked for, and when it is
        gathered: Event | None = None
        for slot in slots:
            if slot.span is None:
                return
            if gathered is None or ahead != slot.index:
                gathered = self._gather(slot.index, tables)
            self._copies.wait(gathered)
            self._device.copy(self._copies, [(slot.span, self._buffer(slot.index))])
            written = self._copies.record()
            # Nearly always the next one is wanted: what is held already leads the prefix.
            ahead = slot.index + 1
            gathered = self._gather(ahead, tables) if ahead < len(tables) else None
            written.synchronize()  # a slot counts as written when the loop goes on

    def _gather(self, index: int, tables: Tables) -> Event:
        # The copy before the last has left this buffer: the host waited for it.
        job = gather(self._cache, self._layout, [self._buffer(index)], [tables[index]])
        self._device.launch(self._gathers, job.kernel, job.threads, job.job)
        return self._gathers.record()

    def _buffer(self, index: int) -> Span:
        return self._buffers[index % 2]
