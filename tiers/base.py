"""The words that tiers share: what a load can come to, and what a stored record is."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeVar

from kvtier.chunks import ChunkKey
from kvtier.spaces import Space

ChunkT = TypeVar("ChunkT", bound=Hashable)


class Outcome(Enum):
    """What came of reading a chunk. None of these is an error."""

    HIT = "hit"  # the target holds the chunk's bytes, checksum verified
    MISS = "miss"  # the store no longer has it
    CORRUPT = "corrupt"  # its checksum or framing is wrong; the target's content is undefined
    FAILED = "failed"  # the medium could not be read


@dataclass(frozen=True, slots=True)
class ChunkMeta:
    """What a tier must know of a chunk besides its bytes."""

    key: ChunkKey
    parent: ChunkKey
    space: Space
    created_s: float  # wall clock, seconds since the epoch


@dataclass(frozen=True, slots=True)
class Record:
    """One chunk in a store. `id` is never reused while the store lives."""

    id: int
    key: ChunkKey
    parent: ChunkKey
    space: bytes  # digest
    stored_bytes: int  # what it takes of the store's capacity
    created_s: float


@dataclass(frozen=True, slots=True)
class StoreJob:
    """A chunk to be written: its committed bytes stay valid and unchanged until the store
    returns."""

    meta: ChunkMeta
    source: memoryview


class Store(Protocol):
    """A keyed store of chunks that moves bytes to and from RAM spans only (the disk tier).

    All methods are called on the event loop's thread; the bytes are moved on threads of the store.
    """

    @property
    def capacity_bytes(self) -> int: ...
    @property
    def used_bytes(self) -> int: ...
    def worst_bytes(self, nbytes: int) -> int:
        """The most of the capacity that a chunk of `nbytes` can take."""
        ...

    def records(self) -> list[Record]:
        """Everything that survived the last run, read from metadata alone."""
        ...

    def spaces(self) -> dict[bytes, Space]:
        """The spaces of those records, by digest."""
        ...

    async def load(self, record: Record, into: memoryview) -> Outcome: ...
    async def store(self, jobs: list[StoreJob]) -> list[Record | None]:
        """Write all jobs in one transaction; None for each that could not be written."""
        ...

    def delete(self, record: Record) -> None:
        """Forget a record now; its bytes go with the next transaction."""
        ...

    async def flush(self) -> None:
        """Return when every delete so far is durable."""
        ...

    async def close(self) -> None: ...


class Policy(Protocol[ChunkT]):
    """An eviction order over chunks of one tier; sees no bytes, locks or clock.

    That leaves go first is the index's doing: a policy may name any chunk.
    """

    def added(self, chunk: ChunkT) -> None: ...
    def touched(self, chunk: ChunkT) -> None: ...
    def removed(self, chunk: ChunkT) -> None: ...
    def victims(self) -> Iterator[ChunkT]:
        """Chunks from the first to give up to the last; its caller may remove what it was given."""
        ...
