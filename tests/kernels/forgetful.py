"""A device that forgets one wait, to test that tests of code notice when one is missing."""

from collections.abc import Sequence

from kvtier.kernels.device import Device, Event, Region, Span, Stream, Urgency


class _Waits:
    def __init__(self, forget: int) -> None:
        self.count = 0
        self._forget = forget

    def forgets(self) -> bool:
        self.count += 1
        return self.count - 1 == self._forget


class _ForgetfulEvent:
    def __init__(self, event: Event, waits: _Waits) -> None:
        self.event = event
        self._waits = waits

    @property
    def done(self) -> bool:
        return self.event.done

    def synchronize(self) -> None:
        if not self._waits.forgets():
            self.event.synchronize()


class _ForgetfulStream:
    def __init__(self, stream: Stream, waits: _Waits) -> None:
        self.stream = stream
        self._waits = waits

    @property
    def handle(self) -> int:
        return self.stream.handle

    def record(self) -> Event:
        return _ForgetfulEvent(self.stream.record(), self._waits)

    def wait(self, event: Event) -> None:
        assert isinstance(event, _ForgetfulEvent)
        if not self._waits.forgets():
            self.stream.wait(event.event)

    def synchronize(self) -> None:
        if not self._waits.forgets():
            self.stream.synchronize()


class Forgetful:
    """The device, but that the wait numbered `forget` does not happen.

    Waits are `Stream.wait`, `Stream.synchronize` and `Event.synchronize`, counted from 0 in the
    order in which they are called; a number that is never reached (such as -1) forgets none.
    `waits` is how many there were. Polling `Event.done` is none.
    """

    def __init__(self, device: Device, forget: int) -> None:
        self.name = device.name
        self._device = device
        self._waits = _Waits(forget)

    @property
    def waits(self) -> int:
        return self._waits.count

    def stream(self, urgency: Urgency) -> Stream:
        return _ForgetfulStream(self._device.stream(urgency), self._waits)

    def stream_of(self, handle: int) -> Stream:
        return _ForgetfulStream(self._device.stream_of(handle), self._waits)

    def allocate(self, nbytes: int) -> Region:
        return self._device.allocate(nbytes)

    def register(self, memory: memoryview) -> Region:
        return self._device.register(memory)

    def adopt(self, address: int, nbytes: int) -> Region:
        return self._device.adopt(address, nbytes)

    def export(self, region: Region) -> bytes:
        return self._device.export(region)

    def open(self, handle: bytes, nbytes: int) -> Region:
        return self._device.open(handle, nbytes)

    def release(self, region: Region) -> None:
        self._device.release(region)

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        assert isinstance(stream, _ForgetfulStream)
        self._device.copy(stream.stream, pairs)

    def launch(self, stream: Stream, kernel: str, threads: int, job: bytes) -> None:
        assert isinstance(stream, _ForgetfulStream)
        self._device.launch(stream.stream, kernel, threads, job)

    def describe(self) -> dict[str, str]:
        return self._device.describe()

    def close(self) -> None:
        self._device.close()
