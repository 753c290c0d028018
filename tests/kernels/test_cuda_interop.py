"""A GPU that is shared with other libraries: their streams, their memory, and what they take away.

On `FakeCuda`, which shows our bookkeeping and arguments.
"""

import ctypes
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvtier.client import Client, PagedEngine
from kvtier.kernels.cuda import CudaDevice
from kvtier.kernels.device import DeviceError, DeviceFault, Urgency
from kvtier.kernels.paged import PagedCache
from kvtier.spaces import Layout, Space
from tests.contracts.device import buffer
from tests.kernels.fake_cuda import FakeCuda, install

TORCH_STREAM = 0x7F00DEAD0000  # what torch.cuda.current_stream().cuda_stream may be
LAYOUT = Layout("bfloat16", layers=1, heads=2, head_dim=8, tokens=4)
SHAPE, AXES = (6, 4, 2, 8), "block,token,head,dim"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install(monkeypatch)


class Seen:
    """What CUDA is asked about events and streams."""

    def __init__(self, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int]] = []
        for name, which in (("eventRecord", 1), ("streamWaitEvent", 0), ("streamDestroy", 0)):
            monkeypatch.setattr(fake.runtime, name, self._noted(name, which))

    def _noted(self, name: str, which: int) -> Any:
        return lambda *given: self.calls.append((name, given[which]))


@pytest.mark.parametrize("handle", [TORCH_STREAM, 0, 1], ids=["torch's own", "default", "legacy"])
def test_an_engines_stream_orders_work_both_ways_and_is_not_destroyed(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch, handle: int
) -> None:
    seen = Seen(fake, monkeypatch)
    device = CudaDevice(3)
    ours, theirs = device.stream(Urgency.LOADS), device.stream_of(handle)
    ours.wait(theirs.record())  # as `after`
    theirs.wait(ours.record())  # as `ready(layer)`
    device.close()
    assert seen.calls == [
        ("eventRecord", handle),
        ("streamWaitEvent", ours.handle),
        ("eventRecord", ours.handle),
        ("streamWaitEvent", handle),
        ("streamDestroy", ours.handle),
    ]


def test_a_stream_that_was_destroyed_is_refused_and_what_was_recorded_stays(
    fake: FakeCuda,
) -> None:
    device = CudaDevice(3)
    ours, theirs = device.stream(Urgency.LOADS), device.stream_of(TORCH_STREAM)
    region = device.allocate(16)
    pair = (region.span(0, 8), region.span(8, 8))
    device.copy(theirs, [pair])
    event = theirs.record()
    fake.runtime.faults.update(eventRecord=400, memcpyAsync=400)  # its library destroyed it
    for call in (theirs.record, lambda: device.copy(theirs, [pair])):
        with pytest.raises(DeviceError, match="must live until its work is done") as caught:
            call()
        assert not isinstance(caught.value, DeviceFault)
    fake.runtime.faults.clear()
    event.synchronize()
    ours.wait(event)
    device.copy(ours, [pair])
    device.close()


def test_a_handle_of_another_device_is_closed_again(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, device = CudaDevice(3), CudaDevice(3)
    handle = exporter.export(exporter.allocate(16))
    elsewhere = SimpleNamespace(device=4, type=2, devicePointer=0)
    monkeypatch.setattr(fake.runtime, "pointerGetAttributes", lambda address: elsewhere)
    with pytest.raises(DeviceError, match=r"open: 0x[0-9a-f]+ is not memory of cuda:3"):
        device.open(handle, 16)
    assert fake.runtime.opened == []


# ── An engine's tensors ──────────────────────────────────────────────────────────────────────


class OnGpu:
    """A tensor as CuPy or PyTorch gives it, of bfloat16 in memory of the device."""

    def __init__(self, address: int, form: str) -> None:
        steps = [64, 16, 8, 1]
        if form == "data_ptr":
            self.shape = SHAPE
            self.data_ptr = lambda: address
            self.stride = lambda: tuple(steps)
            self.element_size = lambda: 2
        else:
            self.__cuda_array_interface__ = {
                "shape": SHAPE, "typestr": "<V2", "data": (address, False), "strides": None,
                "version": 3, "stream": TORCH_STREAM,
            }  # fmt: skip


def engine_of(device: CudaDevice, keys: int, values: int, form: str) -> PagedEngine:
    cache = PagedCache.of([(OnGpu(keys, form), OnGpu(values, form))], AXES)
    assert (cache.bases, cache.row_bytes) == (((keys, values),), 16)
    client = cast(Client, SimpleNamespace(space=Space("m", LAYOUT)))
    return PagedEngine(client, device, cache, staging_bytes=1 << 12)


@pytest.mark.parametrize("form", ["data_ptr", "__cuda_array_interface__"])
def test_an_engines_tensors_are_used_where_they_are(fake: FakeCuda, form: str) -> None:
    device = CudaDevice(3)
    memory = fake.runtime.malloc(1 << 12)
    engine_of(device, memory, memory + (1 << 11), form).close()
    device.close()
    assert set(fake.runtime.memory) == {memory}, "it is the engine's"


def test_a_cache_that_is_not_on_the_device_is_refused_before_a_kernel_meets_it(
    fake: FakeCuda,
) -> None:
    device = CudaDevice(3)
    memory = fake.runtime.malloc(1 << 12)
    on_host = ctypes.addressof(ctypes.c_char.from_buffer(buffer(bytes(1 << 11))))
    for keys, values in ((on_host, memory), (memory, on_host), (0, memory)):
        with pytest.raises(DeviceError, match=r"adopt: 0x[0-9a-f]+ is not memory of cuda:3"):
            engine_of(device, keys, values, "data_ptr")
    assert set(fake.runtime.memory) == {memory}
    device.close()
