"""An NVIDIA GPU, through CuPy, which no other module imports.

Nothing of CUDA is loaded before a device is opened. Of CuPy, only thin wrappers of CUDA are used.
"""

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvtier.kernels.cubins import INSTALL, GpuKernels
from kvtier.kernels.cuda_driver import Driver, driver_release
from kvtier.kernels.device import (
    HANDLE_BYTES,
    DeviceError,
    DeviceFault,
    Event,
    OutOfDeviceMemory,
    Place,
    Region,
    Span,
    Stream,
    Urgency,
)

# cudaMalloc cuts small allocations from one block, and IPC shares whole blocks. The CUDA C++
# Programming Guide, "Interprocess Communication", advises to share allocations of whole 2 MiB.
_BLOCK_BYTES = 2 << 20
_REGISTER_PORTABLE_AND_MAPPED = 1 | 2  # cudaHostRegisterPortable | cudaHostRegisterMapped
_PRIORITIES = {Urgency.LOADS: -5, Urgency.OFFLOADS: 0}  # CUDA clamps to what the device has
_OUT_OF_MEMORY = 2  # of cudaError_t, which are CUresult's numbers, too
# Any further work fails alike, "the process must be terminated" (Runtime API, cudaError); 214 is
# memory that lost its bytes.
_FATAL = (214, 700, 702, 710, *range(714, 720), 721)
_REMEDIES = {
    3: "CUDA cannot be used in a forked child; start processes by spawn",
    35: "the driver is older than CuPy's CUDA; update it, or install the cupy package for its CUDA",
    **dict.fromkeys((100, 101), "no such GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"),
    201: "a process cannot open what it exported through another device object",
    400: "no such stream or event; what another library made must live until its work is done",
    712: "that memory is pinned already; release it first",
    **dict.fromkeys(_FATAL, "work failed, and so will all that follows; restart the process"),
}

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _CudaEvent:
    """Good for as long as it is held, also once its device is closed."""

    device: "CudaDevice"
    event: Any

    @property
    def done(self) -> bool:
        self.device.check_process("done")
        return not self.device.driver.is_pending(self.event.ptr)

    def synchronize(self) -> None:
        with self.device.current("synchronize"):
            self.device.runtime.eventSynchronize(self.event.ptr)


@dataclass(eq=False, slots=True)
class _CudaStream:
    device: "CudaDevice"
    handle: int

    def record(self) -> Event:
        with self.device.opened("record"):
            event = self.device.cuda.Event(block=True, disable_timing=True)  # waits asleep
            self.device.runtime.eventRecord(event.ptr, self.handle)
        return _CudaEvent(self.device, event)

    def wait(self, event: Event) -> None:
        if not isinstance(event, _CudaEvent):
            raise ValueError(f"wait: {event!r} is not an event of a CUDA device")
        with self.device.opened("wait"):
            self.device.runtime.streamWaitEvent(self.handle, event.event.ptr)

    def synchronize(self) -> None:
        with self.device.opened("synchronize"):
            self.device.runtime.streamSynchronize(self.handle)


@dataclass(slots=True)
class _Held:
    """What is behind a region, and how to give it back."""

    kind: str  # "allocated", "registered", "opened" or "adopted"
    give_back: Callable[[], None] | None = None  # none of adopted memory
    anchor: object = None  # keeps registered memory from being unmapped
    uses: int = 0


class CudaDevice:
    """The GPU of that number. Raises DeviceError when it cannot be used, and says why.

    Calls raise ValueError for sizes and regions that cannot be right.
    """

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self.driver = Driver(index)
        try:
            import cupy  # noqa: PLC0415
        except ImportError as error:
            raise DeviceError(f"{self.name}: CuPy: {error}; {INSTALL}") from error
        self.cuda: Any = cupy.cuda
        self.runtime: Any = cupy.cuda.runtime
        self._cupy = str(cupy.__version__)
        self._process = os.getpid()
        self._closed = False
        self._held: dict[Region, _Held] = {}
        self._exports: dict[bytes, Region] = {}
        self._streams: list[int] = []
        self._lock = threading.RLock()  # of all the above
        with self.current("open"):
            self.runtime.memGetInfo()
        # Not at the first launch: a request would wait for the compiler then, and loading may wait
        # for all work of the GPU (Programming Guide, "Lazy Loading").
        self._kernels: GpuKernels | None = None
        try:
            with self.current("kernels"):
                self._kernels = GpuKernels(self.cuda, index)
        except DeviceError as error:  # copies need none
            self._no_kernels = str(error)
            _log.warning("%s copies, but can launch nothing: %s", self.name, error)

    def check_process(self, call: str) -> None:
        """Raises DeviceError in a forked child."""
        if os.getpid() != self._process:
            raise DeviceError(f"{call}: {self.name} was opened before a fork; {_REMEDIES[3]}")

    @contextmanager
    def current(self, call: str) -> Iterator[None]:
        """Make the device current for this thread, and explain what CUDA says."""
        self.check_process(call)
        try:
            with self.driver.current():
                yield
        except RuntimeError as error:  # CuPy's for the runtime, the driver and NVRTC, and ours
            status = getattr(error, "status", 0)
            remedy = _REMEDIES.get(status, "see CUDA's documentation")
            kind = DeviceFault if status in _FATAL else DeviceError
            raise kind(f"{call}: {self.name}: {error}; {remedy}") from error

    @contextmanager
    def opened(self, call: str) -> Iterator[None]:
        """As `current`. Raises DeviceError when the device is closed."""
        if self._closed:
            raise DeviceError(f"{call}: {self.name} is closed; open it again")
        with self.current(call):
            yield

    @contextmanager
    def _alone(self, call: str) -> Iterator[None]:
        """As `opened`, and have the device to oneself: what is kept then, closing sees."""
        self.check_process(call)  # in a forked child the lock may be taken, and stay so
        with self._lock, self.opened(call):
            yield

    def stream(self, urgency: Urgency) -> Stream:
        with self._alone("stream"):
            flags = self.runtime.streamNonBlocking  # of the legacy default stream
            handle = self.runtime.streamCreateWithPriority(flags, _PRIORITIES[urgency])
            self._streams.append(handle)
        return _CudaStream(self, handle)

    def stream_of(self, handle: int) -> Stream:
        if handle == 2:  # cudaStreamPerThread
            raise DeviceError("stream_of: 0x2 is another stream in each thread; make one")
        return _CudaStream(self, handle)

    def allocate(self, nbytes: int) -> Region:
        _check_size("allocate", nbytes)
        with self._alone("allocate"):
            try:
                address = self.runtime.malloc(-(-nbytes // _BLOCK_BYTES) * _BLOCK_BYTES)
            except self.runtime.CUDARuntimeError as error:
                if error.status != _OUT_OF_MEMORY:
                    raise
                free = "{} of {} free on {}".format(*self.runtime.memGetInfo(), self.name)
                raise OutOfDeviceMemory(f"allocate: {nbytes} bytes wanted, {free}") from error
            held = _Held("allocated", partial(self.runtime.free, address))
            return self._keep(Region(Place.DEVICE, address, nbytes), held)

    def register(self, memory: memoryview) -> Region:
        try:
            anchor = ctypes.c_char.from_buffer(memory)
        except (TypeError, ValueError) as error:
            raise DeviceError(f"register: {error}; pass writable, contiguous bytes") from error
        address = ctypes.addressof(anchor)
        with self._alone("register"):
            self.runtime.hostRegister(address, memory.nbytes, _REGISTER_PORTABLE_AND_MAPPED)
            undo = partial(self.runtime.hostUnregister, address)
            try:
                seen = self.runtime.pointerGetAttributes(address).devicePointer
            except BaseException:
                undo()
                raise
            region = Region(Place.HOST, seen, memory.nbytes)
            return self._keep(region, _Held("registered", undo, anchor))

    def adopt(self, address: int, nbytes: int) -> Region:
        with self._alone("adopt"):
            self._check_here("adopt", address)
            region = Region(Place.DEVICE, address, nbytes)
            self._held.setdefault(region, _Held("adopted"))
        return region

    def export(self, region: Region) -> bytes:
        with self._alone("export"):
            if self._find(region).kind != "allocated":
                raise DeviceError(f"export: {region} was not allocated by this device")
            handle = bytes(self.runtime.ipcGetMemHandle(region.address))
            self._exports[handle] = region
        return handle

    def open(self, handle: bytes, nbytes: int) -> Region:
        _check_size("open", nbytes)
        if len(handle) != HANDLE_BYTES:
            raise DeviceError(f"open: a handle has {HANDLE_BYTES} bytes, this one {len(handle)}")
        with self._alone("open"):
            if (own := self._exports.get(handle)) is not None:  # which CUDA refuses to open here
                _check_room(own.nbytes, nbytes)
                return self._keep(own, self._held[own])
            address = self.runtime.ipcOpenMemHandle(handle)
            undo = partial(self.runtime.ipcCloseMemHandle, address)
            try:
                self._check_here("open", address)
                base, size = self.driver.allocation_of(address)
                _check_room(base + size - address, nbytes)
            except BaseException:
                undo()
                raise
            return self._keep(Region(Place.DEVICE, address, nbytes), _Held("opened", undo))

    def release(self, region: Region) -> None:
        with self._alone("release"):
            held = self._find(region)
            if held.give_back is None:
                raise ValueError(f"release: {region} is adopted; it is its owner's")
            # CUDA first: where it refuses, the memory stays known, and mapped where it is pinned.
            if held.uses == 1 or held.kind == "opened":  # CUDA counts, too, how often it is open
                held.give_back()
            held.uses -= 1
            if not held.uses:
                del self._held[region]
                self._exports = {h: r for h, r in self._exports.items() if r != region}

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        self._check_stream(stream)
        triples: list[tuple[int, int, int]] = []
        for to, out_of in pairs:
            if to.nbytes != out_of.nbytes:
                raise ValueError(f"copy: {out_of.nbytes} bytes to a span of {to.nbytes}")
            self._find(to.region)
            self._find(out_of.region)
            if to.nbytes:
                triples.append((to.address, out_of.address, to.nbytes))
        with self.opened("copy"):
            if not self.driver.copy_batch(stream.handle, triples):
                for triple in triples:  # the default goes by the addresses
                    self.runtime.memcpyAsync(*triple, self.runtime.memcpyDefault, stream.handle)

    def launch(self, stream: Stream, kernel: str, threads: int, job: bytes) -> None:
        if threads < 1 or not job or len(job) % 8:
            raise ValueError(f"launch: {threads} threads with a job of {len(job)} bytes")
        self._check_stream(stream)
        if self._kernels is None:
            raise DeviceError(f"launch: {self._no_kernels}")
        with self.opened("launch"):
            self._kernels.launch(stream.handle, kernel, threads, job)

    def describe(self) -> dict[str, str]:
        with self.opened("describe"):
            model = self.runtime.getDeviceProperties(self.driver.index)["name"]
            return {
                "model": model.decode(),
                "driver": driver_release(),
                "driver_cuda": _dotted(self.runtime.driverGetVersion()),
                "runtime_cuda": _dotted(self.runtime.runtimeGetVersion()),
                "cupy": self._cupy,
            }

    def close(self) -> None:
        if os.getpid() != self._process:  # in a forked child all is the parent's
            return
        with self._lock:
            ends: list[Callable[[], None]] = [self.runtime.deviceSynchronize]
            for region, held in self._held.items():
                ends += [partial(self.release, region)] * held.uses
            ends += [] if self._kernels is None else [self._kernels.close]
            ends += [partial(self.runtime.streamDestroy, handle) for handle in self._streams]
            for end in () if self._closed else ends:
                with suppress(DeviceError), self.current("close"):
                    end()
            self._held.clear()  # after a fatal error CUDA gives back nothing
            self._closed = True

    def _check_here(self, call: str, address: int) -> None:
        found = self.runtime.pointerGetAttributes(address)
        if (found.type, found.device) != (self.runtime.memoryTypeDevice, self.driver.index):
            raise DeviceError(f"{call}: {address:#x} is not memory of {self.name}")

    def _check_stream(self, stream: Stream) -> None:
        if not isinstance(stream, _CudaStream) or stream.device is not self:
            raise ValueError(f"{stream!r} is not a stream of this device")

    def _find(self, region: Region) -> _Held:
        held = self._held.get(region)
        if held is None:
            raise ValueError(f"{region} is released or of another device")
        return held

    def _keep(self, region: Region, held: _Held) -> Region:
        there = self._held.get(region)
        if there is None or there.kind == "adopted":  # its owner freed it: the address was free
            there = self._held[region] = held
        there.uses += 1
        return region


def _check_size(call: str, nbytes: int) -> None:
    if nbytes < 1:
        raise ValueError(f"{call}: {nbytes} bytes; at least one is needed")


def _check_room(there: int, wanted: int) -> None:
    if there < wanted:
        raise DeviceError(f"open: {wanted} bytes wanted, the exported memory has {there}")


def _dotted(version: int) -> str:
    """A version of CUDA as people write it: 13020 is 13.2."""
    return f"{version // 1000}.{version % 1000 // 10}"
