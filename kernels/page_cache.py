"""Whether parts of a file are in the page cache."""

import ctypes
import mmap

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class Residency:
    """Asks about one open file, of the length that it has now. Nothing of it is read."""

    def __init__(self, fd: int) -> None:
        self._mapping = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        self._view = np.frombuffer(self._mapping, np.uint8)

    def cached(self, offset: int, nbytes: int) -> bool:
        """Whether all pages of a part are there; False where the system does not say."""
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        length = min(offset + nbytes, self._view.nbytes) - start
        pages = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
        status = _libc.mincore(self._view.ctypes.data + start, length, pages.ctypes.data)
        return bool(status == 0 and (pages & 1).all())

    def close(self) -> None:
        """Unmap the file."""
        del self._view
        self._mapping.close()
