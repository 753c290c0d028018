"""Offloads straight out of an engine's blocks: chunks are gathered while others are copied."""

from collections.abc import Iterable
from contextlib import suppress

from kvtier.client.offloading import WriteSlot
from kvtier.client.paged_jobs import fill_chunks
from kvtier.kernels.device import Device, DeviceError, Event, Span, Urgency
from kvtier.kernels.paged import PagedCache, Places
from kvtier.spaces import Layout


class Offloads:
    """All offloads of one engine, one at a time. The host only queues: at most one chunk is on the
    bus, and as many as there are buffers have left the blocks and not arrived."""

    def __init__(
        self, device: Device, cache: PagedCache, layout: Layout, buffers: tuple[Span, ...]
    ) -> None:
        self._device = device
        self._cache = cache
        self._layout = layout
        self._buffers = buffers
        # Two: on one, the bus would rest while a chunk is gathered.
        self._gathers = device.stream(Urgency.OFFLOADS)
        self._copies = device.stream(Urgency.OFFLOADS)

    def fill(self, slots: Iterable[WriteSlot], places: Places, after: Event) -> None:
        """Fill slots as far as the device reaches them. No block is read any more once all slots
        have arrived.

        Raises DeviceError: then nothing is under way, and the slot that came last is not filled.
        """
        try:
            self._gathers.wait(after)
            self._fill(slots, places)
        except BaseException:
            self.settle()
            raise

    def settle(self) -> None:
        """Wait until nothing is under way, as far as a device at fault can say."""
        for stream in (self._gathers, self._copies):
            with suppress(DeviceError):
                stream.synchronize()

    def _fill(self, slots: Iterable[WriteSlot], places: Places) -> None:
        left: dict[Span, Event] = {}  # when a buffer's last chunk has left it
        for number, slot in enumerate(slots):
            if slot.span is None:
                return
            buffer = self._buffers[number % len(self._buffers)]
            if buffer in left:
                self._gathers.wait(left[buffer])
            job = fill_chunks(self._cache, self._layout, [buffer], places[[slot.index]])
            self._device.launch(self._gathers, job.kernel, job.threads, job.job)
            self._copies.wait(self._gathers.record())
            self._device.copy(self._copies, [(slot.span, buffer)])
            slot.arrival = left[buffer] = self._copies.record()
