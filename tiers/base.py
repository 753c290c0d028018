"""The words that tiers share: what a load can come to, and what a stored record is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

from kvtier.chunks import ChunkKey
from kvtier.spaces import Space

EntryT = TypeVar("EntryT", bound="Entry")


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


class Entry(Protocol):
    """A chunk in one tier, as its policy sees it."""

    mark: Any  # the policy's own, from `added` to `removed`

    @property
    def key(self) -> ChunkKey: ...
    @property
    def above(self) -> "Entry | None":
        """The chunk before it, where the same tier can serve that one."""
        ...

    @property
    def evictable(self) -> bool:
        """Whether it may be given up now: nobody uses it, and nothing continues it."""
        ...


@dataclass(slots=True)  # not frozen: there is one for each chunk, and that would triple its cost
class Coming:
    """A chunk about to be stored, as its tier's policy sees it: one of the keys of an arrival."""

    arrival: Any  # the policy's own, from `Policy.arrival`
    place: int


class Policy(Protocol[EntryT]):
    """An eviction order over the chunks of one tier and one tenant; sees no bytes and no locks.

    That leaves go first is the index's doing. Times are seconds of one clock; where it goes back, a
    policy takes it to stand still. A request is told once, by `asked`; what is then stored of it
    comes as an arrival, and chunk by chunk, with other calls in between.
    """

    def asked(self, path: Sequence[EntryT], beyond: Sequence[ChunkKey], now_s: float) -> None:
        """A prefix is asked for: `path` are its leading chunks that the tier has, from the root on,
        `beyond` the keys after them."""
        ...

    def hinted(self, path: Sequence[EntryT], label: int, now_s: float) -> None:
        """What the engine says of a prefix that it has just used; not a use. `path` are its leading
        chunks that the tier has, from the root on; `label` is never 0."""
        ...

    def arrival(
        self, above: EntryT | None, keys: Sequence[ChunkKey], now_s: float, label: int = 0
    ) -> Any:
        """What chunks are taken to be that are about to be stored under these keys, in prompt
        order. They continue `above`: None when they start a prompt, or when the tier lacks what is
        before them. `label` is what the engine said of them, 0 for nothing."""
        ...

    def admits(self, coming: Coming, over: EntryT) -> bool:
        """Whether a chunk is worth more than one that would have to go for it."""
        ...

    def added(self, entry: EntryT, coming: Coming) -> None: ...
    def removed(self, entry: EntryT, *, evicted: bool) -> None:
        """A chunk has gone: `evicted` for room, so that its return would be news."""
        ...

    def victims(self, now_s: float) -> Iterator[EntryT]:
        """Evictable chunks from the first to give up on. The caller removes the one it was given,
        or leaves it there and asks for the next."""
        ...

    def reuse(self, entry: EntryT, now_s: float) -> float:
        """The probability that a chunk is asked for again, as far as the policy knows; 1 where it
        does not learn."""
        ...

    def label(self, entry: EntryT) -> int:
        """What engines said last of a chunk that was not asked for since; 0 for nothing, and where
        the policy does not learn."""
        ...

    def likely(self, coming: Coming) -> float:
        """As `reuse`, of a chunk that is about to be stored."""
        ...

    def closed(self) -> None:
        """The tenant is forgotten: nothing of it is held, and nothing will be."""
        ...


class Learner(Protocol):
    """What the policies of one tier learn from what they see, for all tenants together."""

    @property
    def due(self) -> bool:
        """Whether enough was seen since the last time to learn from it."""
        ...

    def learn(self) -> None:
        """Fit the tables anew: a few milliseconds, so off the way of every answer."""
        ...

    def dump(self) -> bytes:
        """The tables, for the next run: a few KiB."""
        ...

    def restore(self, encoded: bytes) -> bool:
        """Take over what `dump` gave; False, and nothing is changed, for anything else."""
        ...
