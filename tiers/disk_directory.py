"""Whose the disk tier's directory is, and whether its last owners died of its file."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from kvtier.errors import AlreadyRunning, ConfigError

LOCK_FILE = "LOCK"


class OwnedDirectory:
    """A directory that this process alone uses, until it closes it or dies.

    LMDB may abort the process on a damaged tree. So that this cannot go on for ever, the lock file
    says, besides our pid, whether we are at LMDB's mercy just now and how many owners in a row have
    died while they were.
    """

    def __init__(self, path: Path, lock: int, deaths: int) -> None:
        """For `take`."""
        self.path = path
        self.deaths = deaths
        self._lock = lock

    @classmethod
    def take(cls, path: Path) -> Self:
        """Create the directory if need be, and lock it.

        Raises AlreadyRunning when another process has it, ConfigError when it cannot be used.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.stat().st_uid == os.geteuid():
                path.chmod(0o700)
            lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"disk.directory: {path} cannot be used: {error}") from None
        pid, deaths = _read(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise AlreadyRunning(
                f"disk.directory: {path} is in use by the process with pid {pid}"
            ) from None
        return cls(path, lock, deaths)

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Hold while the data file is opened. Getting through proves little of its other pages."""
        self._write("busy")
        try:
            yield
        finally:
            self._write("idle")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold around a write transaction. Getting through one, even in vain, ends the count."""
        self._write("busy")
        try:
            yield
        finally:
            self.deaths = 0
            self._write("idle")

    def close(self) -> None:
        """Give the directory back."""
        os.close(self._lock)

    def _write(self, state: str) -> None:
        os.pwrite(self._lock, f"{os.getpid():>10} {self.deaths:>4} {state}\n".encode(), 0)


def _read(lock: int) -> tuple[str, int]:
    """The pid in the lock file, and how many owners in a row have died at LMDB's mercy."""
    words = os.pread(lock, 64, 0).decode("ascii", "replace").split()
    if len(words) < 3 or not words[1].isdigit():
        return "unknown", 0
    return words[0], int(words[1]) + (words[2] == "busy")
