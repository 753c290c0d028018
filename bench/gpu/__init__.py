"""A GPU: copies, kernels, hits and a decode loop, each against the bare copy of the same bytes.

With `--device host` everything runs at a small size on the simulated device: a dry run, whose
figures say nothing about speed.
"""

import argparse
from pathlib import Path

RESULTS = Path("bench/results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="cuda:0",
        metavar="NAME",
        help='"cuda:N"; "host" is a dry run without a GPU (default: cuda:0)',
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"where the result file goes (default: {RESULTS}, of a dry run none)",
    )


def run(options: argparse.Namespace) -> int:
    """Measure, and write the report to stdout and to a file; 1 when a measurement failed.

    Raises InvalidRequest for a name that is no device's, DeviceError when it cannot be used.
    """
    from kvtier.bench.gpu.command import measure  # noqa: PLC0415 - only who runs it needs it

    folder = options.out or (None if options.device == "host" else RESULTS)
    return measure(options.device, folder, as_json=options.json)
