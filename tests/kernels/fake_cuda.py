"""A CUDA in this host's memory, behind the names that CuPy gives it.

It answers as CUDA's documentation says, and at once. It shows nothing about CUDA.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from kvtier.kernels import cubins, cuda
from kvtier.kernels.source import KERNELS

# What is called of each module of `cupy.cuda`, and with how many arguments.
CALLS = {
    "runtime": {
        "deviceSynchronize": 0,
        "driverGetVersion": 0,
        "eventRecord": 2,
        "eventSynchronize": 1,
        "free": 1,
        "getDeviceProperties": 1,
        "hostRegister": 3,
        "hostUnregister": 1,
        "ipcCloseMemHandle": 1,
        "ipcGetMemHandle": 1,
        "ipcOpenMemHandle": 1,
        "malloc": 1,
        "memGetInfo": 0,
        "memcpyAsync": 5,
        "pointerGetAttributes": 1,
        "runtimeGetVersion": 0,
        "streamCreateWithPriority": 2,
        "streamDestroy": 1,
        "streamSynchronize": 1,
        "streamWaitEvent": 2,
    },
    "driver": {"launchKernel": 11, "moduleGetFunction": 2, "moduleLoadData": 1, "moduleUnload": 1},
    "nvrtc": {
        "compileProgram": 2,
        "createProgram": 4,
        "destroyProgram": 1,
        "getCUBIN": 1,
        "getProgramLog": 1,
        "getPTX": 1,
        "getSupportedArchs": 0,
        "getVersion": 0,
    },
}


class CudaError(RuntimeError):
    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"CUDA error {status}")


class FakeRuntime:
    """What is called of cudart. Work is done when it is queued."""

    CUDARuntimeError = CudaError
    streamNonBlocking, memcpyDefault, memcpyHostToDevice = 1, 4, 1  # noqa: N815
    memoryTypeDevice = 2  # noqa: N815
    free_bytes: ClassVar[int] = 1 << 30

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.pinned: set[int] = set()
        self.opened: list[int] = []
        self.streams: dict[int, int] = {}
        self.faults: dict[str, int] = {}

    def __getattribute__(self, name: str) -> Any:
        """What a call does, unless it is to fail."""
        found = super().__getattribute__(name)
        return _unless_it_fails(name, found, self.faults) if name in CALLS["runtime"] else found

    def __getattr__(self, name: str) -> Any:
        """All that does nothing here: events, waits, synchronisation."""
        assert name in CALLS["runtime"], name
        return _unless_it_fails(name, lambda *arguments: None, self.faults)

    def memGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return self.free_bytes, 2 * self.free_bytes

    def driverGetVersion(self) -> int:  # noqa: N802
        return 13020

    def runtimeGetVersion(self) -> int:  # noqa: N802
        return 12090

    def getDeviceProperties(self, index: int) -> dict[str, Any]:  # noqa: N802
        assert index == 3
        return {"name": b"NVIDIA Imaginary"}

    def malloc(self, nbytes: int) -> int:
        if nbytes > self.free_bytes:
            raise CudaError(2)
        memory = ctypes.create_string_buffer(nbytes)
        self.memory[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free(self, address: int) -> None:
        del self.memory[address]

    def hostRegister(self, address: int, nbytes: int, flags: int) -> None:  # noqa: N802
        if address in self.pinned:
            raise CudaError(712)
        self.pinned.add(address)

    def hostUnregister(self, address: int) -> None:  # noqa: N802
        self.pinned.remove(address)

    def pointerGetAttributes(self, address: int) -> Any:  # noqa: N802
        inside = any(a <= address < a + len(m) for a, m in self.memory.items())
        return SimpleNamespace(device=3, type=2 if inside else 1, devicePointer=address)

    def ipcGetMemHandle(self, address: int) -> bytes:  # noqa: N802
        return address.to_bytes(64, "little")

    def ipcOpenMemHandle(self, handle: bytes) -> int:  # noqa: N802
        address = int.from_bytes(handle, "little")
        if address not in self.memory:
            raise CudaError(1)
        self.opened.append(address)
        return address

    def ipcCloseMemHandle(self, address: int) -> None:  # noqa: N802
        self.opened.remove(address)

    def streamCreateWithPriority(self, flags: int, priority: int) -> int:  # noqa: N802
        self.streams[100 + len(self.streams)] = priority
        return 99 + len(self.streams)

    def memcpyAsync(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> None:  # noqa: N802
        assert kind == 4 or nbytes <= 64 << 10
        ctypes.memmove(to, source, nbytes)


def _unless_it_fails(
    name: str, call: Callable[..., Any], faults: dict[str, int]
) -> Callable[..., Any]:
    def called(*arguments: Any) -> Any:
        if name in faults:
            raise CudaError(faults[name])
        return call(*arguments)

    return called


class FakeCuda:
    """Stands for `cupy.cuda` and for the driver of device 3."""

    index = 3

    def __init__(self) -> None:
        self.runtime = FakeRuntime()
        self.launched: list[tuple[int, int, int, int]] = []
        self.modules: list[int] = []
        self.driver = SimpleNamespace(
            launchKernel=self._launch,
            moduleLoadData=self._load,
            moduleGetFunction=lambda module, name: KERNELS.index(name),
            moduleUnload=self.modules.remove,
        )
        self.nvrtc = SimpleNamespace()
        self.entered = 0
        self.pending = False

    @contextmanager
    def current(self) -> Iterator[None]:
        self.entered += 1
        try:
            yield
        finally:
            self.entered -= 1

    def is_pending(self, event: int) -> bool:
        return self.pending

    def Device(self, index: int) -> Any:  # noqa: N802
        assert index == 3
        return SimpleNamespace(compute_capability="90")

    def Event(self, block: bool, disable_timing: bool) -> Any:  # noqa: N802
        assert block
        assert disable_timing
        return SimpleNamespace(ptr=1)

    def allocation_of(self, address: int) -> tuple[int, int]:
        return address, len(self.runtime.memory[address])

    def copy_batch(self, stream: int, triples: list[tuple[int, int, int]]) -> bool:
        assert self.entered
        return False

    def _load(self, module: bytes) -> int:
        self.modules.append(len(module))
        return len(module)

    def _launch(self, function: int, *grid: int) -> None:
        blocks, _, _, threads, _, _, _, _, words, extra = grid
        assert self.entered
        assert extra == 0
        job = ctypes.c_uint64.from_address(ctypes.c_uint64.from_address(words).value).value
        self.launched.append((function, blocks, threads, job))


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Have `CudaDevice(3)` find it."""
    made = FakeCuda()
    monkeypatch.setattr(cuda, "Driver", lambda index: made)
    monkeypatch.setattr(cubins, "kernels_for", lambda nvrtc, capability: b"cubin")
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=made, __version__="14.2.0"))
    return made
