"""offload and load, against a plain copy (shm) or a bare gRPC stream (inline) of the same bytes.

Subject and reference take turns in one run; each ratio is of neighbours, the median counts.
Every load is compared with what was stored, outside of the timed part.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from kvtier.bench.payload import (
    MIB,
    TOKENS,
    Buffer,
    blank,
    check_same,
    filled,
    renew,
    space_for,
    token_ids,
)
from kvtier.bench.plain_grpc import byte_stream
from kvtier.bench.report import Progress, Report, Target
from kvtier.bench.sidecar import SidecarFailed, sidecar
from kvtier.bench.timing import ratio, seconds
from kvtier.chunks import Prefix
from kvtier.client import Client, connect
from kvtier.transfer.paths.inline import MESSAGE_BYTES

_DEADLINE_S = 120.0
_SMALL_CHUNK_BYTES = 16 * MIB
_LEAST_ROUNDS, _MOST_ROUNDS = 9, 60
_MEASURED_BYTES = 4096 * MIB
_ROOM = 2.2  # of the batch: a session may reserve half of the arena


@dataclass(frozen=True, slots=True)
class Reference:
    """The plain way to move the same bytes, in each direction."""

    what: str
    send: Callable[[], object]
    receive: Callable[[], object]


@dataclass(slots=True)
class Rounds:
    """Seconds of each round."""

    offload: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    received: list[float] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", choices=("shm", "inline"), default="shm")
    parser.add_argument("--chunk-mib", type=float, default=32.0, metavar="MIB")
    parser.add_argument("--batch", type=int, default=16, metavar="CHUNKS")
    parser.add_argument("--rounds", type=int, help="by default more where chunks are small")


def run(options: argparse.Namespace) -> int:
    """Measure, and write the report to stdout."""
    space = space_for(options.chunk_mib)
    nbytes = space.layout.nbytes
    room = round(_ROOM * options.batch * (nbytes + 4096)) + 64 * MIB
    settings = {"cpu.capacity": str(room), "disk.directory": ""}
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder,
        sidecar(Path(folder), settings) as service,
        connect(service.target, space, deadline_s=_DEADLINE_S, path=options.path) as client,
    ):
        if not client.wait_ready(_DEADLINE_S):
            raise SidecarFailed("the client could not connect")
        trial = Trial(client, options.batch, nbytes)
        count = options.rounds or _rounds_for(options.batch * nbytes)
        with _reference(options.path, trial) as reference:
            rounds = trial.run(reference, count)
    _report(options, nbytes, rounds, reference.what).emit(options)
    return 0


class Trial:
    """One client with chunks to store, and buffers to load them into."""

    def __init__(self, client: Client, batch: int, nbytes: int) -> None:
        self.sources = filled(batch, nbytes, seed=1)
        self.targets = blank(batch, nbytes)
        self._client = client

    def run(self, reference: Reference, rounds: int) -> Rounds:
        """Reference and subject in turn, after one round that does not count."""
        progress = Progress()
        measured = Rounds()
        for number in range(rounds + 1):
            progress("measuring round", number, rounds + 1)
            self._round(reference, number, measured if number else Rounds())
        progress("measuring round", rounds + 1, rounds + 1)
        return measured

    def _round(self, reference: Reference, number: int, rounds: Rounds) -> None:
        prefix = self._client.prefix(token_ids(len(self.sources) * TOKENS, seed=number))
        renew(self.sources)
        rounds.sent.append(seconds(reference.send))
        rounds.offload.append(seconds(lambda: self._offload(prefix)))
        for target in self.targets:
            target.fill(0xAA)
        rounds.received.append(seconds(reference.receive))
        for target in self.targets:
            target.fill(0x55)
        rounds.load.append(seconds(lambda: self._load(prefix)))
        check_same(self.targets, self.sources)
        if self._client.evict(prefix) != len(prefix):
            raise SidecarFailed("the chunks of a round could not be evicted")

    def _offload(self, prefix: Prefix) -> None:
        with self._client.offload(prefix) as offload:
            for slot in offload:
                slot.write(self.sources[slot.index].data)
        if len(offload.outcome.stored) != len(prefix):
            raise SidecarFailed(f"not all was stored: {offload.outcome.refused}")

    def _load(self, prefix: Prefix) -> None:
        count = 0
        with self._client.load(prefix) as loaded:
            for chunk in loaded:
                chunk.read_into(self.targets[chunk.index].data)
                count += 1
        if count != len(prefix):
            raise SidecarFailed(f"{count} of {len(prefix)} chunks were loaded")


@contextmanager
def _reference(path: str, trial: Trial) -> Iterator[Reference]:
    if path == "shm":

        def plain() -> None:
            copy_all(trial.targets, trial.sources)

        yield Reference("copy between populated buffers", plain, plain)
        return
    with byte_stream(MESSAGE_BYTES, trial.sources[0].nbytes) as stream:
        yield Reference(
            f"bare gRPC stream of {MESSAGE_BYTES} byte messages, from buffer to buffer",
            lambda: stream.send(trial.sources),
            lambda: stream.receive(trial.targets),
        )


def copy_all(targets: list[Buffer], sources: list[Buffer]) -> None:
    """The plain copy: one memcpy for each chunk, by the calling thread."""
    for target, source in zip(targets, sources, strict=True):
        np.copyto(target, source)


def _rounds_for(batch_bytes: int) -> int:
    """Enough for a median that a busy moment does not move."""
    return min(_MOST_ROUNDS, max(_LEAST_ROUNDS, _MEASURED_BYTES // batch_bytes))


def _report(options: argparse.Namespace, nbytes: int, rounds: Rounds, what: str) -> Report:
    total_gb = options.batch * nbytes / 1e9
    small = options.path == "shm" and nbytes < _SMALL_CHUNK_BYTES
    target = Target(0.8 if small else 0.9)
    return Report(
        scenario="transfer",
        figures={
            "offload_ratio": ratio(rounds.sent, rounds.offload),
            "load_ratio": ratio(rounds.received, rounds.load),
            "offload_ratio_of_best": min(rounds.sent) / min(rounds.offload),
            "load_ratio_of_best": min(rounds.received) / min(rounds.load),
            "offload_gb_s": total_gb / median(rounds.offload),
            "load_gb_s": total_gb / median(rounds.load),
            "reference_offload_gb_s": total_gb / median(rounds.sent),
            "reference_load_gb_s": total_gb / median(rounds.received),
        },
        setup={
            "path": options.path,
            "chunk_bytes": nbytes,
            "batch": options.batch,
            "rounds": len(rounds.load),
            "reference": what,
        },
        targets={"offload_ratio": target, "load_ratio": target},
    )
