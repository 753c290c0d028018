"""How many chunks of each class wait to be asked for again, by age, without a walk over them.

Chunks of one class that were touched at about the same time form a cohort. Cohorts that have come
into the same bin of age are merged, so there are never many.
"""

import numpy as np
import numpy.typing as npt

from kvtier.tiers.policies.classes import BINS, age_bin

_SPAN_S = 16.0  # of the times in a cohort, before any is merged


class Cohort:
    """Chunks counted together. `since_s` is the mean of when they were touched."""

    __slots__ = ("count", "into", "requests", "since_s")

    def __init__(self, since_s: float) -> None:
        self.since_s = since_s
        self.requests = 0
        self.count = 0
        self.into: Cohort | None = None  # what it was merged into

    def request(self, now_s: float) -> None:
        """Chunks of one more request are about to be counted here."""
        self.requests += 1
        self.since_s += (now_s - self.since_s) / self.requests

    def current(self) -> "Cohort":
        """Where its chunks are counted now."""
        cohort = self
        while cohort.into is not None:
            cohort = cohort.into
        return cohort

    def merge(self, younger: "Cohort") -> None:
        both = self.count + younger.count
        if both:
            self.since_s += (younger.since_s - self.since_s) * younger.count / both
        self.count = both
        younger.into = self


class Cohorts:
    """The cohorts of each class, the oldest first; chunks come to the last one."""

    def __init__(self) -> None:
        self._open: dict[int, Cohort] = {}
        self._cohorts: dict[int, list[Cohort]] = {}

    def open(self, kind: int, now_s: float) -> Cohort:
        """The cohort for chunks of a class touched now, until the next `by_age`."""
        cohort = self._open.get(kind)
        if cohort is None or now_s - cohort.since_s > _SPAN_S:
            cohort = self._open[kind] = Cohort(now_s)
            self._cohorts.setdefault(kind, []).append(cohort)
        cohort.request(now_s)
        return cohort

    def by_age(self, classes: int, now_s: float) -> npt.NDArray[np.float64]:
        """How many chunks wait: float64 [classes, BINS]. Closes and merges cohorts."""
        self._open.clear()
        waiting = np.zeros((classes, BINS))
        for kind, cohorts in self._cohorts.items():
            kept: list[Cohort] = []
            for cohort in cohorts:
                age = age_bin(max(now_s - cohort.since_s, 0.0))
                waiting[kind, age] += cohort.count
                if kept and age == age_bin(max(now_s - kept[-1].since_s, 0.0)):
                    kept[-1].merge(cohort)
                else:
                    kept.append(cohort)
            self._cohorts[kind] = kept
        return waiting
