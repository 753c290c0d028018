"""What a benchmark says: a table for people or JSON, and a progress line while they wait."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kvtier.version import __version__

_PACKAGES = ("grpcio", "lmdb", "numpy", "protobuf", "xxhash", "zstandard")
_PROGRESS_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Target:
    """A budget of the design: a figure is to be at least, or at most, this."""

    value: float
    at_most: bool = False

    def met(self, figure: float) -> bool:
        return figure <= self.value if self.at_most else figure >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.value:g}"


@dataclass(slots=True)
class Report:
    """The figures of one run, by name in the order of their importance, and what they rest on."""

    scenario: str
    figures: dict[str, Any]
    setup: dict[str, Any]
    targets: Mapping[str, Target] = field(default_factory=dict)

    def emit(self, options: argparse.Namespace) -> None:
        """Write it to stdout, as `--json` asks."""
        sys.stdout.write(self.as_json() if options.json else self.as_table())

    def as_json(self) -> str:
        """One document: the figures at its top, everything else under a name of its own."""
        document = {
            "scenario": self.scenario,
            **self.figures,
            "targets": {name: str(target) for name, target in self.targets.items()},
            "missed": self.missed,
            "setup": self.setup,
            "machine": _machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return json.dumps(document, indent=2) + "\n"

    @property
    def missed(self) -> list[str]:
        """The figures that are not what their target asks; those that are not there are not."""
        found = ((name, self.figures.get(name), target) for name, target in self.targets.items())
        return [
            name
            for name, figure, target in found
            if isinstance(figure, int | float) and not target.met(figure)
        ]

    def as_table(self) -> str:
        rows = [
            (name, _readable(value), self._verdict(name)) for name, value in _flat(self.figures)
        ]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"kvtier bench {self.scenario}"]
        lines += [
            f"  {name:{width}}  {value:>10}  {verdict}".rstrip() for name, value, verdict in rows
        ]
        setup = ", ".join(f"{name} {_readable(value)}" for name, value in _flat(self.setup))
        return "\n".join([*lines, f"  ({setup})"]) + "\n"

    def _verdict(self, name: str) -> str:
        target = self.targets.get(name)
        if target is None or not isinstance(self.figures.get(name), int | float):
            return ""
        return f"{'MISSED' if name in self.missed else 'met'}: {target}"


class Progress:
    """A line on stderr that says how far long work is; silent where nobody looks."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown_s = 0.0
        self._width = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show the work, `done` of `total`; clears the line once all is done."""
        now_s = time.monotonic()
        if not self._live or (done < total and now_s - self._shown_s < _PROGRESS_EVERY_S):
            return
        self._shown_s = now_s
        line = f"{what}: {done} of {total}" if done < total else ""
        sys.stderr.write(f"\r{line:{self._width}}\r{line}")
        sys.stderr.flush()
        self._width = len(line)


def _machine() -> dict[str, Any]:
    """What a figure depends on, and nothing that names the machine."""
    versions = {"kvtier": __version__, "python": platform.python_version()}
    versions["linux"] = platform.release()
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "versions": versions,
    }


def _flat(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value))
    return rows


def _readable(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
