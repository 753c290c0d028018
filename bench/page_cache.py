"""Whether a file is in the page cache, and how it gets there or out of it."""

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

_STEP_BYTES = 8 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def warm(path: Path) -> None:
    """Read a file whole, so that every page of it is cached."""
    buffer = bytearray(_STEP_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def drop(path: Path) -> None:
    """Ask the system to forget a file's pages. It keeps those that some process has mapped."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
            pages = -(-len(mapping) // mmap.PAGESIZE)
            bits = np.zeros(pages, np.uint8)
            view = np.frombuffer(mapping, np.uint8)
            status = _libc.mincore(view.ctypes.data, len(mapping), bits.ctypes.data)
            del view
            if status != 0:
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            return int(np.count_nonzero(bits & 1)) * mmap.PAGESIZE
    finally:
        os.close(fd)
