"""Why chunks that were here are not: a bounded memory for `Explain`."""

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

from kvtier.chunks import ChunkKey


class Loss(Enum):
    """How a chunk came to be gone."""

    EVICTED = "evicted"
    CORRUPT = "corrupt"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class LossRecord:
    """One loss: `when_s` is seconds since the epoch, `detail` a sentence for a person."""

    loss: Loss
    when_s: float
    detail: str


class History:
    """Remembers the last `limit` losses; older ones read as never stored."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._losses: OrderedDict[tuple[bytes, ChunkKey], LossRecord] = OrderedDict()

    def note(self, space: bytes, key: ChunkKey, record: LossRecord) -> None:
        self._losses[space, key] = record
        self._losses.move_to_end((space, key))
        if len(self._losses) > self._limit:
            self._losses.popitem(last=False)

    def find(self, space: bytes, key: ChunkKey) -> LossRecord | None:
        return self._losses.get((space, key))
