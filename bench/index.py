"""how the index grows: lookup, memory and restart at 10^4 to 10^7 chunks, without their bytes.

A lookup is the match of a prompt of 128 held chunks, and telling the policy of it. Beside it stands
an empty RPC to a service.
"""

import argparse
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np

from kvtier.bench.lookup import empty_call
from kvtier.bench.report import Progress, Report, Target
from kvtier.bench.sidecar import sidecar
from kvtier.chunks import ChunkKey
from kvtier.errors import InvalidRequest
from kvtier.spaces import Layout, Space
from kvtier.tiers.base import Record
from kvtier.tiers.index import Index
from kvtier.tiers.policies.registry import FAMILIES, make_family
from kvtier.tiers.rebuild import rebuild
from kvtier.tiers.tree import TierId

_SPACE = Space("kvtier-bench", Layout(dtype="int8", layers=1, heads=1, head_dim=1))
_PROMPT_CHUNKS = 128
_SMALLEST = 10_000
_LOOKUPS = 500
_CALLS = 500
_KEY_BYTES = 32
_BYTES_PER_CHUNK = 1200  # of records, tree and policy together, while they are made: rounded up
_TARGETS = {"lookup_to_rpc": Target(0.2, at_most=True)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chunks", type=int, default=10_000_000, metavar="COUNT", help="the largest index"
    )
    parser.add_argument("--policy", choices=list(FAMILIES), default="gix")


def run(options: argparse.Namespace) -> int:
    """Measure, and write the report to stdout. What does not fit in free memory is left out."""
    sizes, left_out = _sizes(options.chunks)
    progress = Progress()
    figures: dict[str, object] = {"lookup_to_rpc": None}
    grown = {}
    for number, chunks in enumerate(sizes):
        progress("filling indexes", number, len(sizes))
        grown[str(chunks)] = _apart(chunks, options.policy)
    progress("filling indexes", len(sizes), len(sizes))
    rpc_us = _empty_rpc_us()
    largest = grown[str(sizes[-1])]["lookup_us"]
    figures["lookup_to_rpc"] = largest / rpc_us
    figures |= {"lookup_growth": largest / grown[str(sizes[0])]["lookup_us"], "rpc_us": rpc_us}
    setup = {
        "policy": options.policy,
        "prompt_chunks": _PROMPT_CHUNKS,
        "left_out": ", ".join(map(str, left_out)) or None,
    }
    Report("index", {**figures, "chunks": grown}, setup, _TARGETS).emit(options)
    return 0


def _sizes(most: int) -> tuple[list[int], list[int]]:
    """Powers of ten up to the largest, and it; apart, those that memory has no room for."""
    if most < _SMALLEST:
        raise InvalidRequest(f"--chunks: {most} is less than {_SMALLEST}")
    sizes = [_SMALLEST]
    while sizes[-1] < most:
        sizes.append(min(10 * sizes[-1], most))
    room = _free_bytes() // _BYTES_PER_CHUNK
    fitting = [chunks for chunks in sizes if chunks <= room]
    if not fitting:
        raise InvalidRequest(f"--chunks: memory has room for {room} chunks, not for {_SMALLEST}")
    return fitting, sizes[len(fitting) :]


def _free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) << 10
    raise InvalidRequest("/proc/meminfo: it does not say what memory is free")


def _apart(chunks: int, policy: str) -> dict[str, float]:
    """The figures of one index, from a process of its own: what another left behind counts for
    nothing."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(fill, chunks, policy).result()


def fill(chunks: int, policy: str) -> dict[str, float]:
    """Bring back an index of so many chunks from records, as a restart does, and look up."""
    gc.disable()  # as the service does while it starts
    family = make_family(policy)
    empty = _resident_bytes()
    records = _records(chunks)
    before = _resident_bytes()
    index = Index(lambda tier: family.policy(), lambda replica: None, [TierId.DISK])
    start_s = time.perf_counter()
    assert not rebuild(index, {_SPACE.digest: _SPACE}, records)
    restart_s = time.perf_counter() - start_s
    resident = _resident_bytes()
    gc.freeze()
    return {
        "restart_s": restart_s,
        "index_bytes_per_chunk": (resident - before) / chunks,
        "with_record_bytes_per_chunk": (resident - empty) / chunks,
        "lookup_us": _lookup_us(index, records),
    }


def _records(chunks: int) -> list[Record]:
    """Prompts of 128 chunks, one after the other."""
    random = np.random.default_rng(1).bytes(_KEY_BYTES * chunks)
    records: list[Record] = []
    nbytes = _SPACE.layout.nbytes
    parent = root = ChunkKey(_SPACE.digest)
    created_s = 0.0
    for number in range(chunks):
        if number % _PROMPT_CHUNKS == 0:
            parent, created_s = root, float(number)
        key = ChunkKey(random[_KEY_BYTES * number : _KEY_BYTES * (number + 1)])
        records.append(Record(number, key, parent, root, nbytes, created_s))
        parent = key
    return records


def _lookup_us(index: Index, records: list[Record]) -> float:
    """The median, with keys that are new objects, as from a wire."""
    branch = index.branch(_SPACE)
    now_s = float(len(records))
    took_s = []
    for first in _some_prompts(len(records)):
        prompt = records[first : first + _PROMPT_CHUNKS]
        keys = [ChunkKey(bytes(bytearray(record.key))) for record in prompt]
        start_s = time.perf_counter()
        run = index.match(branch, keys)
        index.ask(branch, run, keys[len(run) :], now_s)
        took_s.append(time.perf_counter() - start_s)
        assert len(run) == len(keys), "not all was found"
    return 1e6 * median(took_s)


def _some_prompts(chunks: int) -> Iterator[int]:
    chosen = np.random.default_rng(2).integers(0, chunks // _PROMPT_CHUNKS, _LOOKUPS)
    for prompt in chosen.tolist():
        yield prompt * _PROMPT_CHUNKS


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _empty_rpc_us() -> float:
    """The median of empty calls to a service on this machine."""
    took_s = []
    settings = {"cpu.capacity": str(64 << 20), "disk.directory": ""}
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder,
        sidecar(Path(folder), settings) as service,
        empty_call(service.target) as call,
    ):
        for _ in range(_CALLS):
            start_s = time.perf_counter()
            call()
            took_s.append(time.perf_counter() - start_s)
    return 1e6 * median(took_s)
