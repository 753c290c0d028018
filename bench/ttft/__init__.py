"""First tokens of transformers: recomputed, and reloaded from VRAM, RAM and disk.

A random model of the shape of Llama-3.1-8B on a GPU; with `--device host` a tiny one on the CPU,
beside the simulated device, which says nothing about speed. Every phase is a process of its own.
"""

import argparse
import re
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=_device,
        default="cuda:0",
        metavar="NAME",
        help='"cuda:N"; "host" or "cpu" is a dry run without a GPU (default: cuda:0)',
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where results go (default: bench/results, for a dry run out)",
    )


def run(options: argparse.Namespace) -> int:
    """Measure, and write the report to stdout and to files.

    Returns 1 when something is not as it should be. Raises KvtierError when a step could not be
    done.
    """
    from kvtier.bench.ttft.command import measure  # noqa: PLC0415 - only who runs it needs it

    default = Path("out" if options.device == "host" else "bench/results")
    return measure(options.device, (options.out or default).absolute(), as_json=options.json)


def _device(text: str) -> str:
    name = "host" if text == "cpu" else text
    if not re.fullmatch(r"host|cuda:[0-9]{1,3}", name):
        raise argparse.ArgumentTypeError(f'{text!r} given; name a GPU such as "cuda:0", or "host"')
    return name
