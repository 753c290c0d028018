"""What a client's loads and offloads share: chunk-sized buffers, and who copies."""

import threading
from dataclasses import dataclass

from kvtier.kernels.copying import Copier

# An exporter may not grow while it is viewed: room to try it in without moving anything.
_SLACK_BYTES = 16


class Buffers:
    """Keeps buffers for the next chunk, up to `keep_bytes`: first touch of fresh pages costs
    several times the copy into them. A buffer is used again only when nobody views it any more."""

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._free: list[bytearray] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> bytearray:
        """A buffer of that size with undefined content."""
        with self._lock:
            if self._free and len(self._free[-1]) == nbytes:
                return self._free.pop()
        buffer = bytearray(nbytes + _SLACK_BYTES)
        del buffer[nbytes:]
        return buffer

    def give_back(self, buffers: list[bytearray]) -> None:
        """Take back those of the buffers that nobody views; the others go with their views."""
        with self._lock:
            for buffer in filter(is_idle, buffers):
                if (len(self._free) + 1) * len(buffer) <= self._keep_bytes:
                    self._free.append(buffer)


@dataclass(frozen=True, slots=True)
class Workplace:
    """One client's buffers for the inline path, and its copier."""

    buffers: Buffers
    copier: Copier


def is_idle(buffer: bytearray) -> bool:
    """Whether no memoryview or array looks at the buffer."""
    try:
        buffer.append(0)
    except BufferError:
        return False
    del buffer[-1]
    return True
