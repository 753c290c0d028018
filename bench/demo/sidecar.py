"""The demo's sidecar: one `kvtier serve` process, started, stopped, killed, cleaned up after."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import kvtier
from kvtier.errors import KvtierError
from kvtier.spaces import Layout, Space

RAM_BYTES = 1 << 30
_START_S = 120.0
_STOP_S = 90.0
_LOG_TAIL = 2000
_SHARED_MEMORY = Path("/dev/shm")
# A session in a space of its own: all it tells is that the service answers.
_PROBE = Space("kvtier demo: is it there?", Layout("float32", 1, 1, 8, tokens=16))


class DemoFailed(KvtierError):
    """A step of the demo could not be done; the message says which and why."""


class Sidecar:
    """One `kvtier serve` at a time. Leaving the `with` block stops it and removes all it stored."""

    def __init__(self, store: Path) -> None:
        self._folders = {
            "socket": Path(tempfile.mkdtemp(prefix="kvtier-")),  # short: socket paths are limited
            "disk": Path(tempfile.mkdtemp(prefix="disk-", dir=store)),
            "arena": Path(tempfile.mkdtemp(prefix="kvtier-demo-", dir=_memory_folder(store))),
        }
        self._log = store / "sidecar.log"
        self._log.write_bytes(b"")
        self._process: subprocess.Popen[bytes] | None = None
        self.target = f"unix://{self._folders['socket'] / 'kvtier.sock'}"

    def start(self) -> None:
        """Start the service and wait until it answers. Raises DemoFailed when it does not."""
        settings = {
            "server.listen": self.target,
            "cpu.capacity": f"{RAM_BYTES}B",
            "cpu.directory": str(self._folders["arena"]),
            "disk.directory": str(self._folders["disk"]),
            "disk.write": "write_through",
            "disk.capacity": f"{RAM_BYTES}B",
        }
        command = [sys.executable, "-m", "kvtier", "serve"]
        for name, value in settings.items():
            command += ["--set", f"{name}={value}"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._wait_ready(self._process)

    def stop(self) -> None:
        """Stop the service as an operator would; it writes to disk what RAM holds.

        Raises DemoFailed when it does not end by itself with status 0.
        """
        process = self._running()
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"sidecar: still running {_STOP_S:.0f} s after SIGTERM") from None
        self._process = None
        if status != 0:
            raise DemoFailed(f"sidecar: ended with status {status}\n{self._log_tail()}")

    def kill(self) -> None:
        """Kill the service without a chance to do anything."""
        process = self._running()
        process.kill()
        process.wait()
        self._process = None

    def drop_page_cache(self) -> None:
        """Ask the system to forget the files of the disk tier, so that they are read from disk."""
        for file in self._folders["disk"].iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()  # no harm where it has ended already
            self._process.wait()
        for folder in self._folders.values():
            shutil.rmtree(folder, ignore_errors=True)

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            raise DemoFailed(f"sidecar: it is not running\n{self._log_tail()}")
        return self._process

    def _wait_ready(self, process: "subprocess.Popen[bytes]") -> None:
        until = time.monotonic() + _START_S
        with kvtier.connect(self.target, _PROBE, name="demo-probe") as client:
            while not client.wait_ready(0.5):
                if process.poll() is not None:
                    raise DemoFailed(f"sidecar: it did not start\n{self._log_tail()}")
                if time.monotonic() > until:
                    raise DemoFailed(f"sidecar: no answer after {_START_S:.0f} s")

    def _log_tail(self) -> str:
        return self._log.read_bytes()[-_LOG_TAIL:].decode(errors="replace")


def _memory_folder(otherwise: Path) -> Path:
    """Where the arena's file lies: shared memory, unless there is too little of it (containers)."""
    needed = RAM_BYTES + RAM_BYTES // 8
    if os.access(_SHARED_MEMORY, os.W_OK) and shutil.disk_usage(_SHARED_MEMORY).free >= needed:
        return _SHARED_MEMORY
    return otherwise
