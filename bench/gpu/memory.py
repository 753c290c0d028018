"""Memory that measurements copy between: pinned on the host, or a device's, and what is in it."""

import mmap
from dataclasses import dataclass

import numpy as np

from kvtier.bench.payload import Buffer, WrongBytes
from kvtier.kernels.device import Device, Region, Span, Urgency

POISON = 0xAA  # what is there where nothing was copied


@dataclass(frozen=True, slots=True)
class Pinned:
    """Host memory that a device copies from and to by itself; `array` is all of it."""

    array: Buffer
    region: Region


def pinned(device: Device, nbytes: int) -> Pinned:
    """Fresh pinned memory, every page of it touched, until the device is closed."""
    memory = memoryview(mmap.mmap(-1, nbytes))
    array = np.frombuffer(memory, np.uint8)
    array.fill(POISON)
    return Pinned(array, device.register(memory))


def cut(region: Region, nbytes: int) -> list[Span]:
    """A region as consecutive spans of that size; what is left over is in none."""
    return [region.span(at, nbytes) for at in range(0, region.nbytes - nbytes + 1, nbytes)]


class Window:
    """What lies in any memory that a device reaches, seen and written by way of pinned memory of at
    least its size. Everything is done when a call returns."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device = device
        self._stream = device.stream(Urgency.LOADS)
        self._pinned = pinned(device, nbytes)

    def write(self, target: Span, content: Buffer) -> None:
        """Put contents of the span's size there."""
        self._pinned.array[: target.nbytes] = content
        self._copy(target, self._part(target.nbytes))

    def wipe(self, target: Span) -> None:
        """Put poison there."""
        self._pinned.array[: target.nbytes] = POISON
        self._copy(target, self._part(target.nbytes))

    def read(self, source: Span) -> Buffer:
        """What is there; good until the next call."""
        self._copy(self._part(source.nbytes), source)
        return self._pinned.array[: source.nbytes]

    def check(self, source: Span, right: Buffer, what: str) -> None:
        """Raise WrongBytes, which says what it is, unless the right bytes are there."""
        if not np.array_equal(self.read(source), right):
            raise WrongBytes(f"{what}: other bytes than there should be")

    def _part(self, nbytes: int) -> Span:
        return self._pinned.region.span(0, nbytes)

    def _copy(self, target: Span, source: Span) -> None:
        self._device.copy(self._stream, [(target, source)])
        self._stream.synchronize()
