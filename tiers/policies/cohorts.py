"""How many chunks of each class wait to be asked for again, by age, without a walk over them.

Chunks of one class that were touched at about the same time form a cohort: those from one time to
the next cohort's. Cohorts that have come into the same bin of age are merged, so there are never
many, and when chunks were touched is all it takes to find where they are counted.
"""

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

from kvtier.tiers.policies.classes import BINS, age_bin

# Cohorts of one class before they are merged, where nobody asks for ages meanwhile.
_MOST_APART = 1024


class Line:
    """The cohorts of one class, the oldest first: from when on they are, how many chunks wait, and
    the seconds from then to when these were touched, all together."""

    __slots__ = ("_after_s", "_counts", "_latest_s", "_starts_s")

    def __init__(self, since_s: float) -> None:
        self._starts_s = [since_s]
        self._counts = [0]
        self._after_s = [0.0]
        self._latest_s = since_s

    def count(self, since_s: float, change: int) -> None:
        if since_s > self._latest_s:
            self._latest_s = since_s
            if len(self._starts_s) == _MOST_APART:
                self.by_age(since_s)
            self._open(since_s, 0, 0.0)
        place = self.place(since_s)
        self._counts[place] += change
        self._after_s[place] += (since_s - self._starts_s[place]) * change

    def place(self, since_s: float) -> int:
        """Which cohort chunks are in that were touched then."""
        return max(bisect_right(self._starts_s, since_s) - 1, 0)  # a clock may have gone back

    def by_age(self, now_s: float) -> npt.NDArray[np.float64]:
        """How many chunks wait: float64 [BINS]. Merges cohorts."""
        waiting = np.zeros(BINS)
        cohorts = list(zip(self._starts_s, self._counts, self._after_s, strict=True))
        self._starts_s, self._counts, self._after_s = [], [], []
        last = -1
        for start_s, count, after_s in cohorts:
            since_s = start_s + after_s / count if count else start_s
            age = age_bin(max(now_s - since_s, 0.0))
            waiting[age] += count
            if age == last:
                self._counts[-1] += count
                self._after_s[-1] += after_s + (start_s - self._starts_s[-1]) * count
            else:
                self._open(start_s, count, after_s)
            last = age
        return waiting

    def _open(self, start_s: float, count: int, after_s: float) -> None:
        self._starts_s.append(start_s)
        self._counts.append(count)
        self._after_s.append(after_s)


class Cohorts:
    """The cohorts of all classes."""

    def __init__(self) -> None:
        self._lines: dict[int, Line] = {}

    def count(self, kind: int, since_s: float, change: int) -> None:
        """So many chunks of a class more, or less, wait that were touched then."""
        line = self._lines.get(kind)
        if line is None:
            line = self._lines[kind] = Line(since_s)
        line.count(since_s, change)

    def by_age(self, classes: int, now_s: float) -> npt.NDArray[np.float64]:
        """How many chunks wait: float64 [classes, BINS]. Merges cohorts."""
        waiting = np.zeros((classes, BINS))
        for kind, line in self._lines.items():
            waiting[kind] = line.by_age(now_s)
        return waiting
