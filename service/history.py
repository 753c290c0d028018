"""Why chunks that were here, or were offered, are not: a bounded memory for `Explain`."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import product, starmap

from kvtier.chunks import ChunkKey
from kvtier.tiers.tree import TierId

# Of a space's digest: enough to tell spaces apart, and all that the journal has of it.
SPACE_BYTES = 16
_CONTINUED = 0x80
_LATEST_S = 2**32 - 1


class Why(IntEnum):
    """What became of a chunk. The journal keeps the numbers: one is never given twice."""

    ROOM = 1  # evicted for another chunk of its own tenant
    SHARE = 2  # evicted for another tenant's chunk, its own being above its share
    OWN_QUOTA = 3  # evicted for another chunk of its tenant, which held all it may
    LAYOUT = 4  # evicted with its slab, for chunks of another size
    REMOVED = 5  # a client asked for its removal
    CHECKSUM = 6  # what the disk had was not what was written
    VANISHED = 7  # the tier that had it lost it
    AGE = 8  # it was older than chunks may become
    NO_ROOM = 9  # refused: everything else was in use
    NOT_WORTH = 10  # refused: the policy valued everything else higher
    QUOTA = 11  # refused: its tenant held all it may
    LEASE_LIMIT = 12  # refused: its session had reserved all it may
    PARENT_MISSING = 13  # refused: the chunk before it was not there
    NOT_COMMITTED = 14  # reserved by a client that gave it up or died
    CRASH = 15  # committed, and not on disk when the service died


@dataclass(frozen=True, slots=True)
class Loss:
    """What became of a chunk: from which tier it went, where that was one; `continued` when it was
    a chunk before it that this happened to."""

    why: Why
    tier: TierId | None = None
    continued: bool = False
    code: int = field(init=False, repr=False, compare=False)  # all of it in one byte

    def __post_init__(self) -> None:
        tier = 0 if self.tier is None else self.tier + 1
        code = self.why | tier << 5 | _CONTINUED * self.continued
        object.__setattr__(self, "code", int(code))


# All that there can be, by their code.
LOSSES: Mapping[int, Loss] = {
    loss.code: loss for loss in starmap(Loss, product(Why, (None, *TierId), (False, True)))
}


@dataclass(frozen=True, slots=True)
class Lost:
    """A loss and when it was, in whole seconds since the epoch."""

    loss: Loss
    when_s: int


class History:
    """Remembers the last `limit` losses; older ones read as never stored.

    A ring of small numbers beside one dict, for there may be millions: about 200 bytes each.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._places: dict[bytes, int] = {}  # in the ring, by space and key
        self._names: list[bytes | None] = []  # the ring: None where a later loss took over
        self._codes = array("B")
        self._when_s = array("I")
        self._next = 0

    def __len__(self) -> int:
        return len(self._places)

    def note(self, space: bytes, key: ChunkKey, loss: Loss, when_s: float) -> None:
        """Remember a loss in the space of that digest; it takes the place of an earlier one of the
        same chunk."""
        if not self._limit:
            return
        name = space[:SPACE_BYTES] + key
        earlier = self._places.pop(name, None)
        if earlier is not None:
            self._names[earlier] = None
        when = whole_seconds(when_s)
        place = self._next
        if place == len(self._names):
            self._names.append(name)
            self._codes.append(loss.code)
            self._when_s.append(when)
        else:
            oldest = self._names[place]
            if oldest is not None:
                del self._places[oldest]
            self._names[place], self._codes[place], self._when_s[place] = name, loss.code, when
        self._places[name] = place
        self._next = (place + 1) % self._limit

    def find(self, space: bytes, key: ChunkKey) -> Lost | None:
        """The latest loss of a chunk."""
        place = self._places.get(space[:SPACE_BYTES] + key)
        return None if place is None else Lost(LOSSES[self._codes[place]], self._when_s[place])


def whole_seconds(when_s: float) -> int:
    """A time as it is kept: from the epoch to the year 2106."""
    return max(0, min(int(when_s), _LATEST_S))
