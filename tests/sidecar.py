"""A real `kvtier serve` process for tests, and chunks of which every byte can be checked."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from kvtier.chunks import Prefix
from kvtier.client import Client, Offloaded, ServiceStats, connect, fetch_stats
from kvtier.spaces import Layout, Space

ROOT = Path(__file__).resolve().parent.parent
HANG_S = 60.0  # nothing takes this long unless it hangs
CHUNK_TOKENS = 16
# What a service that is well never says.
_COMPLAINTS = re.compile(r"Traceback|ERROR|never retrieved|never awaited")


def space_of(name: str = "model", *, layers: int = 2, tenant: str = "") -> Space:
    """A space of small chunks: 2 KiB per layer."""
    layout = Layout(dtype="float16", layers=layers, heads=2, head_dim=16, tokens=CHUNK_TOKENS)
    return Space(name, layout, tenant=tenant)


def prompt_of(seed: int, chunks: int) -> list[int]:
    """Token ids of a prompt of that many full chunks; prompts of two seeds share no chunk."""
    return [seed * 1_000_000 + position for position in range(chunks * CHUNK_TOKENS)]


def content_of(key: bytes, nbytes: int) -> bytes:
    """The only right bytes of the chunk of that key."""
    return hashlib.shake_128(key).digest(nbytes)


def offload(client: Client, prefix: Prefix, deadline_s: float | None = None) -> Offloaded:
    """Store the right bytes of whatever the service wants of a prefix."""
    with client.offload(prefix, deadline_s) as wanted:
        for slot in wanted:
            slot.write(memoryview(content_of(prefix[slot.index], slot.data.nbytes)))
    return wanted.outcome


def load(client: Client, prefix: Prefix, deadline_s: float | None = None) -> int:
    """Load a prefix and compare every byte; returns how many chunks came."""
    count = 0
    with client.load(prefix, deadline_s) as loaded:
        for count, chunk in enumerate(loaded, start=1):
            assert chunk.index == count - 1
            assert bytes(chunk.data) == content_of(prefix[chunk.index], chunk.data.nbytes)
    return count


def until(condition: Callable[[], object], what: str) -> None:
    """Return once the condition holds. Only for what nothing can be waited on."""
    pause = threading.Event()
    give_up = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < give_up, f"never came true: {what}"
        pause.wait(0.01)


class Sidecar:
    """`kvtier serve` on a unix socket, with all its files below one directory but the arena's,
    which lie in memory. As a context manager it is running, and must end well unless it was
    killed."""

    def __init__(self, directory: Path, *settings: str, disk: bool = True) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.socket = directory / "s"
        self.target = f"unix://{self.socket}"
        self.disk = directory / "disk"
        shm = Path("/dev/shm")
        memory = shm if os.access(shm, os.W_OK) else directory
        self.memory = Path(tempfile.mkdtemp(prefix="kvtier-test-", dir=memory))
        self.settings = [
            f"server.listen={self.target}",
            f"cpu.directory={self.memory}",
            "cpu.capacity=16MiB",
            f"disk.directory={self.disk if disk else ''}",
            "disk.capacity=64MiB",
            "disk.commit_interval_ms=5",
            "disk.write=write_through",
            *settings,
        ]
        self.process: subprocess.Popen[str] | None = None
        self.log: list[str] = []
        self._clients: list[Client] = []
        self._reader: threading.Thread | None = None
        self._killed = False

    # ── the process ───────────────────────────────────────────────────────────────────────────────

    def command(self, *more: str) -> list[str]:
        """The command line, with settings after the usual ones."""
        settings = [word for each in (*self.settings, *more) for word in ("--set", each)]
        return [sys.executable, "-m", "kvtier", "serve", *settings]

    def start(self) -> Self:
        """Start the process; returns once it serves. Raises RuntimeError when it ends instead."""
        self._killed = False
        self.process = subprocess.Popen(
            self.command(), cwd=ROOT, env=clean_environ(), stderr=subprocess.PIPE, text=True
        )
        serving = threading.Event()
        self._reader = threading.Thread(target=self._read_log, args=(self.process, serving))
        self._reader.start()
        assert serving.wait(HANG_S), "neither serving nor ended"
        if "serving on" not in "".join(self.log[-1:]):
            raise RuntimeError(f"the service ended with {self.process.wait()}: {self.log}")
        return self

    def _read_log(self, process: "subprocess.Popen[str]", serving: threading.Event) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                self.log.append(line)
                if "serving on" in line:
                    serving.set()
        serving.set()

    def run_to_end(self, *more: str) -> "subprocess.CompletedProcess[str]":
        """Run a second service of the same settings that is expected to refuse."""
        return subprocess.run(
            self.command(*more),
            cwd=ROOT,
            env=clean_environ(),
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )

    def kill(self) -> None:
        """SIGKILL: it cleans nothing up."""
        self._killed = True
        self.signal(signal.SIGKILL)
        self.wait()

    def terminate(self) -> int:
        """SIGTERM, and its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        assert self._reader is not None
        status = self.process.wait(HANG_S)
        self._reader.join(HANG_S)
        return status

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            shutil.rmtree(self.memory, ignore_errors=True)
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for client in self._clients:
                client.close()
            assert self.process is not None
            if self.process.poll() is None and kind is None:
                assert self.terminate() == 0, "".join(self.log)
            elif self.process.poll() is None:
                self.kill()
            if kind is None and not self._killed:
                assert not self.complaints, "".join(self.log)
        finally:
            shutil.rmtree(self.memory, ignore_errors=True)

    @property
    def complaints(self) -> list[str]:
        """Lines of the service's log that tell of a mistake of ours."""
        return [line for line in self.log if _COMPLAINTS.search(line)]

    # ── its clients ───────────────────────────────────────────────────────────────────────────────

    def client(
        self, space: Space | None = None, *, path: str = "shm", deadline_s: float = 20.0
    ) -> Client:
        """A connected client, closed with the sidecar."""
        client = connect(self.target, space or space_of(), deadline_s=deadline_s, path=path)
        self._clients.append(client)
        assert client.wait_ready(HANG_S)
        return client

    def stats(self) -> ServiceStats:
        return fetch_stats(self.target, HANG_S)

    def until(self, condition: Callable[[ServiceStats], object], what: str) -> ServiceStats:
        """Ask for the statistics until they fulfil the condition; returns them."""
        seen: list[ServiceStats] = []

        def ask() -> object:
            seen[:] = [self.stats()]
            return condition(seen[0])

        until(ask, what)
        return seen[0]

    def until_idle(self) -> ServiceStats:
        """Wait until no lease is open and everything is on disk that can be."""

        def idle(stats: ServiceStats) -> bool:
            counted = stats.counters
            done = counted["disk_written_chunks"] + counted["disk_skipped_chunks"]
            gone = counted["evicted_cpu"]
            return not stats.leases and done + gone >= counted["committed_chunks"]

        return self.until(idle, "no leases and nothing left to write")


def clean_environ() -> dict[str, str]:
    """This environment without settings that would reach the service."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KVTIER_")}


@contextmanager
def closing(clients: Sequence[Client]) -> Iterator[None]:
    """Close clients at the end, whatever happens."""
    try:
        yield
    finally:
        for client in clients:
            client.close()
