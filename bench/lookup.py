"""look up a prompt, hashing included, against an empty RPC to the same service.

Both take turns in one run. How many lookups the service answers in a second is counted from one
client process and from four.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from kvtier.bench.payload import TOKENS, token_ids
from kvtier.bench.report import Progress, Report, Target
from kvtier.bench.sidecar import SidecarFailed, sidecar
from kvtier.client import Client, connect
from kvtier.client.transport import grpc_target
from kvtier.spaces import Layout, Space

# A lookup moves no bytes, so a chunk of 256 tokens may as well have 512.
_SPACE = Space("kvtier-bench", Layout(dtype="int8", layers=1, heads=1, head_dim=1, tokens=TOKENS))
_CLIENTS = (1, 4)
_DEADLINE_S = 10.0
_READY_S = 60.0
_WARM_UP = 50
_PAUSE_S = 0.005
_SLOT_BYTES = 4096
_TARGETS = {"ratio": Target(2.0, at_most=True)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=32_768, metavar="COUNT")
    parser.add_argument("--calls", type=int, default=500, metavar="COUNT")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each count per second")


def run(options: argparse.Namespace) -> int:
    """Measure, and write the report to stdout."""
    chunks = options.tokens // TOKENS
    settings = {
        "cpu.capacity": str((64 << 20) + 4 * _SLOT_BYTES * chunks),
        "disk.directory": "",
    }
    tokens = token_ids(options.tokens, seed=1)
    progress = Progress()
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder,
        sidecar(Path(folder), settings) as service,
    ):
        with connect(service.target, _SPACE, deadline_s=_DEADLINE_S) as client:
            _store(client, tokens)
            figures = _latency(client, service.target, tokens, options.calls)
            paused = _latency(client, service.target, tokens, options.calls // 5, _PAUSE_S)
        rates = {}
        for number, clients in enumerate(_CLIENTS):
            progress("counting lookups", number, len(_CLIENTS))
            rates[str(clients)] = _rate(service.target, tokens, clients, options.seconds)
        progress("counting lookups", len(_CLIENTS), len(_CLIENTS))
    figures |= {"lookups_per_s": rates, "after_5_ms_pause": paused}
    setup = {"tokens": options.tokens, "chunks": chunks, "calls": options.calls}
    Report("lookup", figures, setup, _TARGETS).emit(options)
    return 0


def _store(client: Client, tokens: list[int]) -> None:
    if not client.wait_ready(_READY_S):
        raise SidecarFailed("the client could not connect")
    prefix = client.prefix(tokens)
    with client.offload(prefix) as offload:
        for slot in offload:
            slot.data[:] = bytes(len(slot.data))
    if client.lookup(prefix) != len(prefix):
        raise SidecarFailed(f"not all was stored: {offload.outcome.refused}")


def _latency(
    client: Client, target: str, tokens: list[int], calls: int, pause_s: float = 0.0
) -> dict[str, Any]:
    """Medians over calls that take turns, in milliseconds.

    `pause_s` before each lets the machine go to sleep, as it does between an engine's requests.
    """
    hashing, lookups, empty = [], [], []
    chunks = len(client.prefix(tokens))
    with empty_call(target) as call:
        for _ in range(_WARM_UP + calls):
            time.sleep(pause_s)
            start = time.perf_counter()
            prefix = client.prefix(tokens)
            hashed = time.perf_counter()
            held = client.lookup(prefix)
            answered = time.perf_counter()
            time.sleep(pause_s)
            client.prefix(tokens)  # so that the service has rested as long as before the lookup
            called = time.perf_counter()
            call()
            empty.append(time.perf_counter() - called)
            lookups.append(answered - start)
            hashing.append(hashed - start)
            if held != chunks:
                raise SidecarFailed(f"{held} of {chunks} chunks were found")
    lookup_ms, unary_ms, hash_ms = (
        1000 * median(values[_WARM_UP:]) for values in (lookups, empty, hashing)
    )
    return {
        "lookup_ms_p50": lookup_ms,
        "unary_ms_p50": unary_ms,
        "ratio": lookup_ms / unary_ms,
        "hash_ms_p50": hash_ms,
    }


@contextmanager
def empty_call(target: str) -> Iterator[Any]:
    """The empty RPC: the service's own health check, over a channel like the client's."""
    with grpc.insecure_channel(grpc_target(target)) as channel:
        check: grpc.UnaryUnaryMultiCallable[Any, Any] = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        request = health_pb2.HealthCheckRequest()
        yield lambda: check(request, timeout=_DEADLINE_S)


def _rate(target: str, tokens: list[int], clients: int, seconds: float) -> float:
    """Lookups per second of so many client processes together, hashing included."""
    processes = multiprocessing.get_context("spawn")
    barrier = processes.Barrier(clients)
    counts: Any = processes.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(clients):
            process = processes.Process(
                target=_count, args=(target, tokens, seconds, barrier, counts), daemon=True
            )
            process.start()
            stack.callback(process.join)
            stack.callback(process.terminate)
        rates: list[float] = [counts.get() for _ in range(clients)]
        return sum(rates)


def _count(target: str, tokens: list[int], seconds: float, barrier: Any, counts: Any) -> None:
    """One client process: says how many lookups a second it had answered, 0 when any was not."""
    done, held_all = 0, True
    with connect(target, _SPACE, deadline_s=_DEADLINE_S) as client:
        held_all = client.wait_ready(_READY_S)
        chunks = len(client.prefix(tokens))
        barrier.wait(_READY_S)
        start = time.perf_counter()
        while (elapsed_s := time.perf_counter() - start) < seconds:
            held_all &= client.lookup(client.prefix(tokens)) == chunks
            done += 1
    counts.put(done / elapsed_s if held_all else 0.0)
