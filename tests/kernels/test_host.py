"""The device without a GPU: what every device keeps, and what only this one promises."""

import ctypes
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.kernels.device import Device, DeviceError, OutOfDeviceMemory, Region, Stream, Urgency
from kvtier.kernels.host import HostDevice
from kvtier.kernels.host_streams import Chaos
from tests.contracts.device import NBYTES, DeviceContract, buffer, fill, pattern, read
from tests.kernels.forgetful import Forgetful

SMALL = 4096


class TestHostDevice(DeviceContract):
    def open(self) -> Device:
        return HostDevice()


class TestHostDeviceInChaos(DeviceContract):
    @pytest.fixture(params=range(4))
    def device(self, request: pytest.FixtureRequest) -> Iterator[Device]:
        device = HostDevice(Chaos(request.param))
        yield device
        device.close()


class Scripted:
    """Kernels in Python, given the words of their job."""

    def __init__(self, **kernels: Callable[[int, int], None]) -> None:
        self._kernels = kernels

    def run(self, kernel: str, threads: int, job_address: int) -> None:
        self._kernels[kernel](threads, job_address)


def word(address: int) -> ctypes.c_int64:
    return ctypes.c_int64.from_address(address)


def test_capacity_comes_back_with_what_is_released() -> None:
    device = HostDevice(memory_bytes=3 * SMALL)
    regions = [device.allocate(SMALL) for _ in range(3)]
    with pytest.raises(OutOfDeviceMemory, match=f"{SMALL} bytes wanted, 0 free"):
        device.allocate(SMALL)
    device.release(regions.pop())
    regions.append(device.allocate(SMALL))
    with pytest.raises(OutOfDeviceMemory):
        device.allocate(1)
    device.close()


def test_a_job_is_copied_when_it_is_launched() -> None:
    def store(threads: int, job: int) -> None:
        word(word(job).value).value = threads * word(job + 8).value

    device = HostDevice(Chaos(0), Scripted(store=store))
    region = device.allocate(8)
    stream = device.stream(Urgency.LOADS)
    job = bytearray(region.address.to_bytes(8, "little") + (11).to_bytes(8, "little"))
    device.launch(stream, "store", 3, bytes(job))
    assert word(region.address).value != 33, "it is not done before somebody waits"
    stream.synchronize()
    assert word(region.address).value == 33
    device.close()


@pytest.mark.parametrize("chaos", [None, Chaos(0), Chaos(1)])
def test_an_error_is_raised_where_the_host_waits_and_stops_what_depends_on_it(
    chaos: Chaos | None,
) -> None:
    def fail(threads: int, job: int) -> None:
        raise OSError("out of luck")

    device = HostDevice(chaos, Scripted(fail=fail))
    a, b = device.allocate(SMALL), device.allocate(SMALL)
    fill(device, a, pattern(1, SMALL))
    fill(device, b, pattern(2, SMALL))
    stream, other = device.stream(Urgency.LOADS), device.stream(Urgency.OFFLOADS)
    before = stream.record()
    device.launch(stream, "fail", 1, bytes(8))
    device.copy(stream, [(b.span(0, SMALL), a.span(0, SMALL))])
    after = stream.record()
    other.wait(after)
    device.copy(other, [(b.span(0, SMALL), a.span(0, SMALL))])
    before.synchronize()
    for wait in (after.synchronize, stream.synchronize, other.synchronize):
        with pytest.raises(DeviceError, match="out of luck"):
            wait()
    assert after.done
    assert read(device, b) == pattern(2, SMALL)
    device.close()


def test_streams_run_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=60)

    def meet(threads: int, job: int) -> None:
        meeting.wait()

    device = HostDevice(kernels=Scripted(meet=meet))
    streams = [device.stream(Urgency.LOADS), device.stream(Urgency.OFFLOADS)]
    for stream in streams:
        device.launch(stream, "meet", 1, bytes(8))
    for stream in streams:
        stream.synchronize()
    device.close()


def test_work_is_not_done_before_it_is_waited_for_in_chaos() -> None:
    device = HostDevice(Chaos(0))
    source, target = buffer(pattern(1)), buffer(bytes(NBYTES))
    spans = [device.register(each).span(0, NBYTES) for each in (target, source)]
    stream = device.stream(Urgency.LOADS)
    device.copy(stream, [(spans[0], spans[1])])
    assert not any(target)
    source[:] = pattern(2)
    stream.synchronize()
    assert target == pattern(2), "a source that is reused too early is seen"
    device.close()


@pytest.mark.parametrize("seed", range(8))
def test_polling_ends_within_a_few_polls_in_chaos(seed: int) -> None:
    device = HostDevice(Chaos(seed))
    polled = 0
    for _ in range(20):
        event, polls = device.stream(Urgency.LOADS).record(), 1
        while not event.done:
            polls += 1
        assert polls <= 4
        polled = max(polled, polls)
    assert polled > 1
    device.close()


def test_released_memory_that_work_still_uses_is_an_error_and_no_crash() -> None:
    device = HostDevice(Chaos(0))
    a, b = device.allocate(SMALL), device.allocate(SMALL)
    stream = device.stream(Urgency.LOADS)
    device.copy(stream, [(a.span(0, SMALL), b.span(0, SMALL))])
    device.release(b)
    with pytest.raises(DeviceError, match="released before"):
        stream.synchronize()
    device.close()


def test_a_stranger_is_refused() -> None:
    device, other = HostDevice(), HostDevice()
    with pytest.raises(DeviceError, match="stream_of: 0x63"):
        device.stream_of(99)
    with pytest.raises(ValueError, match="not an event of this device"):
        device.stream(Urgency.LOADS).wait(other.stream(Urgency.LOADS).record())
    region = device.allocate(8)
    with pytest.raises(ValueError, match="not a stream of this device"):
        device.copy(other.stream(Urgency.LOADS), [(region.span(0, 1), region.span(1, 1))])
    device.close()
    other.close()
    with pytest.raises(DeviceError, match="closed"):
        device.allocate(8)
    with pytest.raises(DeviceError, match="closed"):
        other.stream(Urgency.LOADS).synchronize()


def files() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - its own file counts each time


def close_with_all_left(device: HostDevice) -> None:
    region = device.allocate(SMALL)
    device.open(device.export(region), SMALL)
    device.register(buffer(bytes(SMALL)))
    device.adopt(region.address, 8)
    device.copy(device.stream(Urgency.LOADS), [(region.span(0, 8), region.span(8, 8))])
    device.close()


def allocate_when_closed(device: HostDevice) -> None:
    device.close()
    device.allocate(SMALL)


def open_when_closed(device: HostDevice) -> None:
    other = HostDevice()
    handle = other.export(other.allocate(SMALL))
    device.close()
    try:
        device.open(handle, SMALL)
    finally:
        other.close()


def open_what_is_larger_than_it_says(device: HostDevice) -> None:
    handle = bytearray(device.export(device.allocate(SMALL)))
    handle[24:32] = (2 * SMALL).to_bytes(8, "little")
    device.open(bytes(handle), SMALL)


def open_what_was_released(device: HostDevice) -> None:
    region = device.allocate(SMALL)
    handle = device.export(region)
    device.release(region)
    device.open(handle, SMALL)


def allocate_what_cannot_be_mapped(device: HostDevice) -> None:
    device.allocate(1 << 60)


def open_and_release(device: HostDevice) -> None:
    region = device.allocate(SMALL)
    for _ in range(3):
        device.release(device.open(device.export(region), SMALL))


@pytest.mark.parametrize(
    "do",
    [
        close_with_all_left,
        allocate_when_closed,
        open_when_closed,
        open_what_is_larger_than_it_says,
        open_what_was_released,
        allocate_what_cannot_be_mapped,
        open_and_release,
    ],
)
def test_no_file_is_left_open(do: Callable[[HostDevice], None]) -> None:
    before = files()
    device = HostDevice(memory_bytes=1 << 61)
    with suppress(DeviceError):
        do(device)
    device.close()
    assert files() == before


def test_no_more_files_are_out_of_memory() -> None:
    device = HostDevice()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = files()
    for spare in range(3):  # the first allocation has neither file, then one, then both
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_file() + spare, hard))
        try:
            with suppress(OutOfDeviceMemory):
                device.release(device.allocate(SMALL))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert files() == before
    device.close()


def next_file() -> int:
    """The number of the next file that is opened."""
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    return fd


def test_memory_that_is_pinned_in_part_is_not_registered() -> None:
    device = HostDevice()
    memory = buffer(bytes(4 * SMALL))
    region = device.register(memory[SMALL : 3 * SMALL])
    for part in (memory, memory[: SMALL + 1], memory[3 * SMALL - 1 :], memory[SMALL : SMALL + 1]):
        with pytest.raises(DeviceError, match="pinned already"):
            device.register(part)
    beside = [device.register(part) for part in (memory[:SMALL], memory[3 * SMALL :])]
    device.release(region)
    device.release(device.register(memory[SMALL : 3 * SMALL]))
    for each in beside:
        device.release(each)
    device.close()


# But for the file's number: mmap keeps another one of the same file.
@given(st.sampled_from([*range(20), *range(24, 48)]), st.integers(1, 255))
def test_a_forged_handle_is_refused(byte: int, change: int) -> None:
    device = HostDevice()
    handle = bytearray(device.export(device.allocate(SMALL)))
    handle[byte] ^= change
    with pytest.raises(DeviceError, match="open"):
        device.open(bytes(handle), 1)
    device.close()


def test_a_file_that_is_not_the_exported_one_is_refused() -> None:
    device = HostDevice()
    region = device.allocate(SMALL)
    handle = device.export(region)
    number = int.from_bytes(handle[20:24], "little")
    device.release(region)
    pipe = os.pipe()  # opening it would block; it may even get the number of the file
    for fd in {number, *pipe}:
        forged = handle[:20] + fd.to_bytes(4, "little") + handle[24:]
        with pytest.raises(DeviceError, match="open"):
            device.open(forged, 1)
    for fd in pipe:
        os.close(fd)
    device.close()


def test_the_interpreter_ends_with_a_device_left_open() -> None:
    program = """
from kvtier.kernels.device import Urgency
from kvtier.kernels.devices import open_device
device = open_device("host")
region = device.allocate(1 << 20)
device.copy(device.stream(Urgency.LOADS), [(region.span(0, 9), region.span(9, 9))])
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# ── What Chaos is for ────────────────────────────────────────────────────────────────────────


def through(device: Device, chunks: int) -> list[bytes]:
    """Chunks copied in on one stream and on on another, through one source and one target."""
    source, target = buffer(bytes(SMALL)), buffer(bytes(SMALL))
    first, last = device.register(source), device.register(target)
    middle = device.allocate(SMALL)
    loads, moves = device.stream(Urgency.LOADS), device.stream(Urgency.OFFLOADS)
    arrived = []
    for number in range(chunks):
        source[:] = pattern(number, SMALL)
        _copy(device, loads, middle, first)
        moves.wait(loads.record())
        _copy(device, moves, last, middle)
        moves.record().synchronize()
        arrived.append(bytes(target))
    return arrived


def together(device: Device, chunks: int) -> list[bytes]:
    """As `through`, but that the host waits only at the end, so the streams must both ways."""
    sources = [device.register(buffer(pattern(n, SMALL))) for n in range(chunks)]
    targets = [buffer(bytes(SMALL)) for _ in range(chunks)]
    middle = device.allocate(SMALL)
    loads, moves = device.stream(Urgency.LOADS), device.stream(Urgency.OFFLOADS)
    for source, target in zip(sources, targets, strict=True):
        _copy(device, loads, middle, source)
        moves.wait(loads.record())
        _copy(device, moves, device.register(target), middle)
        loads.wait(moves.record())
    moves.synchronize()
    return [bytes(target) for target in targets]


def _copy(device: Device, stream: Stream, to: Region, out_of: Region) -> None:
    device.copy(stream, [(to.span(0, SMALL), out_of.span(0, SMALL))])


CHUNKS = 3
# Each waits twice for a chunk; `together` once more at the end, and its last wait orders nothing.
PIPELINES = [(through, range(2 * CHUNKS)), (together, [*range(2 * CHUNKS - 1), 2 * CHUNKS])]


@pytest.mark.parametrize(("pipeline", "needed"), PIPELINES)
def test_a_pipeline_that_waits_enough_is_right_in_any_order(
    pipeline: Callable[[Device, int], list[bytes]], needed: list[int]
) -> None:
    for seed in range(20):
        device = Forgetful(HostDevice(Chaos(seed)), -1)
        assert pipeline(device, CHUNKS) == [pattern(n, SMALL) for n in range(CHUNKS)]
        assert device.waits == max(needed) + 1
        device.close()


@pytest.mark.parametrize(
    ("pipeline", "forget"),
    [(pipeline, forget) for pipeline, needed in PIPELINES for forget in needed],
)
def test_every_wait_that_is_missing_shows(
    pipeline: Callable[[Device, int], list[bytes]], forget: int
) -> None:
    wrong = 0
    for seed in range(20):
        device = Forgetful(HostDevice(Chaos(seed)), forget)
        arrived = pipeline(device, CHUNKS)
        wrong += arrived != [pattern(n, SMALL) for n in range(CHUNKS)]
        device.close()
        again = Forgetful(HostDevice(Chaos(seed)), forget)
        assert pipeline(again, CHUNKS) == arrived, "the same seed, the same order"
        again.close()
    assert wrong
