"""The command line: `kvtier serve | stats | demo | vllm | bench`."""

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kvtier.client import ServiceStats, fetch_curves, fetch_stats
from kvtier.config import Config, format_bytes, load
from kvtier.errors import KvtierError
from kvtier.sections import default_listen
from kvtier.sizing import plot, readable
from kvtier.version import __version__

_PROGRESS_EVERY_S = 0.1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Mistakes of its user are one line on stderr."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser(words).parse_args(words)
    try:
        status: int = options.run(options)
    except KvtierError as error:
        sys.stderr.write(f"kvtier: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvtier", description="A tiered cache for prefix KV.")
    parser.add_argument("--version", action="version", version=f"kvtier {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the sidecar")
    serve.add_argument("--config", type=Path, metavar="FILE", help="TOML file")
    serve.add_argument("--listen", metavar="ADDRESS", help="same as --set server.listen=ADDRESS")
    serve.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="one setting; above the environment (KVTIER_SECTION_FIELD) and the file",
    )
    serve.add_argument("--print-config", action="store_true", help="print every setting and exit")
    serve.set_defaults(run=_serve)

    stats = commands.add_parser("stats", help="what a running sidecar holds and has done")
    stats.add_argument("--target", default=default_listen(os.environ), metavar="ADDRESS")
    stats.add_argument("--json", action="store_true")
    stats.add_argument("--curve", action="store_true", help="what other capacities would hit")
    stats.add_argument(
        "--plot", type=Path, metavar="FILE", help="with --curve: draw it (.png, .svg or .pdf)"
    )
    stats.set_defaults(run=_stats)

    demo = commands.add_parser("demo", help="a real small model gets its prefix back")
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="DIR")
    demo.add_argument("--json", action="store_true")
    demo.set_defaults(run=_demo)

    vllm = commands.add_parser("vllm", help="a real vLLM server gets its prefixes back")
    vllm.add_argument("--out", type=Path, default=Path("out"), metavar="DIR")
    vllm.add_argument("--json", action="store_true")
    vllm.add_argument(
        "--engine-python",
        type=Path,
        default=Path(".venv-vllm/bin/python"),
        metavar="FILE",
        help="the interpreter that has vLLM and kvtier (default: what `make vllm-env` makes)",
    )
    vllm.set_defaults(run=_vllm)

    bench = commands.add_parser("bench", help="measure this machine")
    if words[:1] == ["bench"]:  # they need packages that `stats` in a small image does not have
        _add_benches(bench.add_subparsers(required=True, metavar="SCENARIO"))
    return parser


def _add_benches(scenarios: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from kvtier.bench import disk, gpu, index, lookup, trace, transfer, ttft  # noqa: PLC0415

    for scenario in (transfer, lookup, disk, gpu, ttft, trace, index):
        name = scenario.__name__.rpartition(".")[2]
        parser = scenarios.add_parser(name, help=(scenario.__doc__ or "").splitlines()[0])
        scenario.add_arguments(parser)
        parser.add_argument("--json", action="store_true")
        parser.set_defaults(run=scenario.run)


def _serve(options: argparse.Namespace) -> int:
    overrides = [*options.set]
    if options.listen is not None:
        overrides.append(f"server.listen={options.listen}")
    config = load(options.config, os.environ, overrides)
    if options.print_config:
        sys.stdout.write(config.to_toml())
        return 0
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    from kvtier.service.server import serve  # noqa: PLC0415 - so that `stats` starts fast

    flushed = asyncio.run(serve(config, Progress(), lambda: _announce(config)))
    return 0 if flushed else 1


class Progress:
    """A line on stderr that says how far long work is; silent where nobody looks."""

    def __init__(self) -> None:
        self._shown_s = 0.0
        self._live = sys.stderr.isatty()

    def __call__(self, what: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if not self._live or (done < total and now_s - self._shown_s < _PROGRESS_EVERY_S):
            return
        self._shown_s = now_s
        end = "\n" if done >= total else ""
        sys.stderr.write(f"\rpreparing {what}: {format_bytes(done)} of {format_bytes(total)}{end}")
        sys.stderr.flush()


def _announce(config: Config) -> None:
    disk = "no disk tier"
    if config.disk.directory is not None:
        disk = f"{format_bytes(config.disk.capacity)} of disk in {config.disk.directory}"
    sys.stderr.write(
        f"kvtier {__version__}: serving on {config.server.listen} with "
        f"{format_bytes(config.cpu.capacity)} of RAM and {disk}\n"
    )


def _stats(options: argparse.Namespace) -> int:
    if options.curve or options.plot is not None:
        return _curves(options)
    stats = fetch_stats(options.target)
    if options.json:
        sys.stdout.write(json.dumps(asdict(stats), indent=2) + "\n")
    else:
        sys.stdout.write(_readable(stats))
    return 0


def _curves(options: argparse.Namespace) -> int:
    curves = fetch_curves(options.target)
    if options.plot is not None:
        plot(curves, options.plot)
    if options.json:
        sys.stdout.write(json.dumps([asdict(curve) for curve in curves], indent=2) + "\n")
    else:
        sys.stdout.write(readable(curves))
    return 0


def _readable(stats: ServiceStats) -> str:
    lines = [
        f"kvtier {stats.version}, up {stats.uptime_s:.0f} s: {stats.sessions} sessions, "
        f"{stats.leases} leases, {stats.spaces} spaces"
    ]
    for tier in stats.tiers:
        share = 100 * tier.used_bytes / tier.capacity_bytes if tier.capacity_bytes else 0.0
        lines.append(
            f"  {tier.name:5} {format_bytes(tier.used_bytes):>10} of "
            f"{format_bytes(tier.capacity_bytes):>10} ({share:.0f} %), {tier.chunks} chunks"
        )
    width = max(map(len, stats.counters), default=0)
    lines += [f"  {name:{width}} {value}" for name, value in sorted(stats.counters.items())]
    return "\n".join(lines) + "\n"


def _demo(options: argparse.Namespace) -> int:
    from kvtier.bench.demo import demo  # noqa: PLC0415 - needs the `demo` extra

    return demo.run(options.out, options.json)


def _vllm(options: argparse.Namespace) -> int:
    from kvtier.bench.vllm.run import run  # noqa: PLC0415 - needs the `demo` extra

    return run(options.out, options.json, options.engine_python)
