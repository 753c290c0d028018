"""A device without a GPU, as asynchronous as one.

Its memory is shared memory of this host, so addresses of regions are real ones: kernels compiled
for the CPU work on them, and another process can open them. `host_streams.py` has its streams.
"""

import ctypes
import fcntl
import mmap
import os
import random
import secrets
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvtier.kernels.device import (
    HANDLE_BYTES,
    DeviceError,
    OutOfDeviceMemory,
    Place,
    Region,
    Span,
    Stream,
    Urgency,
)
from kvtier.kernels.host_streams import Chaos, HostStream, Lately, Threads

# A handle: kind and version, the exporter's process and file number, the file's size and token.
_HANDLE = struct.Struct(f"<15sBIIQ16s{HANDLE_BYTES - 48}x")
_KIND = b"kvtier:host".ljust(15, b"\0"), 1
# Nobody can change a file's size any more, so no access to it can fail later.
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class Kernels(Protocol):
    """Kernels compiled for the CPU."""

    def run(self, kernel: str, threads: int, job_address: int) -> None:
        """Run a kernel to its end. Raises DeviceError when there is none of that name."""
        ...


@dataclass(eq=False, slots=True)
class _Memory:
    """What is behind a region. Its anchor keeps it mapped; work that uses it holds that, too."""

    anchor: ctypes.c_char | None = None  # none of adopted memory
    fd: int = -1  # of allocated memory
    token: bytes = b""


class HostDevice:
    """The device of this host's memory and processors.

    `kernels` runs what `launch` names, by default `HostKernels`; `memory_bytes` is how much can be
    allocated. Calls raise ValueError for sizes, regions and streams that cannot be right.
    """

    name = "host"

    def __init__(
        self, chaos: Chaos | None = None, kernels: Kernels | None = None, memory_bytes: int = 2**30
    ) -> None:
        self._random = None if chaos is None else random.Random(chaos.seed)
        self._order = Threads() if chaos is None else Lately(chaos.seed)
        self._kernels = kernels
        self._free_bytes = memory_bytes
        self._streams: dict[int, HostStream] = {}
        self._memories: dict[Region, _Memory] = {}
        self._lock = threading.RLock()  # of all the above

    def stream(self, urgency: Urgency) -> Stream:
        with self._alone():
            handle = len(self._streams) + 1
            return self._streams.setdefault(handle, HostStream(handle, self._order))

    def stream_of(self, handle: int) -> Stream:
        found = self._streams.get(handle)
        if found is None:
            raise DeviceError(f"stream_of: {handle:#x} is no stream of {self.name}")
        return found

    def allocate(self, nbytes: int) -> Region:
        _check_size("allocate", nbytes)
        with self._alone():
            if nbytes > self._free_bytes:
                raise OutOfDeviceMemory(f"allocate: {nbytes} bytes wanted, {self._free_bytes} free")
            region = self._keep(_new_memory(nbytes), Place.DEVICE, nbytes)
            self._free_bytes -= nbytes
        return region

    def register(self, memory: memoryview) -> Region:
        try:
            anchor = ctypes.c_char.from_buffer(memory)
        except (TypeError, ValueError) as error:
            raise DeviceError(f"register: {error}; pass writable, contiguous bytes") from error
        start, end = ctypes.addressof(anchor), ctypes.addressof(anchor) + memory.nbytes
        with self._alone():
            for each in self._memories:
                pinned = each.place is Place.HOST
                if pinned and each.address < end and start < each.address + each.nbytes:
                    raise DeviceError(f"register: {each} is pinned already; release it first")
            return self._keep(_Memory(anchor), Place.HOST, memory.nbytes)

    def adopt(self, address: int, nbytes: int) -> Region:
        region = Region(Place.DEVICE, address, nbytes)
        with self._alone():
            self._memories.setdefault(region, _Memory())
        return region

    def export(self, region: Region) -> bytes:
        self._order.check_open()
        memory = self._memory(region)
        if memory.fd < 0:
            raise DeviceError(f"export: {region} was not allocated by this device")
        return _HANDLE.pack(*_KIND, os.getpid(), memory.fd, region.nbytes, memory.token)

    def open(self, handle: bytes, nbytes: int) -> Region:
        _check_size("open", nbytes)
        if len(handle) != HANDLE_BYTES:
            raise DeviceError(f"open: a handle has {HANDLE_BYTES} bytes, this one {len(handle)}")
        *kind, process, number, size, token = _HANDLE.unpack(handle)
        if tuple(kind) != _KIND:
            raise DeviceError(f"open: not a handle of memory of {self.name}")
        if size < nbytes:
            raise DeviceError(f"open: {nbytes} bytes wanted, the exported memory has {size}")
        try:
            anchor = _open_exported(process, number, size, token)
        except OSError as error:
            ended = f"has process {process}, which exported it, ended or released it?"
            raise DeviceError(f"open: {error}; {ended}") from error
        with self._alone():
            return self._keep(_Memory(anchor), Place.DEVICE, nbytes)

    def release(self, region: Region) -> None:
        with self._alone():
            memory = self._memory(region)
            if memory.anchor is None:
                raise ValueError(f"release: {region} is adopted; it is its owner's")
            if memory.fd >= 0:
                self._free_bytes += region.nbytes
                os.close(memory.fd)
            del self._memories[region]

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        copies = [self._copy(to, out_of) for to, out_of in pairs]
        if self._random is not None:
            self._random.shuffle(copies)
        for each in copies:
            self._queue(stream, each)

    def launch(self, stream: Stream, kernel: str, threads: int, job: bytes) -> None:
        if threads < 1 or not job or len(job) % 8:
            raise ValueError(f"launch: {threads} threads with a job of {len(job)} bytes")
        self._order.check_open()
        if self._kernels is None:  # only a device that launches needs a compiler
            from kvtier.kernels.compiled import HostKernels  # noqa: PLC0415

            self._kernels = HostKernels()
        words, run = (ctypes.c_int64 * (len(job) // 8)).from_buffer_copy(job), self._kernels.run
        self._queue(stream, lambda: run(kernel, threads, ctypes.addressof(words)))

    def describe(self) -> dict[str, str]:
        return {"model": self.name}

    def close(self) -> None:
        if self._order.forked:  # its threads and memory are the parent's
            return
        self._order.close()
        with self._lock:
            for memory in self._memories.values():
                if memory.fd >= 0:
                    os.close(memory.fd)
            self._memories.clear()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have the device, which is open, to oneself: what is kept then, closing sees."""
        self._order.check_process()  # in a forked child the lock may be taken, and stay so
        with self._lock:
            self._order.check_open()
            yield

    def _queue(self, stream: Stream, run: Callable[[], None]) -> None:
        if not isinstance(stream, HostStream) or stream.order is not self._order:
            raise ValueError(f"{stream!r} is not a stream of this device")
        stream.queue(run)

    def _copy(self, to: Span, out_of: Span) -> Callable[[], None]:
        if to.nbytes != out_of.nbytes:
            raise ValueError(f"copy: {out_of.nbytes} bytes to a span of {to.nbytes}")
        anchors = [self._memory(span.region).anchor for span in (to, out_of)]

        def run() -> None:
            assert anchors  # holding them keeps both spans mapped until here
            if not {to.region, out_of.region} <= self._memories.keys():
                raise DeviceError(f"copy: {out_of} or {to} was released before the copy was done")
            ctypes.memmove(to.address, out_of.address, to.nbytes)

        return run

    def _memory(self, region: Region) -> _Memory:
        memory = self._memories.get(region)
        if memory is None:
            raise ValueError(f"{region} is released or of another device")
        return memory

    def _keep(self, memory: _Memory, place: Place, nbytes: int) -> Region:
        assert memory.anchor is not None
        region = Region(place, ctypes.addressof(memory.anchor), nbytes)
        # Adopted memory may be in its place: its owner freed it, for its address was free.
        self._memories[region] = memory
        return region


def _check_size(call: str, nbytes: int) -> None:
    if nbytes < 1:
        raise ValueError(f"{call}: {nbytes} bytes; at least one is needed")


def _new_memory(nbytes: int) -> _Memory:
    token = secrets.token_bytes(16)
    try:
        fd = os.memfd_create(f"kvtier-{token.hex()}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return _Memory(_map(fd, nbytes), fd, token)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:  # such as EMFILE: memory takes two files while it is mapped
        raise OutOfDeviceMemory(f"allocate: {nbytes} bytes of host memory: {error}") from error


def _map(fd: int, nbytes: int) -> ctypes.c_char:
    return ctypes.c_char.from_buffer(mmap.mmap(fd, nbytes))


def _open_exported(process: int, number: int, nbytes: int, token: bytes) -> ctypes.c_char:
    """Map the file that was exported, and no other. Raises OSError."""
    link = Path(f"/proc/{process}/fd/{number}")
    name = Path(f"/memfd:kvtier-{token.hex()} (deleted)")
    if link.readlink() == name:  # before it is opened: to open what is no file could block
        fd = os.open(link, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
            same = sealed and os.fstat(fd).st_size == nbytes
            if same and Path(f"/proc/self/fd/{fd}").readlink() == name:
                return _map(fd, nbytes)
        finally:
            os.close(fd)
    raise FileNotFoundError(f"{link} is not what was exported")
