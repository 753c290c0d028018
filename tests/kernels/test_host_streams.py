"""The streams of the device without a GPU: what goes wrong, and how they end."""

import os
import threading
from collections.abc import Callable

import pytest

from kvtier.kernels.device import DeviceError, Event, Stream, Urgency
from kvtier.kernels.host import HostDevice
from kvtier.kernels.host_streams import Chaos
from tests.contracts.device import HANG_S

CHAOS = [None, Chaos(0), Chaos(1)]


class Calling:
    """Kernels that are one function."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    def run(self, kernel: str, threads: int, job_address: int) -> None:
        self._call()


def launch(device: HostDevice, stream: Stream) -> None:
    device.launch(stream, "any", 1, bytes(8))


@pytest.mark.parametrize("chaos", CHAOS)
@pytest.mark.parametrize("error", [SystemExit, MemoryError, ValueError])
def test_whatever_work_raises_is_raised_where_the_host_waits(
    chaos: Chaos | None, error: type[BaseException]
) -> None:
    def fail() -> None:
        raise error

    device = HostDevice(chaos, Calling(fail))
    stream = device.stream(Urgency.LOADS)
    launch(device, stream)
    for _ in range(2):
        with pytest.raises(DeviceError, match=f"stream 1 failed: {error.__name__}"):
            stream.synchronize()
    device.close()


@pytest.mark.parametrize("chaos", CHAOS)
def test_events_of_a_closed_device_are_done_and_its_streams_take_nothing(
    chaos: Chaos | None,
) -> None:
    device = HostDevice(chaos)
    stream = device.stream(Urgency.LOADS)
    event = stream.record()
    device.close()
    assert event.done
    event.synchronize()
    calls = (stream.record, lambda: stream.wait(event), lambda: device.stream(Urgency.LOADS))
    for call in calls:
        with pytest.raises(DeviceError, match="closed; open it again"):
            call()


@pytest.mark.parametrize("chaos", CHAOS)
def test_closing_leaves_no_event_undone_whoever_queues_meanwhile(chaos: Chaos | None) -> None:
    device = HostDevice(chaos)
    started = threading.Barrier(5, timeout=HANG_S)
    events: list[Event] = []

    def queue() -> None:
        started.wait()
        while True:
            try:
                stream = device.stream(Urgency.LOADS)
                events.append(stream.record())
                stream.wait(events[-1])
            except DeviceError:
                return

    threads = [threading.Thread(target=queue) for _ in range(3)]
    closing = threading.Thread(target=lambda: (started.wait(), device.close()))
    for thread in (*threads, closing):
        thread.start()
    started.wait()
    device.close()
    for thread in (*threads, closing):
        thread.join(HANG_S)
        assert not thread.is_alive()
    assert all(event.done for event in events)


def test_closing_ends_the_threads() -> None:
    before = set(threading.enumerate())
    device = HostDevice()
    for _ in range(3):
        device.stream(Urgency.LOADS).synchronize()
    assert len(set(threading.enumerate()) - before) == 3
    device.close()
    assert set(threading.enumerate()) <= before


def test_a_stream_without_a_thread_is_an_error_and_no_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    device = HostDevice()
    stream = device.stream(Urgency.LOADS)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            with pytest.raises(DeviceError, match="stream 1: no thread"):
                stream.record()
    stream.synchronize()
    device.close()


@pytest.mark.parametrize("chaos", CHAOS)
def test_a_forked_child_is_told_so_and_leaves_its_parents_memory(chaos: Chaos | None) -> None:
    ended = threading.Event()
    device = HostDevice(chaos, Calling(ended.wait))
    region, stream = device.allocate(4096), device.stream(Urgency.LOADS)
    handle = device.export(region)
    event = stream.record()
    event.synchronize()
    launch(device, stream)  # which waits until the child has ended
    late = stream.record()
    calls: list[Callable[[], object]] = [
        lambda: late.done,
        late.synchronize,
        stream.record,
        lambda: device.allocate(4096),
        lambda: device.release(region),
        lambda: device.stream(Urgency.LOADS),
    ]
    with device._lock:
        child = _fork(lambda: all(_says_forked(call) for call in calls) and device.close() is None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ended.set()
    late.synchronize()
    device.release(device.open(handle, 4096))
    device.close()


def _says_forked(call: Callable[[], object]) -> bool:
    try:
        call()
    except DeviceError as error:
        return "forked; open another one in the child" in str(error)
    return False


def _fork(check: Callable[[], bool]) -> int:
    """A child that ends with 0 when the check holds."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return child
