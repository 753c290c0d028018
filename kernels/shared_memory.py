"""Host memory that two processes share.

An arena is a file in a memory-backed directory, mapped by the service and by each client on the
host. Its pages are populated before they are needed: first touch of a fresh page is several times
slower than a copy.
"""

import ctypes
import fcntl
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvtier.errors import AlreadyRunning, ConfigError

_POPULATE_STEP = 256 << 20
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def as_bytes_array(buffer: memoryview) -> NDArray[np.uint8]:
    """The buffer as a one-dimensional uint8 array over the same memory, read-only where it is."""
    return np.frombuffer(buffer, dtype=np.uint8)


class SharedMemory:
    """A mapped file of fixed size. `view` is writable."""

    def __init__(self, path: Path, mapping: mmap.mmap, fd: int) -> None:
        self.path = path
        self.nbytes = len(mapping)
        self.view = memoryview(mapping)
        self._mapping = mapping
        self._fd = fd

    @classmethod
    def create(cls, path: Path, nbytes: int) -> Self:
        """Make the file and own it until `close`; a file left by a dead owner is replaced.

        Raises AlreadyRunning when a live process owns it, ConfigError when the directory cannot
        hold `nbytes`.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise AlreadyRunning(f"arena {path}: another live service owns it") from None
        try:
            os.ftruncate(fd, 0)  # what a dead owner left is not ours to read
            _check_room(fd, path, nbytes)
            os.ftruncate(fd, nbytes)
            return cls(path, _map(fd, nbytes), fd)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(fd)
            raise

    @classmethod
    def open(cls, path: Path, nbytes: int) -> Self:
        """Map a file that another process made.

        Raises ValueError unless it is a regular file of at least `nbytes`, OSError when it cannot
        be opened.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size < nbytes:
                raise ValueError(f"arena {path}: not a file of {nbytes} bytes")
            return cls(path, _map(fd, nbytes), fd)
        except BaseException:
            os.close(fd)
            raise

    def populate(self) -> Iterator[int]:
        """Map every page for writing; yields the bytes done so far after each step."""
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        _libc.madvise(start, self.nbytes, _MADV_HUGEPAGE)  # a hint: refused where there are none
        for done in range(0, self.nbytes, _POPULATE_STEP):
            length = min(_POPULATE_STEP, self.nbytes - done)
            if _libc.madvise(start + done, length, _MADV_POPULATE_WRITE) != 0:
                self._touch(done, length)
            yield done + length

    def lock(self) -> bool:
        """Keep the system from paging the memory out; False where this process may not (see
        RLIMIT_MEMLOCK). Whoever maps the same memory profits."""
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        return bool(_libc.mlock(start, self.nbytes) == 0)

    def _touch(self, start: int, length: int) -> None:
        # For kernels before 5.14. A read is enough for tmpfs to give the page, and it changes
        # nothing that another process may be writing there.
        as_bytes_array(self.view[start : start + length])[:: mmap.PAGESIZE].sum()

    def close(self, *, unlink: bool) -> None:
        """Unmap, and remove the file if asked. Memory still viewed by others stays until they let
        go."""
        if unlink:
            self.path.unlink(missing_ok=True)
        try:
            self.view.release()
            self._mapping.close()
        except BufferError:
            pass  # someone still reads in place: the mapping goes when they do
        os.close(self._fd)


def remove_stale(directory: Path, pattern: str) -> list[Path]:
    """Remove the files of dead owners: those that match the pattern and that nobody holds
    locked."""
    removed = []
    for path in directory.glob(pattern):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # gone meanwhile, or not ours
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed.append(path)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
    return removed


def _map(fd: int, nbytes: int) -> mmap.mmap:
    return mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def _check_room(fd: int, path: Path, nbytes: int) -> None:
    # A sparse file on a full tmpfs would end in SIGBUS at the first touch; say it at start instead.
    found = os.fstatvfs(fd)
    room = found.f_bavail * found.f_frsize
    if room < nbytes:
        raise ConfigError(
            f"cpu.capacity: {nbytes} bytes do not fit in {path.parent}, which has {room} free; "
            "lower cpu.capacity or mount a larger memory-backed directory"
        )
