"""How fast the service starts, empty and with many chunks on disk, and what memory they take."""

import asyncio
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from kvtier.bench.page_cache import drop
from kvtier.bench.payload import MIB, token_ids
from kvtier.bench.report import Progress
from kvtier.bench.sidecar import Sidecar, SidecarFailed, sidecar
from kvtier.client import Client, connect
from kvtier.config import load
from kvtier.spaces import Layout, Space

# The smallest chunk that still has every part of one: what counts here is how many there are.
_SPACE = Space("kvtier-bench", Layout(dtype="int8", layers=1, heads=1, head_dim=8, tokens=16))
_PROMPT_CHUNKS = 128
_SLOT_BYTES = 4096
_DISK_BYTES_PER_CHUNK = 8192
_DEADLINE_S = 60.0
_WRITE_TIMEOUT_S = 1200.0
_POLL_S = 0.2
_REPEATS = 3
_DATA_FILE = "data.mdb"


def measure(folder: Path, chunks: int, progress: Progress) -> dict[str, Any]:
    """Write so many chunks through a client, then start on them again and again."""
    empty = _settings(folder / "empty", chunks)
    full = _settings(folder / "many", chunks)
    start_s = median(_start_s(folder, {**empty, "disk.directory": ""}) for _ in range(_REPEATS))
    figures = {
        "restart_s": None,
        "resident_mib_100k": None,
        "start_s": start_s,
        **_populate(folder, full, chunks, progress),
    }
    progress("restarting", 0, 3)
    figures["restart_s"] = median(_open_s(full, chunks) for _ in range(_REPEATS))
    progress("restarting", 1, 3)
    drop(folder / "many" / _DATA_FILE)
    figures["restart_cold_s"] = _open_s(full, chunks)
    progress("restarting", 2, 3)
    answers = [_answer(folder, full, _PROMPT_CHUNKS) for _ in range(_REPEATS)]
    figures["restart_answer_s"] = median(answer_s for answer_s, _ in answers)
    figures["restart_answer_empty_s"] = median(
        _answer(folder, empty, 0)[0] for _ in range(_REPEATS)
    )
    figures["resident_mib_100k"] = max(resident for _, resident in answers)
    progress("restarting", 3, 3)
    return figures


def _settings(store: Path, chunks: int) -> dict[str, str]:
    return {
        "cpu.capacity": str(16 * MIB),
        "disk.directory": str(store),
        "disk.write": "write_through",
        "disk.capacity": str(64 * MIB + chunks * _DISK_BYTES_PER_CHUNK),
    }


def _start_s(folder: Path, settings: dict[str, str]) -> float:
    with sidecar(folder, settings) as service:
        return service.start_s


def _populate(
    folder: Path, settings: dict[str, str], chunks: int, progress: Progress
) -> dict[str, Any]:
    """Offload prompt after prompt until there are so many chunks in RAM and on disk."""
    room = str(64 * MIB + chunks * _SLOT_BYTES * 9 // 8)
    with sidecar(folder, {**settings, "cpu.capacity": room}) as service, _client(service) as client:
        resident_empty = _resident_mib(service)
        start = time.perf_counter()
        for first in range(0, chunks, _PROMPT_CHUNKS):
            progress("offloading chunks", first, chunks)
            prefix = client.prefix(_prompt(first))[: chunks - first]
            with client.offload(prefix) as offload:
                for slot in offload:
                    slot.data[:] = slot.index.to_bytes(8, "little") * (len(slot.data) // 8)
            if len(offload.outcome.stored) != len(prefix):
                raise SidecarFailed(f"not all was stored: {offload.outcome.refused}")
        _wait_written(service, chunks, progress)
        return {
            "resident_mib_empty": resident_empty,
            "resident_mib_100k_in_ram": _resident_mib(service),
            "write_chunks_per_s": chunks / (time.perf_counter() - start),
        }


def _wait_written(service: Sidecar, chunks: int, progress: Progress) -> None:
    until = time.monotonic() + _WRITE_TIMEOUT_S
    written = 0
    while time.monotonic() < until:
        written = sum(tier.chunks for tier in service.stats().tiers if tier.name == "disk")
        progress("writing chunks to disk", written, chunks)
        if written >= chunks:
            return
        if skipped := service.stats().counters["disk_skipped_chunks"]:
            raise SidecarFailed(f"{skipped} of {chunks} chunks were not written to disk")
        time.sleep(_POLL_S)
    raise SidecarFailed(f"{written} of {chunks} chunks were written to disk in time")


def _prompt(first: int) -> list[int]:
    return token_ids(_PROMPT_CHUNKS * _SPACE.layout.tokens, seed=first)


def _client(service: Sidecar) -> Client:
    client = connect(service.target, _SPACE, deadline_s=_DEADLINE_S, path="shm")
    if not client.wait_ready(_DEADLINE_S):
        raise SidecarFailed("the client could not connect")
    return client


def _answer(folder: Path, settings: dict[str, str], held: int) -> tuple[float, float]:
    """Seconds from the process' start to its first answered lookup, and its memory in MiB then."""
    before = time.perf_counter()
    with sidecar(folder, settings) as service, _client(service) as client:
        found = client.lookup(client.prefix(_prompt(0)))
        elapsed_s = time.perf_counter() - before
        if found != held:
            raise SidecarFailed(f"{found} of {held} chunks were found after the restart")
        return elapsed_s, _resident_mib(service)


def _resident_mib(service: Sidecar) -> float:
    """Memory of the process' own: no arena, no mapped file."""
    return service.memory_bytes("RssAnon") / MIB


def _open_s(settings: dict[str, str], chunks: int) -> float:
    """Seconds to open the store and rebuild the index, in a process of its own."""
    overrides = [f"{name}={value}" for name, value in settings.items()]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        elapsed_s, found = pool.submit(_open_store, overrides).result()
    if found != chunks:
        raise SidecarFailed(f"{found} of {chunks} chunks came back")
    return elapsed_s


def _open_store(overrides: list[str]) -> tuple[float, int]:
    return asyncio.run(_build(overrides))


async def _build(overrides: list[str]) -> tuple[float, int]:
    """Seconds of the service's own composition root, and the chunks on disk that it then knows."""
    from kvtier.service.build import build  # noqa: PLC0415 - every command imports this module

    config = load(None, {}, overrides)
    start = time.perf_counter()
    core = build(config, lambda what, done, total: None)
    elapsed_s = time.perf_counter() - start
    core.start()
    found = sum(tier.chunks for tier in core.cache.tiers() if tier.name == "disk")
    await core.stop()
    return elapsed_s, found
