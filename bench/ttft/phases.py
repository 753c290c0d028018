"""The engine processes, in their order, beside one sidecar.

alone   transformers alone computes every prompt, in one pass and in two; the sidecar is idle
cold    another process computes them, stores their KV, and exits
        the sidecar has written all to disk
ram     another process loads them: from RAM, which raises them into VRAM
vram    another process loads them: from VRAM
        the sidecar stops; its files are dropped from the page cache; it starts again
disk    another process loads them: from disk
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtier.bench.page_cache import cached_bytes, drop
from kvtier.bench.sidecar import Sidecar, sidecar
from kvtier.bench.ttft.shapes import Shape
from kvtier.config import format_bytes
from kvtier.errors import KvtierError
from kvtier.tiers.arena import slot_bytes_of

Record = dict[str, Any]
Say = Callable[[str], None]

ENGINE_TIMEOUT_S = 600.0
_SHARED_MEMORY = Path("/dev/shm")
_MIB = 1 << 20
_SPARE_BYTES = 64 * _MIB
_FLUSH_S = 100
_WRITING_S = 300.0
_POLL_S = 0.05


class TtftFailed(KvtierError):
    """A step could not be done; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and where. `work` is for logits, `disk` for chunks."""

    shape: Shape
    device: str
    repeats: int
    work: Path
    disk: Path


@dataclass(frozen=True, slots=True)
class Played:
    """What the engines said: the facts, which are the same for all, and each phase's answers.

    `left_in_page_cache` is how many bytes of the sidecar's files the system would not forget before
    the phase "disk".
    """

    facts: Record
    answers: dict[str, list[Record]]
    left_in_page_cache: int


def play(plan: Plan, say: Say) -> Played:
    """Do it all. Raises KvtierError."""
    facts: Record = {}
    answers: dict[str, list[Record]] = {}

    def phase(name: str, service: Sidecar, words: str) -> None:
        say(f"{name}: {words}")
        document = engine(plan, name, service.target)
        answers[name] = document["answers"]
        facts.update(document["facts"])

    with _running(plan) as service:
        phase("alone", service, "transformers alone computes every prompt")
        phase("cold", service, "another process computes and stores them")
        say("the sidecar writes them to disk")
        _await_disk(service)
        phase("ram", service, "another process loads them from RAM")
        phase("vram", service, "another process loads them from VRAM")
        say("the sidecar stops, its files leave the page cache, it starts again")
    left = _forget(plan.disk)
    with _running(plan) as service:
        phase("disk", service, "another process loads them from disk")
    return Played(facts, answers, left)


def engine(plan: Plan, phase: str, target: str) -> Record:
    """Run one engine process to its end; what it printed. Raises TtftFailed when it failed."""
    command = [
        *(sys.executable, "-m", "kvtier.bench.ttft.engine"),
        *("--shape", plan.shape.name, "--device", plan.device, "--phase", phase),
        *("--repeats", str(plan.repeats), "--out", str(plan.work), "--target", target),
    ]
    try:
        # run() kills the process when it is interrupted or late.
        done = subprocess.run(
            command, stdout=subprocess.PIPE, timeout=ENGINE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise TtftFailed(f"{phase}: not done after {ENGINE_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        raise TtftFailed(
            f"{phase}: the engine ended with status {done.returncode}; its message is above. "
            "Are the extras installed? pip install 'kvtier[demo,cuda13]'"
        )
    document: Record = json.loads(done.stdout)
    return document


def settings(plan: Plan) -> dict[str, str]:
    """The sidecar's: room for every chunk in every tier."""
    nbytes = tier_bytes(plan.shape, plan.repeats)
    longest = max(plan.shape.lengths) // plan.shape.chunk_tokens
    # Of what is raised at once, VRAM is to be twice as large: see service/raising.py.
    raised_bytes = 2 * longest * slot_bytes_of(plan.shape.layout.nbytes)
    return {
        "gpu.device": plan.device,
        "gpu.capacity": f"{max(nbytes, raised_bytes)}B",
        "cpu.capacity": f"{nbytes}B",
        "cpu.directory": str(_SHARED_MEMORY),
        "disk.directory": str(plan.disk),
        "disk.write": "write_through",
        "disk.capacity": f"{2 * nbytes}B",  # it may occupy so much, and takes what it needs
        "server.shutdown_flush_s": str(_FLUSH_S),
    }


def tier_bytes(shape: Shape, repeats: int) -> int:
    """What one tier takes for so many prompts of each length."""
    return shape.chunks(repeats) * slot_bytes_of(shape.layout.nbytes) + _SPARE_BYTES


def repeats_that_fit(shape: Shape, free_bytes: int | None = None) -> int:
    """How many prompts of each length the host's shared memory has room for, as far as they are
    wanted. Raises TtftFailed when it has none for one."""
    if free_bytes is None:
        free_bytes = shutil.disk_usage(_SHARED_MEMORY).free
    for repeats in range(shape.repeats, 0, -1):
        if tier_bytes(shape, repeats) <= free_bytes:
            return repeats
    raise TtftFailed(
        f"{_SHARED_MEMORY}: {format_bytes(free_bytes)} free, {format_bytes(tier_bytes(shape, 1))} "
        "needed; give more, in a container by --shm-size"
    )


@contextmanager
def _running(plan: Plan) -> Iterator[Sidecar]:
    """A sidecar with all its tiers, and a folder for its socket, whose path must be short."""
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-") as folder,
        sidecar(Path(folder), settings(plan)) as service,
    ):
        if "gpu" not in {tier.name for tier in service.stats().tiers}:
            log = service.log.read_text(errors="replace")[-1000:]
            raise TtftFailed(f"the sidecar has no VRAM tier: {log}")
        yield service


def _await_disk(service: Sidecar) -> None:
    """Return once all that was stored is on disk, so that writing it disturbs nobody later."""
    until_s = time.monotonic() + _WRITING_S
    while time.monotonic() < until_s:
        counters = service.stats().counters
        if counters["disk_written_chunks"] >= counters["committed_chunks"]:
            return
        if skipped := counters["disk_skipped_chunks"]:
            raise TtftFailed(
                f"disk: {skipped} chunks could not be written; is there room in --out?"
            )
        time.sleep(_POLL_S)
    raise TtftFailed(f"disk: not all was written after {_WRITING_S:.0f} s")


def _forget(folder: Path) -> int:
    """Drop a folder's files from the page cache; how many bytes of them stay."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size]
    for file in files:
        drop(file)
    return sum(map(cached_bytes, files))
