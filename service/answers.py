"""What the cache answers: outcomes as values, one enum per question."""

from dataclasses import dataclass
from enum import Enum

from kvtier.tiers.arena import Slot
from kvtier.tiers.tree import Replica


class LoadStop(Enum):
    """Why a load brought no more."""

    COMPLETE = 1
    MISS = 2
    DEADLINE = 3
    NO_ROOM = 4
    CORRUPT = 5
    FAILED = 6
    RELEASED = 7


class ReserveOutcome(Enum):
    """What became of one key of a reservation."""

    WRITE = 1
    EXISTS = 2
    BEING_WRITTEN = 3
    NO_ROOM = 4
    PARENT_MISSING = 5
    LEASE_LIMIT = 6
    NOT_WORTH = 7
    QUOTA = 8


class CommitOutcome(Enum):
    """What became of one chunk of a commit."""

    STORED = 1
    PARENT_MISSING = 2
    NOT_RESERVED = 3
    CORRUPT = 4


class KeyState(Enum):
    """Where a key stands."""

    RAM = 1
    DISK = 2
    BEING_WRITTEN = 3
    NEVER_STORED = 4
    EVICTED = 5
    CORRUPT = 6
    EXPIRED = 7
    OTHER_SPACE = 8
    VRAM = 9
    REFUSED = 10
    QUOTA = 11
    LOST_IN_CRASH = 12


@dataclass(frozen=True, slots=True)
class Landed:
    """Chunks of a load that are readable now, as (index in the request, replica in an arena)."""

    chunks: list[tuple[int, Replica]]


@dataclass(frozen=True, slots=True)
class Reserved:
    """The answer to one key; `slot` only with WRITE."""

    outcome: ReserveOutcome
    slot: Slot | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a key is or is not a hit: `fields` names the space fields that differ."""

    state: KeyState
    detail: str
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TierUse:
    """What a tier holds."""

    name: str
    capacity_bytes: int
    used_bytes: int
    chunks: int
