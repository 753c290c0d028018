"""Loads of chunks that are on disk alone, against plain reads of a file with the same bytes.

The service is started anew for each measurement, so that its RAM is empty. Both sides end with the
bytes in buffers of this process that were touched before.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from kvtier.bench.page_cache import cached_bytes, drop, warm
from kvtier.bench.payload import MIB, TOKENS, blank, check_same, kv_like, token_ids
from kvtier.bench.report import Progress
from kvtier.bench.sidecar import Sidecar, SidecarFailed, sidecar
from kvtier.bench.timing import ratio, seconds
from kvtier.client import Client, connect
from kvtier.spaces import Space

_DEADLINE_S = 600.0
_DATA_FILE = "data.mdb"
# Of the data: with more of it in the page cache a file is not cold. There are file systems that
# ignore the request.
_COLD_SHARE = 0.1
_STATES = ("warm", "cold")


@dataclass(slots=True)
class Loads:
    """Seconds of each round, by cache state. A state that could not be had has no rounds."""

    service: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in _STATES})
    plain: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in _STATES})
    data_bytes: int = 0
    stored_bytes: int = 0

    def figures(self) -> dict[str, Any]:
        """Ratios and rates by name; None where there is no figure."""
        found: dict[str, Any] = {}
        for state in _STATES:
            ours, plain = self.service[state], self.plain[state]
            found[f"load_{state}_ratio"] = ratio(plain, ours) if ours else None
            for name, times in (("load", ours), ("plain", plain)):
                rate = self.data_bytes / 1e9 / median(times) if times else None
                found[f"{name}_{state}_gb_s"] = rate
        found["stored_share"] = self.stored_bytes / self.data_bytes
        return found


class LoadTrial:
    """Chunks on disk in a service's store and, beside it, in a plain file."""

    def __init__(self, folder: Path, space: Space, batch: int, compression: str) -> None:
        nbytes = space.layout.nbytes
        self._folder = folder
        self._space = space
        self._sources = kv_like(batch, nbytes, seed=1)
        self._targets = blank(batch, nbytes)
        self._plain = folder / "plain.bin"
        self._store = folder / "store"
        self._tokens = token_ids(batch * TOKENS, seed=1)
        self._settings = {
            "cpu.capacity": str(round(2.2 * batch * (nbytes + 4096)) + 64 * MIB),
            "disk.directory": str(self._store),
            "disk.capacity": str(round(1.5 * batch * nbytes) + 256 * MIB),
            "disk.compression": compression,
            "disk.write": "write_through",
        }

    def run(self, rounds: int, progress: Progress) -> Loads:
        """Store everything once, then load and read it in turn, warm and cold."""
        loads = Loads(data_bytes=sum(source.nbytes for source in self._sources))
        self._write()
        total = rounds * len(_STATES)
        for number in range(total):
            progress("restarting and loading", number, total)
            self._round(loads, _STATES[number % 2], ours_first=number // 2 % 2 == 0)
        progress("restarting and loading", total, total)
        return loads

    def _write(self) -> None:
        with self._plain.open("wb") as file:
            for source in self._sources:
                file.write(source.data)
            file.flush()
            os.fsync(file.fileno())
        with (
            sidecar(self._folder, self._settings) as service,
            self._connect(service) as client,
            client.offload(client.prefix(self._tokens)) as offload,
        ):
            for slot in offload:
                slot.write(self._sources[slot.index].data)

    def _round(self, loads: Loads, state: str, *, ours_first: bool) -> None:
        files = (self._plain, self._store / _DATA_FILE)
        for file in files:
            warm(file) if state == "warm" else drop(file)
        with sidecar(self._folder, self._settings) as service, self._connect(service) as client:
            loads.stored_bytes = _stored_bytes(service)
            most = loads.data_bytes * _COLD_SHARE
            if state == "cold" and any(cached_bytes(file) > most for file in files):
                return
            if ours_first:
                loads.service[state].append(self._timed(lambda: self._load(client)))
            loads.plain[state].append(self._timed(self._read))
            if not ours_first:
                loads.service[state].append(self._timed(lambda: self._load(client)))

    def _timed(self, work: Callable[[], None]) -> float:
        """Seconds that it takes to fill the buffers; their content is checked afterwards."""
        for target in self._targets:
            target.fill(0x55)
        elapsed_s = seconds(work)
        check_same(self._targets, self._sources)
        return elapsed_s

    def _load(self, client: Client) -> None:
        with client.load(client.prefix(self._tokens)) as loaded:
            for chunk in loaded:
                chunk.read_into(self._targets[chunk.index].data)

    def _read(self) -> None:
        with self._plain.open("rb", buffering=0) as file:
            for target in self._targets:
                view = target.data
                while view.nbytes:
                    view = view[file.readinto(view) or 0 :]

    def _connect(self, service: Sidecar) -> Client:
        client = connect(service.target, self._space, deadline_s=_DEADLINE_S, path="shm")
        if not client.wait_ready(_DEADLINE_S):
            raise SidecarFailed("the client could not connect")
        return client


def _stored_bytes(service: Sidecar) -> int:
    return sum(tier.used_bytes for tier in service.stats().tiers if tier.name == "disk")
