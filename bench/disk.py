"""loads from disk against plain file reads, and how fast 100,000 chunks come back.

The chunks that are loaded are like keys and values: bfloat16 gaussians with a scale per channel.
Their exponents compress and their mantissas do not: zeros or random bytes would give other figures.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from kvtier.bench import disk_restart
from kvtier.bench.disk_load import LoadTrial
from kvtier.bench.payload import space_for
from kvtier.bench.report import Progress, Report, Target
from kvtier.config import load

_COMPRESSIONS = ("byteplane", "none")
_TARGETS = {
    "load_warm_ratio": Target(0.7),
    "load_cold_ratio": Target(0.7),
    "restart_s": Target(2.0, at_most=True),
    "resident_mib_100k": Target(150.0, at_most=True),
    "start_s": Target(1.0, at_most=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chunk-mib", type=float, default=32.0, metavar="MIB")
    parser.add_argument("--batch", type=int, default=16, metavar="CHUNKS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=100_000, help="for the restart")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="where to put temporary files: on the disk in question",
    )


def run(options: argparse.Namespace) -> int:
    """Measure, and write the report to stdout."""
    progress = Progress()
    space = space_for(options.chunk_mib)
    by_compression: dict[str, dict[str, Any]] = {}
    for compression in _COMPRESSIONS:
        with _folder(options) as folder:
            trial = LoadTrial(Path(folder), space, options.batch, compression)
            by_compression[compression] = trial.run(options.rounds, progress).figures()
    with _folder(options) as folder:
        restart = disk_restart.measure(Path(folder), options.chunks, progress)
    default = load(None, {}, []).disk.compression
    figures = {
        "load_warm_ratio": by_compression[default]["load_warm_ratio"],
        "load_cold_ratio": by_compression[default]["load_cold_ratio"],
        **restart,
        "by_compression": by_compression,
    }
    setup = {
        "compression": default,
        "chunk_bytes": space.layout.nbytes,
        "batch": options.batch,
        "rounds": options.rounds,
        "data": "bfloat16 gaussians with a scale per channel",
        "restart_chunks": options.chunks,
    }
    Report("disk", figures, setup, _TARGETS).emit(options)
    return 0


def _folder(options: argparse.Namespace) -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="kvtier-bench-", dir=options.directory)
