"""What CuPy does not wrap of CUDA, from the driver's own libraries.

They come with the driver, and are loaded when a GPU is opened.
"""

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvtier.kernels.device import DeviceError

_LEGACY_STREAMS = (0, 1)  # NULL and cudaStreamLegacy: refused by cuMemcpyBatchAsync
# CUmemcpyAttributes: read sources in stream order; no hints of where they are, no flags.
_COPY_ATTRIBUTES = struct.pack("6i", 1, 0, 0, 0, 0, 0)
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_RELEASE_BYTES = 80  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE


class DriverError(RuntimeError):
    """The driver refused. It has the CUresult as its status, as CuPy's errors have."""

    def __init__(self, status: int, where: str = "") -> None:
        self.status = status
        super().__init__(f"CUDA error {status}{where}")


class Driver:
    """The driver, for one GPU. Raises DriverError when it refuses, DeviceError if it is absent."""

    def __init__(self, index: int) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            no_driver = f'no NVIDIA driver: {error}; install it, or use device "host"'
            raise DeviceError(f"cuda:{index}: {no_driver}") from error
        self.index = index
        self._context = ctypes.c_void_p()
        self._copy_batch = self._find_copy_batch()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU current for this thread, and then what was before, if any.

        Not by cudaSetDevice: since CUDA 12 it makes a context where it finds none, so that putting
        back device 0, a new thread's, takes half a GB of a GPU that this process does not use.
        """
        if (
            self._context.value is None
        ):  # the one that all libraries of this process share, and none ends
            device = ctypes.c_int()
            self._call("cuInit", 0)
            self._call("cuDeviceGet", ctypes.byref(device), self.index)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:  # whatever it returns may be about work
            self._cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def is_pending(self, event: int) -> bool:
        """Whether work before an event is not done. It is done where it failed."""
        # To the runtime "not ready" is this thread's last error, which other libraries read, too.
        return int(self._cuda.cuEventQuery(ctypes.c_void_p(event))) == _NOT_READY

    def allocation_of(self, address: int) -> tuple[int, int]:
        """Address and size in bytes of the allocation that an address is in."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        found = ctypes.byref(base), ctypes.byref(size)
        self._call("cuMemGetAddressRange_v2", *found, ctypes.c_uint64(address))
        return base.value, size.value

    def copy_batch(self, stream: int, triples: Sequence[tuple[int, int, int]]) -> bool:
        """Queue copies of (to, from, bytes) in one call; False where the driver has no such."""
        if self._copy_batch is None or len(triples) < 2 or stream in _LEGACY_STREAMS:
            return False
        columns = [(ctypes.c_uint64 * len(triples))(*each) for each in zip(*triples, strict=True)]
        first, failed = ctypes.c_uint64(0), ctypes.c_uint64(0)
        attributes = (_COPY_ATTRIBUTES, ctypes.addressof(first), 1, ctypes.addressof(failed))
        if status := self._copy_batch(*columns, len(triples), *attributes, stream):
            raise DriverError(status, f" at {failed.value} of {len(triples)}")
        return True

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._cuda, name)(*arguments):
            raise DriverError(status)

    def _find_copy_batch(self) -> Any:
        # CUDA 13 dropped an argument; asking for 12.8's gives its signature from any later driver.
        find = getattr(self._cuda, "cuGetProcAddress_v2", None)
        found, status = ctypes.c_void_p(), ctypes.c_int()
        asked = (b"cuMemcpyBatchAsync", ctypes.byref(found), 12080, ctypes.c_uint64(0))
        if find is None or find(*asked, ctypes.byref(status)) or not found.value:
            return None
        return ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 9)(found.value)


def driver_release() -> str:
    """The release of the driver that is installed, such as "580.95.05", as NVML says it; "unknown"
    where NVML does not answer."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "unknown"
    release = ctypes.create_string_buffer(_RELEASE_BYTES)
    if nvml.nvmlInit_v2():
        return "unknown"
    refused = nvml.nvmlSystemGetDriverVersion(release, ctypes.c_uint(_RELEASE_BYTES))
    nvml.nvmlShutdown()
    return "unknown" if refused else release.value.decode()
