"""The GPU: the contract where there is one; elsewhere, what can be known without.

`FakeCuda` shows mistakes of ours in bookkeeping and arguments.
"""

import ctypes
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from kvtier.kernels import cuda
from kvtier.kernels.cuda import CudaDevice
from kvtier.kernels.cuda_driver import Driver
from kvtier.kernels.device import Device, DeviceError, DeviceFault, OutOfDeviceMemory, Urgency
from kvtier.kernels.host import HostDevice
from kvtier.kernels.source import KERNELS
from tests.contracts.device import (
    NBYTES,
    DeviceContract,
    DeviceInOneProcess,
    buffer,
    fill,
    pattern,
    read,
)
from tests.kernels.fake_cuda import CALLS, FakeCuda, FakeRuntime, install


def why_no_gpu() -> str:
    try:
        CudaDevice(0).close()
    except DeviceError as error:
        return str(error)
    return ""


WHY_NO_GPU = why_no_gpu()


@pytest.mark.gpu
@pytest.mark.skipif(bool(WHY_NO_GPU), reason=WHY_NO_GPU)
class TestCudaDevice(DeviceContract):
    def open(self) -> Device:
        return CudaDevice(0)


def test_importing_it_loads_nothing_of_cuda() -> None:
    program = """
import sys
import kvtier.kernels.cuda, kvtier.kernels.devices
from pathlib import Path
assert not {"cupy", "cupy_backends"} & sys.modules.keys()
assert "libcuda" not in Path("/proc/self/maps").read_text()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_no_driver_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(DeviceError, match=r"cuda:7: no NVIDIA driver: libcuda.* install it"):
        CudaDevice(7)


@pytest.mark.parametrize("module", CALLS)
def test_cupy_has_what_is_called(module: str) -> None:
    found = getattr(pytest.importorskip("cupy").cuda, module)
    for name, arguments in CALLS[module].items():
        described = re.match(rf"{name}\((.*?)\)", getattr(found, name).__doc__ or f"{name}()")
        assert described, name
        given = [each for each in described[1].split(",") if each and "=" not in each]
        assert len(given) == arguments, described[0]


def test_cupy_names_things_as_is_assumed() -> None:
    runtime = pytest.importorskip("cupy").cuda.runtime
    for name in ("streamNonBlocking", "memcpyDefault", "memcpyHostToDevice", "memoryTypeDevice"):
        assert getattr(runtime, name) == getattr(FakeRuntime, name)
    found = runtime.PointerAttributes(3, 1 << 40, 0, 2)
    assert (found.device, found.devicePointer, found.type) == (3, 1 << 40, 2)


# ── A CUDA in host memory ────────────────────────────────────────────────────────────────────


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install(monkeypatch)


class TestCudaDeviceOnFakeCuda(DeviceInOneProcess):
    @pytest.fixture
    def device(self, fake: FakeCuda) -> Iterator[Device]:
        device = CudaDevice(3)
        yield device
        device.close()
        left = (fake.runtime.memory, fake.runtime.pinned, fake.runtime.opened, fake.modules)
        assert not any(left), "closing gives everything back"
        assert fake.entered == 0


def test_loads_are_more_urgent(fake: FakeCuda) -> None:
    device = CudaDevice(3)
    loads, offloads = device.stream(Urgency.LOADS), device.stream(Urgency.OFFLOADS)
    assert fake.runtime.streams[loads.handle] < fake.runtime.streams[offloads.handle]


def test_memory_is_taken_in_blocks_that_no_other_allocation_shares(fake: FakeCuda) -> None:
    region = CudaDevice(3).allocate((2 << 20) + 1)
    assert len(fake.runtime.memory[region.address]) == 4 << 20
    assert region.nbytes == (2 << 20) + 1


def test_running_out_says_what_was_wanted_and_what_is_free(fake: FakeCuda) -> None:
    with pytest.raises(OutOfDeviceMemory, match=f"{1 << 40} bytes wanted, {1 << 30} of {2 << 30}"):
        CudaDevice(3).allocate(1 << 40)


def test_opened_memory_that_is_too_small_is_closed_again(fake: FakeCuda) -> None:
    exporter, device = CudaDevice(3), CudaDevice(3)
    region = exporter.allocate(NBYTES)
    handle = exporter.export(region)
    with pytest.raises(DeviceError, match=f"open: {4 << 20} bytes wanted, .* has {2 << 20}"):
        device.open(handle, 4 << 20)
    assert fake.runtime.opened == []
    first, again = device.open(handle, NBYTES), device.open(handle, NBYTES)
    assert (first, fake.runtime.opened) == (again, [region.address] * 2)
    device.release(first)
    fill(device, again, pattern(1))
    device.release(again)
    assert (read(exporter, region), fake.runtime.opened) == (pattern(1), [])


def test_ones_own_memory_lives_until_its_last_use_is_released(fake: FakeCuda) -> None:
    device = CudaDevice(3)
    region = device.allocate(NBYTES)
    opened = device.open(device.export(region), 4096)
    device.release(region)
    assert region.address in fake.runtime.memory
    device.release(opened)
    assert region.address not in fake.runtime.memory


def test_memory_of_another_device_is_not_adopted(fake: FakeCuda) -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer(bytes(8))))
    with pytest.raises(DeviceError, match=r"adopt: 0x[0-9a-f]+ is not memory of cuda:3"):
        CudaDevice(3).adopt(address, 8)


@pytest.mark.parametrize(("threads", "blocks"), [(1, 1), (256, 1), (257, 2), (1 << 20, 4096)])
def test_a_launch_has_enough_threads(fake: FakeCuda, threads: int, blocks: int) -> None:
    device = CudaDevice(3)
    stream = device.stream(Urgency.LOADS)
    jobs = [pattern(1, 16), pattern(2, 200_000)]  # the second is more than one staged copy
    for number, (same, job) in enumerate(
        [(stream, jobs[0]), (device.stream_of(stream.handle), jobs[1])]
    ):
        device.launch(same, KERNELS[number], threads, job)
    for number, (function, *grid, address) in enumerate(fake.launched):
        assert (function, grid) == (number, [blocks, 256])
        assert ctypes.string_at(address, len(jobs[number])) == jobs[number]


def test_a_batch_is_handed_to_the_driver_as_its_signature_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cuMemcpyBatchAsync of CUDA 12.8: dsts, srcs, sizes, count, attrs, attrsIdxs, numAttrs,
    failIdx, stream; attributes are an access order, two locations of two ints, and flags."""
    seen: list[object] = []

    def words(address: int, kind: Any, count: int) -> list[int]:
        return list((kind * count).from_address(address))

    def batch(*given: int) -> int:
        count = given[3]
        seen.extend(words(each, ctypes.c_uint64, count) for each in given[:3])
        seen.extend([words(given[4], ctypes.c_int, 6), words(given[5], ctypes.c_size_t, 1)])
        seen.extend([given[6], given[8]])
        return 1 if given[8] == 8 else 0

    signature = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 9)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    driver = Driver(0)
    triples = [(1 << 40, 2, 3), (4, 5, 6)]
    assert not driver.copy_batch(7, triples), "the driver is older than 12.8"
    driver._copy_batch = signature(batch)
    assert not driver.copy_batch(0, triples), "refused for the legacy default stream"
    assert driver.copy_batch(7, triples)
    assert seen == [[1 << 40, 4], [2, 5], [3, 6], [1, 0, 0, 0, 0, 0], [0], 1, 7]
    with pytest.raises(RuntimeError, match="CUDA error 1 at 0 of 2"):
        driver.copy_batch(8, triples)


# ── What goes wrong ──────────────────────────────────────────────────────────────────────────


def test_kernels_that_cannot_be_had_are_said_once_and_copies_work(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise RuntimeError("no libnvrtc")

    monkeypatch.undo()
    monkeypatch.setattr(cuda, "Driver", lambda index: fake)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=fake, __version__="14.2.0"))
    fake.nvrtc.getVersion = missing
    with caplog.at_level(logging.WARNING):
        device = CudaDevice(3)
    region, stream = device.allocate(NBYTES), device.stream(Urgency.LOADS)
    fill(device, region, pattern(1))
    assert read(device, region) == pattern(1)
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"launch: .*no libnvrtc; install cupy"):
            device.launch(stream, KERNELS[0], 1, bytes(8))
    device.close()
    assert [record.name for record in caplog.records] == ["kvtier.kernels.cuda"]


@pytest.mark.parametrize("status", [214, 700, 702, 710, 714, 716, 719])
def test_a_fatal_error_says_that_the_process_must_restart_and_closing_ends(
    fake: FakeCuda, status: int
) -> None:
    device = CudaDevice(3)
    region, stream = device.allocate(NBYTES), device.stream(Urgency.LOADS)
    event = stream.record()
    fake.runtime.faults.update(dict.fromkeys(CALLS["runtime"], status))
    memory = buffer(bytes(8))
    calls: list[Callable[[], object]] = [
        event.synchronize,
        stream.synchronize,
        stream.record,
        lambda: device.copy(stream, [(region.span(0, 8), region.span(8, 8))]),
        lambda: device.allocate(8),
        lambda: device.register(memory),
        lambda: device.release(region),
        lambda: device.launch(stream, KERNELS[0], 1, bytes(8)),
    ]
    for call in calls:
        with pytest.raises(DeviceFault, match="restart the process"):
            call()
    device.close()
    memory.release()  # nothing holds it


def test_memory_that_cannot_be_registered_whole_is_not_left_pinned(fake: FakeCuda) -> None:
    device = CudaDevice(3)
    fake.runtime.faults.update({"pointerGetAttributes": 1})
    with pytest.raises(DeviceError, match="register"):
        device.register(buffer(bytes(8)))
    assert not fake.runtime.pinned


def test_memory_that_cuda_does_not_give_back_stays_held(fake: FakeCuda) -> None:
    device = CudaDevice(3)
    memory = buffer(bytes(8))
    region = device.register(memory)
    fake.runtime.faults.update({"hostUnregister": 1})
    with pytest.raises(DeviceError, match="release"):
        device.release(region)
    with pytest.raises(BufferError):  # to unmap what is pinned would let the GPU write elsewhere
        memory.obj.close()  # type: ignore[attr-defined]
    fake.runtime.faults.clear()
    device.release(region)
    memory.release()


def test_a_job_that_finds_no_room_leaves_the_room_that_there_was(fake: FakeCuda) -> None:
    device = CudaDevice(3)
    stream = device.stream(Urgency.LOADS)
    device.launch(stream, KERNELS[0], 1, bytes(8))
    fake.runtime.faults.update({"malloc": 2})
    job = pattern(1, 200_000)
    for _ in range(2):
        with pytest.raises(DeviceError, match="launch"):
            device.launch(stream, KERNELS[0], 1, job)
    fake.runtime.faults.clear()
    device.launch(stream, KERNELS[0], 1, job)
    address = fake.launched[-1][-1]
    assert ctypes.string_at(address, len(job)) == job
    device.close()
    assert not fake.runtime.memory


def test_streams_that_are_not_a_queue_of_this_device_are_refused(fake: FakeCuda) -> None:
    device, other, host = CudaDevice(3), CudaDevice(3), HostDevice()
    region = device.allocate(16)
    for stream in (other.stream(Urgency.LOADS), host.stream(Urgency.LOADS)):
        with pytest.raises(ValueError, match="not a stream of this device"):
            device.copy(stream, [(region.span(0, 8), region.span(8, 8))])
        with pytest.raises(ValueError, match="not a stream of this device"):
            device.launch(stream, KERNELS[0], 1, bytes(8))
    with pytest.raises(DeviceError, match="another stream in each thread"):
        device.stream_of(2)
    host.close()


def test_memory_allocated_where_adopted_memory_was_is_released(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = CudaDevice(3)
    address = fake.runtime.malloc(2 << 20)
    device.adopt(address, NBYTES)
    monkeypatch.setattr(fake.runtime, "malloc", lambda nbytes: address)  # its owner freed it
    region = device.allocate(NBYTES)
    device.release(region)
    assert address not in fake.runtime.memory


def test_a_closed_device_gives_back_once_and_its_events_are_done(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = CudaDevice(3)
    stream = device.stream(Urgency.LOADS)
    event = stream.record()
    destroyed: list[int] = []
    monkeypatch.setattr(fake.runtime, "streamDestroy", destroyed.append)
    device.close()
    device.close()
    assert destroyed == [stream.handle]
    event.synchronize()
    assert event.done
    for call in (stream.record, stream.synchronize, lambda: stream.wait(event)):
        with pytest.raises(DeviceError, match="closed; open it again"):
            call()
    fake.pending = True
    assert not event.done


def test_a_forked_child_is_told_so_and_closes_nothing(fake: FakeCuda) -> None:
    device = CudaDevice(3)
    region, stream = device.allocate(NBYTES), device.stream(Urgency.LOADS)
    event = stream.record()
    parent, device._process = device._process, os.getpid() + 1  # as it is in a child
    calls: list[Callable[[], object]] = [
        lambda: event.done,
        event.synchronize,
        stream.record,
        lambda: device.allocate(8),
        lambda: device.release(region),
    ]
    with device._lock:
        for call in calls:
            with pytest.raises(DeviceError, match=r"fork.* spawn"):
                call()
        device.close()
    assert region.address in fake.runtime.memory
    device._process = parent
    device.close()
    assert not fake.runtime.memory


def test_the_gpu_is_made_current_and_what_was_current_is_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, int]] = []

    class Library:
        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *given: self.called(name, given)

        def called(self, name: str, given: tuple[Any, ...]) -> int:
            if name == "cuGetProcAddress_v2":
                return 1
            if name == "cuDevicePrimaryCtxRetain":
                given[0]._obj.value = 77
            calls.append((name, given[0].value if name == "cuCtxPushCurrent_v2" else 0))
            return 700 if name == "cuCtxPopCurrent_v2" else 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    driver = Driver(1)
    for _ in range(2):
        with suppress(KeyError), driver.current():
            raise KeyError  # it is put back then, too, and the error stays what it is
    assert calls[:3] == [("cuInit", 0), ("cuDeviceGet", 0), ("cuDevicePrimaryCtxRetain", 0)]
    assert calls[3:] == [("cuCtxPushCurrent_v2", 77), ("cuCtxPopCurrent_v2", 0)] * 2
