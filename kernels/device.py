"""What a device is: memory with an address, streams of work, events that order them.

The code that moves bytes is written once, against this. `host.py` implements it with real
asynchrony on a CPU, `cuda.py` on an NVIDIA GPU. Nothing else knows which one it has.

Work is queued on streams. Work on one stream is done in order; work on two streams in any order,
but for what events order. A call that queues work returns at once, and what it names (spans, host
memory, block tables) must stay as it is until an event recorded after it is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from kvtier.errors import KvtierError

HANDLE_BYTES = 64  # what CUDA gives a process for another one


class DeviceError(KvtierError):
    """The device, its driver or its runtime refused; the message says what and what to do."""


class DeviceFault(DeviceError):
    """Work failed on the device, and what is queued behind it is not done. On a GPU that holds for
    all further work of the process (CUDA Runtime API, cudaError)."""


class OutOfDeviceMemory(DeviceError):
    """The device has not as much free memory as was asked for."""


class Place(Enum):
    """Where a region's bytes are."""

    HOST = "host"  # pinned: the device copies from and to it by itself
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Region:
    """Memory that a device can address: allocated, registered or opened by it, and given back by
    `Device.release`. `address` is the device's."""

    place: Place
    address: int
    nbytes: int

    def span(self, offset: int, nbytes: int) -> "Span":
        """A part of it. Raises ValueError when it reaches outside."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"span: {nbytes} bytes at {offset} of a region of {self.nbytes}")
        return Span(self, offset, nbytes)


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of a region."""

    region: Region
    offset: int
    nbytes: int

    @property
    def address(self) -> int:
        return self.region.address + self.offset


class Event(Protocol):
    """A point in a stream's work."""

    @property
    def done(self) -> bool:
        """Whether all work before it is done."""
        ...

    def synchronize(self) -> None:
        """Block until it is. Raises DeviceFault where that work failed."""
        ...


class Stream(Protocol):
    """A queue of work on a device. For any thread."""

    @property
    def handle(self) -> int:
        """What the device's runtime knows it by, to share it with other libraries."""
        ...

    def record(self) -> Event:
        """A point after all work that is queued now."""
        ...

    def wait(self, event: Event) -> None:
        """Work that is queued from now on begins once the event is done. Does not block."""
        ...

    def synchronize(self) -> None:
        """Block until all work that is queued now is done. Raises DeviceFault where it failed."""
        ...


class Urgency(Enum):
    """Which stream's work a device begins first where it has a choice."""

    LOADS = "loads"  # somebody waits
    OFFLOADS = "offloads"


class Device(Protocol):
    """One device, as one process uses it. For any thread."""

    @property
    def name(self) -> str:
        """Such as "cuda:0"."""
        ...

    def stream(self, urgency: Urgency) -> Stream:
        """A new stream."""
        ...

    def stream_of(self, handle: int) -> Stream:
        """A stream that another library of this process made and keeps alive."""
        ...

    def allocate(self, nbytes: int) -> Region:
        """Device memory. Raises OutOfDeviceMemory, ValueError for a size that cannot be right."""
        ...

    def register(self, memory: memoryview) -> Region:
        """Pin host memory, which must stay mapped until it is released. Raises DeviceError."""
        ...

    def adopt(self, address: int, nbytes: int) -> Region:
        """Device memory that another library of this process owns and keeps; it is not released."""
        ...

    def export(self, region: Region) -> bytes:
        """The handle of allocated memory for another process, of HANDLE_BYTES."""
        ...

    def open(self, handle: bytes, nbytes: int) -> Region:
        """Map memory that another process exported, or find it where this very device did.

        Raises DeviceError when the handle is not one, is of another device, or names less memory
        than `nbytes`.
        """
        ...

    def release(self, region: Region) -> None:
        """Give back what was allocated, registered or opened; no work may be using it. Raises
        ValueError for what was adopted or given back already."""
        ...

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        """Queue copies, (to, from) each, of spans of the same size; those of one call in any order.

        Raises ValueError when sizes differ.
        """
        ...

    def launch(self, stream: Stream, kernel: str, threads: int, job: bytes) -> None:
        """Queue a kernel of `csrc/` by its name, on at least that many threads.

        The kernel's only argument is the address of a copy of `job`, 64-bit integers in the order
        that the kernel says; the device keeps the copy. Raises DeviceError when the kernel cannot
        be compiled or started, ValueError for a job that cannot be right.
        """
        ...

    def describe(self) -> dict[str, str]:
        """What its figures rest on: its "model", and by name the versions of what it runs with."""
        ...

    def close(self) -> None:
        """Release all that is left. Nothing may be queued any more."""
        ...
