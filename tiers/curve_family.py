"""Policies for replays of a sample, in which each chunk stands for several.

A policy that learns counts chunks, and takes a request of many new chunks for another kind than one
of few. In a sample both are smaller, so that it would learn more slowly, and other things.
"""

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.tiers.policies.classes import Classes
from kvtier.tiers.policies.gix import Gix
from kvtier.tiers.policies.learner import HazardLearner
from kvtier.tiers.policies.registry import Family, make_family


def sampled_family(name: str, weight: int) -> Family:
    """A new family by its name, for chunks each of which stands for `weight` of them."""
    family = make_family(name)
    if weight == 1 or not isinstance(family.learner, HazardLearner):
        return family
    learner = _SampledLearner(family.learner.classes, weight)
    return Family(partial(Gix[Any], learner), learner)


# Requests between two fits: there are many replays, and a fit takes milliseconds.
_PERIOD = 128


class _SampledClasses:
    """The classes of what a sample stands for."""

    def __init__(self, classes: Classes, weight: int) -> None:
        self.count = classes.count
        self.seen_from = classes.seen_from
        self.groups = classes.groups
        self.seen = classes.seen
        self._new = classes.new
        self._weight = weight

    def new(self, turn: int, chunks: int) -> int:
        return self._new(turn, chunks * self._weight)


class _SampledLearner(HazardLearner):
    """Counts each chunk as many times as it stands for."""

    def __init__(self, classes: Classes, weight: int) -> None:
        super().__init__(_SampledClasses(classes, weight))
        self._weight = weight

    @property
    def due(self) -> bool:
        return self._since_fit >= _PERIOD and super().due

    def reused(self, kind: int, age_s: float, chunks: int) -> None:
        super().reused(kind, age_s, chunks * self._weight)

    def forgotten(self, kind: int, age_s: float, chunks: int) -> None:
        super().forgotten(kind, age_s, chunks * self._weight)

    def _hazard(self, waiting: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return super()._hazard(waiting * self._weight)
