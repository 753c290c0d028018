"""The eviction policies by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvtier.tiers.base import Learner, Policy
from kvtier.tiers.policies.arc import Arc
from kvtier.tiers.policies.classes import CoarseClasses, FineClasses
from kvtier.tiers.policies.gix import Gix
from kvtier.tiers.policies.learner import HazardLearner
from kvtier.tiers.policies.lru import Lru
from kvtier.tiers.policies.s3fifo import S3Fifo


@dataclass(frozen=True, slots=True)
class Family:
    """The policies of one tier: `policy` makes a tenant's, and all of them teach `learner`."""

    policy: Callable[[], Policy[Any]]
    learner: Learner


class NothingToLearn:
    """The learner of policies that do not learn."""

    @property
    def due(self) -> bool:
        return False

    def learn(self) -> None: ...

    def dump(self) -> bytes:
        return b""

    def restore(self, encoded: bytes) -> bool:
        return not encoded


def make_family(name: str) -> Family:
    """The policies of one tier, by a name in FAMILIES."""
    return FAMILIES[name]()


def _gix(learner: HazardLearner) -> Family:
    return Family(lambda: Gix(learner), learner)


FAMILIES: dict[str, Callable[[], Family]] = {
    "lru": lambda: Family(Lru, NothingToLearn()),
    "arc": lambda: Family(Arc, NothingToLearn()),
    "s3fifo": lambda: Family(S3Fifo, NothingToLearn()),
    "gix-lite": lambda: _gix(HazardLearner(CoarseClasses())),
    "gix": lambda: _gix(HazardLearner(FineClasses())),
}
