"""A real `kvtier serve` process: started in a directory, waited for, stopped whatever fails."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from kvtier.client import ServiceStats, Unreachable, fetch_stats
from kvtier.errors import KvtierError

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 120.0
_STATS_TIMEOUT_S = 60.0
_POLL_S = 0.005
_KIB = 1024


class SidecarFailed(KvtierError):
    """The service did not start or did not stop cleanly; the message ends with what it said."""


@dataclass(slots=True)
class Sidecar:
    """A running service. `start_s` is the time from its process' start until it first answered."""

    target: str
    process: "subprocess.Popen[bytes]"
    log: Path
    start_s: float

    def stats(self) -> ServiceStats:
        """What it holds and has done. Raises Unreachable."""
        return fetch_stats(self.target, _STATS_TIMEOUT_S)

    def memory_bytes(self, kind: str) -> int:
        """A line of the process' memory status, such as "RssAnon" (its own pages, no arena)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name == kind:
                return int(value.split()[0]) * _KIB
        raise SidecarFailed(f"the system does not say {kind} of a process")


@contextmanager
def sidecar(directory: Path, settings: Mapping[str, str]) -> Iterator[Sidecar]:
    """Run `kvtier serve` with its socket and log in a directory; stops it at the block's end.

    `settings` are those of `--set`, such as {"cpu.capacity": "1GiB"}; nothing comes from the
    environment. Raises SidecarFailed when it does not start, or does not stop cleanly.
    """
    target = f"unix://{directory}/kvtier.sock"
    command = [sys.executable, "-m", "kvtier", "serve", "--listen", target]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    log = directory / "kvtier.log"
    with _no_orphan(), log.open("ab") as output:
        started_s = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=_environment()
        )
        try:
            _wait_until_ready(process, target, log)
            yield Sidecar(target, process, log, time.perf_counter() - started_s)
        except BaseException:
            _stop(process)
            raise
        if _stop(process) != 0:
            raise SidecarFailed(f"the sidecar did not stop cleanly: {_last_lines(log)}")


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("KVTIER_")}


def _wait_until_ready(process: "subprocess.Popen[bytes]", target: str, log: Path) -> None:
    until = time.monotonic() + _START_TIMEOUT_S
    socket = Path(target.removeprefix("unix://"))
    while time.monotonic() < until:
        if process.poll() is not None:
            raise SidecarFailed(f"the sidecar did not start: {_last_lines(log)}")
        if socket.exists():
            try:
                fetch_stats(target, 1.0)
            except Unreachable:
                pass
            else:
                return
        time.sleep(_POLL_S)
    raise SidecarFailed(f"the sidecar did not answer in {_START_TIMEOUT_S:.0f} s")


def _stop(process: "subprocess.Popen[bytes]") -> int:
    """End the process, politely first; returns its exit status."""
    process.terminate()
    try:
        return process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return " / ".join(lines[-3:]) or "it said nothing"


@contextmanager
def _no_orphan() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that whoever stops the benchmark stops the sidecar too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
