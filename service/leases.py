"""Who may touch which slot: one session's leases.

A lease covers the chunks of one request, under an id that the client chose, so that a client whose
answer got lost can still give it back. A read lease pins committed replicas; a write lease owns
replicas that nobody can read yet.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from kvtier.errors import InvalidRequest, LimitReached
from kvtier.tiers.index import Index
from kvtier.tiers.tree import Replica, State

# One per request under way or in use; a client that leaks them is stopped before it hurts others.
LEASES_PER_SESSION = 4096


class Mode(Enum):
    """What a lease allows."""

    READ = "read"
    WRITE = "write"


@dataclass(slots=True, eq=False)
class Lease:
    """The chunks of one request, by their index in it."""

    id: int
    mode: Mode
    replicas: dict[int, Replica] = field(default_factory=dict)
    ended: bool = False
    filling: bool = False  # a Put is writing into its slots
    on_release: Callable[[], None] = lambda: None  # called when its client has read what it wanted


class Leases:
    """One session's leases over an index; `write_bytes` is what it holds reserved. `on_discard` is
    told of each chunk that was reserved and is given up."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._leases: dict[int, Lease] = {}
        self._ended: list[Lease] = []
        self.write_bytes = 0
        self.on_discard: Callable[[Replica], None] = lambda replica: None

    def __len__(self) -> int:
        return len(self._leases)

    def open(self, lease_id: int, mode: Mode) -> Lease:
        """A new lease. Raises InvalidRequest when the id is in use, LimitReached when too many
        are."""
        if lease_id in self._leases:
            raise InvalidRequest(f"lease_id: {lease_id} is in use in this session; choose another")
        if len(self._leases) >= LEASES_PER_SESSION:
            raise LimitReached(
                f"leases: {LEASES_PER_SESSION} are open in this session; release some"
            )
        lease = self._leases[lease_id] = Lease(lease_id, mode)
        return lease

    def find(self, lease_id: int, mode: Mode) -> Lease | None:
        lease = self._leases.get(lease_id)
        return lease if lease is not None and lease.mode is mode else None

    def add_read(self, lease: Lease, index: int, replica: Replica) -> None:
        """Pin a readable replica under the lease."""
        assert not lease.ended
        assert replica.state is State.READY
        self._index.pin(replica)
        lease.replicas[index] = replica

    def add_write(self, lease: Lease, index: int, replica: Replica) -> None:
        """Put a replica that is about to be written under the lease."""
        assert not lease.ended
        lease.replicas[index] = replica
        self.write_bytes += replica.slot.nbytes

    def take_written(self, lease: Lease, index: int) -> Replica | None:
        """Take one written replica out of its lease, to be committed or aborted by the caller."""
        replica = lease.replicas.pop(index, None)
        if replica is not None:
            self.write_bytes -= replica.slot.nbytes
        return replica

    def end(self, lease: Lease) -> int:
        """End a lease: unpin what it read, discard what it did not commit. Returns how many chunks
        of a write lease were discarded."""
        del self._leases[lease.id]
        lease.ended = True
        return self._give_back(lease, len(lease.replicas))

    def end_soon(self, lease: Lease) -> None:
        """End a lease; what it had is for `give_back`."""
        del self._leases[lease.id]
        lease.ended = True
        self._ended.append(lease)

    def end_all(self) -> None:
        """End every lease; what they had is for `give_back`."""
        for lease in list(self._leases.values()):
            self.end_soon(lease)

    @property
    def given_back(self) -> bool:
        """Whether nothing is left of the leases that ended."""
        return not self._ended

    def give_back(self, most: int) -> int:
        """Give back so many chunks of leases that ended; returns how many were discarded."""
        discarded = 0
        while self._ended and most > 0:
            lease = self._ended[-1]
            chunks = min(most, len(lease.replicas))
            discarded += self._give_back(lease, chunks)
            most -= max(1, chunks)
            if not lease.replicas:
                self._ended.pop()
        return discarded

    def _give_back(self, lease: Lease, chunks: int) -> int:
        """Give back the last chunks of a lease; returns how many were discarded."""
        if lease.mode is Mode.READ:
            for _ in range(chunks):
                self._index.unpin(lease.replicas.popitem()[1])
            return 0
        for _ in range(chunks):
            _, replica = lease.replicas.popitem()
            self.write_bytes -= replica.slot.nbytes
            self.on_discard(replica)
            self._index.abort(replica)
        return chunks
