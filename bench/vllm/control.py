"""A plain file as large as the longest prompt's chunks, written when they are: reading it is what
the medium costs without kvtier."""

import os
import time
from pathlib import Path

_PIECE_BYTES = 1 << 20


class Control:
    """The file, and a buffer of its size that was touched before."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self._path = path
        self._buffer = bytearray(os.urandom(_PIECE_BYTES)) * -(-nbytes // _PIECE_BYTES)
        with path.open("wb") as file:
            file.write(self._buffer)
            os.fsync(file.fileno())

    def read_ms(self) -> float:
        """Milliseconds that one read of the whole file takes now."""
        rest = memoryview(self._buffer)
        started_s = time.perf_counter()
        with self._path.open("rb", buffering=0) as file:
            while rest:
                rest = rest[file.readinto(rest[:_PIECE_BYTES]) or len(rest) :]
        return 1000 * (time.perf_counter() - started_s)
