"""What is learned of when chunks are asked for again, and what a chunk is worth by that.

For each class of chunks, counts by age: how many were asked for again at that age, how many were
forgotten without, how many are waiting. They give the hazard of being asked for, by age; where a
class has seen little it is that of all new, or of all seen, chunks. A chunk's worth is a Gittins
index: the best ratio, over all horizons, of the chance to be asked for before the horizon to the
time spent in memory until then. A method of survival analysis (Kaplan and Meier, 1958) and one of
scheduling (Gittins, 1979); that they suit prefix caches is a result on traces of real requests,
repeated by `kvtier bench trace`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.tiers.policies.classes import BINS, Classes, age_bin, age_edges
from kvtier.tiers.policies.cohorts import Cohort, Cohorts
from kvtier.tiers.policies.tables import decode, encode

Table = npt.NDArray[np.float64]  # [classes, BINS]

LABELS = 8  # more would leave too little to learn from for each
_PRIOR = 500.0  # chunks that the pooled hazard counts for, against a class's own
_POOLED_PRIOR = 200.0  # and that of all chunks, against the pooled one
_MEMORY = 0.98  # of the counts, over so many requests:
_PERIOD = 256
_FIRST_FIT = 8  # requests; then whenever there are a part more, up to the period:
_GROWTH = 32


class HazardLearner:
    """The tables of one tier, for all its policies.

    Rows are classes, in one block for each label that was met.
    """

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self._reused = np.zeros((classes.count, BINS))
        self._forgotten = np.zeros((classes.count, BINS))
        self._cohorts = Cohorts()
        self._requests = 0
        self._since_fit = 0
        self._now_s = 0.0
        self.worth: list[list[float]] = [[0.0] * BINS] * classes.count  # by class and age
        self.reach: list[list[float]] = self.worth  # the chance to be asked for again, likewise

    # ── what policies tell ────────────────────────────────────────────────────────────────────────

    def request(self, now_s: float) -> None:
        """There was one."""
        self._since_fit += 1
        self._now_s = max(self._now_s, now_s)

    def labelled(self, kind: int, label: int) -> int:
        """The class for chunks of a class that an engine has labelled: 0 for none."""
        if not 0 < label < LABELS:
            return kind
        kind += label * self.classes.count
        if kind >= len(self.worth):
            self._grow(label)
        return kind

    def cohort(self, kind: int, now_s: float) -> Cohort:
        """Where chunks of a class that are asked for now are counted, while they wait."""
        return self._cohorts.open(kind, now_s)

    def reused(self, kind: int, age_s: float, chunks: int) -> None:
        """Chunks were asked for again."""
        self._reused[kind, age_bin(age_s)] += chunks

    def forgotten(self, kind: int, age_s: float, chunks: int) -> None:
        """Ghosts were given up."""
        self._forgotten[kind, age_bin(age_s)] += chunks

    # ── what is made of it ────────────────────────────────────────────────────────────────────────

    @property
    def due(self) -> bool:
        step = min(max(self._requests // _GROWTH, _FIRST_FIT), _PERIOD)
        return self._since_fit >= step

    def learn(self) -> None:
        waiting = self._cohorts.by_age(len(self.worth), self._now_s)
        hazard = self._hazard(waiting)
        self.worth = _gittins(hazard).tolist()
        self.reach = (1 - np.cumprod(1 - hazard[:, ::-1], axis=1)[:, ::-1]).tolist()
        fade = _MEMORY ** (self._since_fit / _PERIOD)
        self._reused *= fade
        self._forgotten *= fade
        self._requests += self._since_fit
        self._since_fit = 0

    def _hazard(self, waiting: Table) -> Table:
        """The chance, for each class and bin, to be asked for within the bin when not before."""
        count = self._reused + self._forgotten + waiting
        risk = np.cumsum(count[:, ::-1], axis=1)[:, ::-1] - waiting / 2
        seen = np.arange(len(count)) % self.classes.count >= self.classes.seen_from
        overall = self._reused.sum(0) / (risk.sum(0) + _POOLED_PRIOR)
        pooled = np.empty_like(count)
        for members in (seen, ~seen):
            reused = self._reused[members].sum(0) + _POOLED_PRIOR * overall
            pooled[members] = reused / (risk[members].sum(0) + _POOLED_PRIOR)
        return np.minimum((self._reused + _PRIOR * pooled) / (risk + _PRIOR), 1.0)

    def _grow(self, label: int) -> None:
        more = (label + 1) * self.classes.count - len(self.worth)
        self._reused, self._forgotten = (
            np.concatenate([table, np.zeros((more, BINS))])
            for table in (self._reused, self._forgotten)
        )
        base = slice(0, self.classes.count)
        blocks = more // self.classes.count
        self.worth = self.worth + self.worth[base] * blocks  # until the next fit
        self.reach = self.reach + self.reach[base] * blocks

    # ── over a restart ────────────────────────────────────────────────────────────────────────────

    def dump(self) -> bytes:
        """What waits now will not be seen to come back: it counts as forgotten at its age."""
        waiting = self._cohorts.by_age(len(self.worth), self._now_s)
        return encode([self._reused, self._forgotten + waiting], self.classes.count)

    def restore(self, encoded: bytes) -> bool:
        tables = decode(encoded, 2, self.classes.count, LABELS)
        if tables is None:
            return False
        if len(tables[0]) > len(self.worth):
            self._grow(len(tables[0]) // self.classes.count - 1)
        for mine, table in zip((self._reused, self._forgotten), tables, strict=True):
            mine[: len(table)] += table
        self.learn()
        return True


def _gittins(hazard: Table) -> Table:
    """For each class and age bin, the best ratio over all horizons of P(reuse) to expected time."""
    widths = np.diff(age_edges())
    worth: Table = np.empty_like(hazard)
    for first in range(BINS):
        ahead = hazard[:, first:]
        alive: Any = np.ones_like(ahead)  # the chance to reach each bin without reuse
        np.cumprod(1 - ahead[:, :-1], axis=1, out=alive[:, 1:])
        chance = np.cumsum(alive * ahead, axis=1)
        time_s = np.cumsum(alive * widths[first:] * (1 - ahead / 2), axis=1)
        worth[:, first] = (chance / time_s).max(axis=1)
    return worth
