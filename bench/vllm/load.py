"""What else a machine does while something is measured on it."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_IDLE = (3, 4)  # of the fields of /proc/stat: idle, and waiting for a disk
_STEAL = 7  # later fields are counted in earlier ones


def machine_s(stat: str) -> float:
    """Processor time that a machine has spent on anything, stolen time included, from the text of
    its /proc/stat."""
    ticks = [int(word) for word in stat.splitlines()[0].split()[1:]]
    used = sum(each for place, each in enumerate(ticks[: _STEAL + 1]) if place not in _IDLE)
    return used / _TICKS_PER_S


def process_s(pids: Iterable[int]) -> float:
    """Processor time that running processes have spent; those that have ended count nothing."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])  # in user mode and in the kernel
    return ticks / _TICKS_PER_S


class Load:
    """How much of the machine others used, from its making on; `own_s` is what we have used."""

    def __init__(self, own_s: float) -> None:
        self._started_s = time.monotonic()
        self._machine_s = _machine_s()
        self._own_s = own_s

    def others(self, own_s: float) -> float:
        """The share of all processors that others used: 0 is none, 1 is all."""
        elapsed_s = (time.monotonic() - self._started_s) * (os.cpu_count() or 1)
        used_s = _machine_s() - self._machine_s - (own_s - self._own_s)
        return min(1.0, max(0.0, used_s / elapsed_s)) if elapsed_s else 0.0


def _machine_s() -> float:
    return machine_s(Path("/proc/stat").read_text(encoding="ascii"))
