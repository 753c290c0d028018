"""What is learned of when chunks are asked for again, and what a chunk is worth by that.

For each class of chunks, counts by age: how many were asked for again at that age, how many were
forgotten without, how many are waiting. They give the hazard of being asked for, by age. Where a
class has seen little it is near that of its group, which is near that of a wider group, and in the
end that of all chunks: each counts as so many chunks more of the narrower one. A chunk's worth is a
Gittins index: the best ratio, over all horizons, of the chance to be asked for before the horizon
to the time spent in memory until then.

A method of survival analysis (Kaplan and Meier, 1958), partial pooling (Gelman and Hill, "Data
Analysis Using Regression and Multilevel/Hierarchical Models", 2006) and one of scheduling (Gittins,
1979); that they suit prefix caches is a result on traces of real requests, repeated by `kvtier
bench trace`.
"""

from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvtier.tiers.policies.classes import BINS, Classes, age_bin, age_edges
from kvtier.tiers.policies.cohorts import Cohorts
from kvtier.tiers.policies.tables import decode, encode

Table = npt.NDArray[np.float64]  # [classes, BINS]

LABELS = 8  # more would leave too little to learn from for each
# How many chunks the hazard of a wider group counts for: that of all chunks, of the next ones, ...
_PRIORS = (200.0, 500.0, 1000.0)
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
        self._groups = [np.array(group) for group in classes.groups]
        self._cohorts = Cohorts()
        self._requests = 0
        self._since_fit = 0
        self._now_s = 0.0

    # Made when there is something to count: a tier that is not there has a learner too.

    @cached_property
    def worth(self) -> list[list[float]]:
        """By class and age."""
        return [[0.0] * BINS] * self.classes.count

    @cached_property
    def reach(self) -> list[list[float]]:
        """The chance to be asked for again, likewise."""
        return [[0.0] * BINS] * self.classes.count

    @cached_property
    def _reused(self) -> Table:
        return np.zeros((len(self.worth), BINS))

    @cached_property
    def _forgotten(self) -> Table:
        return np.zeros((len(self.worth), BINS))

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

    def wait(self, kind: int, since_s: float, change: int) -> None:
        """So many chunks of a class more, or less, wait to be asked for again since then."""
        self._cohorts.count(kind, since_s, change)

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
        overall = self._reused.sum(0) / (risk.sum(0) + _PRIORS[0])
        hazard: Table = np.broadcast_to(overall, count.shape)
        for groups, prior in self._levels(len(count)):
            hazard = self._shrunk(risk, groups, hazard, prior)
        return np.minimum(hazard, 1.0)

    def _levels(self, rows: int) -> list[tuple[npt.NDArray[np.int64], float]]:
        """What each row is part of, from the widest groups to itself, and what the level before
        counts for. A label tells more than a class does, so it parts all but the widest groups."""
        labels = rows // self.classes.count
        wide = [np.tile(groups, labels) for groups in self._groups]
        levels = list(zip([*wide, np.arange(rows)], _PRIORS, strict=False))
        if labels > 1:
            label = np.repeat(np.arange(labels), self.classes.count)
            parted = [label * (groups.max() + 1) + groups for groups in wide]
            levels[1:-1] = [(parted[0], _PRIORS[1]), *zip(parted[1:], _PRIORS[1:], strict=False)]
        return levels

    def _shrunk(
        self, risk: Table, groups: npt.NDArray[np.int64], wider: Table, prior: float
    ) -> Table:
        """For each class the hazard of its group, shrunk to that of the wider one."""
        first = np.unique(groups, return_index=True)[1]
        reused, at_risk = np.zeros((2, len(first), BINS))
        np.add.at(reused, groups, self._reused)
        np.add.at(at_risk, groups, risk)
        shrunk: Table = (reused + prior * wider[first]) / (at_risk + prior)
        return shrunk[groups]

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
    by_horizon = hazard.shape[::-1]
    chance, time_s = np.zeros(by_horizon), np.zeros(by_horizon)
    for first in reversed(range(BINS)):
        now = hazard[:, first]
        chance[first:] = now + (1 - now) * chance[first:]
        time_s[first:] = widths[first] * (1 - now / 2) + (1 - now) * time_s[first:]
        worth[:, first] = (chance[first:] / time_s[first:]).max(axis=0)
    return worth
