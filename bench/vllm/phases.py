"""The five engine processes, in their order, and the sidecar beside four of them.

without    vLLM alone: the reference; each exact prompt twice, for vLLM's own cache
cold       with kvtier, which is empty
ram        a new engine process: prefixes come from the sidecar's RAM
           the sidecar stops and starts again
disk       a new engine process: prefixes come from the sidecar's files
           the sidecar stops and starts again; its files are dropped from the page cache
disk_cold  a new engine process: prefixes come from the medium
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kvtier.bench.page_cache import cached_bytes, drop
from kvtier.bench.sidecar import Sidecar, sidecar
from kvtier.bench.vllm.control import Control
from kvtier.bench.vllm.measure import Phase, Say, play
from kvtier.bench.vllm.server import CHUNK_TOKENS, Launch, engine
from kvtier.bench.vllm.workload import EXACT_TOKENS, Workload

RAM_BYTES = 2 << 30  # the workload's KV takes 1.3 GiB
DISK_BYTES = 4 << 30
_FLUSH_S = 100
_QUIET_S = 2.0  # the sidecar has taken all it was given once nothing happens for this long
_SETTLE_S = 60.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Played:
    """Every phase, by its name. `left_in_page_cache` is what the system would not forget of the
    sidecar's files before the phase `disk_cold`; `plain_read_ms` is what it took, in the phases
    from disk, to read a plain file as large as the longest prompt's chunks."""

    phases: dict[str, Phase]
    left_in_page_cache: int
    plain_read_ms: dict[str, float]


def play_all(launch: Launch, workload: Workload, disk: Path, memory: Path, say: Say) -> Played:
    """Do it all; the sidecar keeps its chunks in `memory` and on `disk`. Raises KvtierError."""
    settings = {
        "cpu.capacity": f"{RAM_BYTES}B",
        "cpu.directory": str(memory),
        "disk.capacity": f"{DISK_BYTES}B",
        "disk.directory": str(disk / "store"),
        "disk.write": "write_through",
        "server.shutdown_flush_s": str(_FLUSH_S),
    }
    say("without: vLLM alone, the reference")
    with engine(launch, None, say) as running:
        without = play(running, workload, say, None, twice=True)

    plain_read_ms: dict[str, float] = {}

    def beside(service: Sidecar, name: str = "") -> Phase:
        before = service.stats().counters
        with engine(launch, service.target, say) as running:
            if name:
                plain_read_ms[name] = control.read_ms()
            phase = play(running, workload, say, without)
            settle(lambda: service.stats().counters)
        after = service.stats().counters
        return replace(phase, service={name: after[name] - before[name] for name in after})

    with sidecar(launch.folder, settings) as service:
        say("cold: vLLM with kvtier, which is empty")
        cold = beside(service)
        control = Control(disk / "plain.bin", _longest_bytes(service))
        say("ram: a new vLLM process, the same sidecar")
        ram = beside(service)
    with sidecar(launch.folder, settings) as service:
        say("disk: a new vLLM process, a new sidecar")
        from_disk = beside(service, "disk")
        say("the sidecar stops; its files are dropped from the page cache")
    left = forget(disk)
    with sidecar(launch.folder, settings) as service:
        say("disk_cold: a new vLLM process, a new sidecar")
        from_cold_disk = beside(service, "disk_cold")
    say("comparing")
    phases = {"without": without, "cold": cold, "ram": ram}
    phases |= {"disk": from_disk, "disk_cold": from_cold_disk}
    return Played(phases, left, plain_read_ms)


def _longest_bytes(service: Sidecar) -> int:
    """What the chunks of the longest prompt take."""
    (ram,) = (tier for tier in service.stats().tiers if tier.name == "cpu")
    return ram.used_bytes // ram.chunks * (max(EXACT_TOKENS) // CHUNK_TOKENS)


def settle(counters: Callable[[], dict[str, int]], quiet_s: float = _QUIET_S) -> None:
    """Return once the sidecar has taken and written what it was given: its counters stand still."""
    give_up_s = time.monotonic() + _SETTLE_S
    last, since_s = counters(), time.monotonic()
    while time.monotonic() < min(give_up_s, since_s + quiet_s):
        time.sleep(_POLL_S)
        now = counters()
        if now != last:
            last, since_s = now, time.monotonic()


def forget(folder: Path) -> int:
    """Drop a folder's files from the page cache; how many bytes of them stay."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size]
    for file in files:
        drop(file)
    return sum(map(cached_bytes, files))
