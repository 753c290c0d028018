"""The `shm` data path: client and service map the same arena; the client copies in and out of
slots.

Both ends are here. The service offers the arena's file and, per session, a tether: a small file
that the client keeps locked for as long as it may touch a slot. When a session's stream breaks, the
service cannot tell a dead client from one that is only cut off and still copying; the kernel can,
and it drops the lock exactly when the process dies or says it is done. Until then the session's
slots stay leased (DESIGN I3), so no broken connection can tear a chunk.
"""

import fcntl
import os
import struct
from pathlib import Path
from typing import Self

_FLOCK = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, process


class Tether:
    """The service's end of one session's tether."""

    def __init__(self, path: Path) -> None:
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._fd = fd
        self.was_held = False  # as far as `is_released` was asked

    def is_released(self) -> bool:
        """Whether no live process holds the other end."""
        # Asks as an open file description, not as a process: so the answer is right when the other
        # end is in this very process, and no lock is taken that could keep a client from holding.
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        found = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked))
        released = bool(found[0] == fcntl.F_UNLCK)
        self.was_held |= not released
        return released

    def close(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
        os.close(self._fd)


class HeldTether:
    """The client's end. A process lock, not inherited by fork: a child that outlives the engine's
    process must not keep its slots."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def hold(cls, path: Path) -> Self:
        """Lock the tether of a session just opened; OSError when it is gone or held by another."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd)

    def release(self) -> None:
        """Say that no slot of the session will be touched again."""
        os.close(self._fd)
