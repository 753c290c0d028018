"""One reservation: which of a request's chunks are wanted, and the room for them."""

from collections.abc import Iterator, Sequence

from kvtier.chunks import ChunkKey
from kvtier.errors import InvalidRequest
from kvtier.service.answers import Reserved, ReserveOutcome
from kvtier.service.history import Why
from kvtier.service.landing import Landing
from kvtier.service.leases import Lease
from kvtier.service.placement import Refusal
from kvtier.service.sessions import Session
from kvtier.tiers.arena import Slot
from kvtier.tiers.base import Coming
from kvtier.tiers.tree import Node, Replica, TierId

_REFUSED = {
    Refusal.NO_ROOM: ReserveOutcome.NO_ROOM,
    Refusal.NOT_WORTH: ReserveOutcome.NOT_WORTH,
    Refusal.QUOTA: ReserveOutcome.QUOTA,
}
_WHY = {
    ReserveOutcome.NO_ROOM: Why.NO_ROOM,
    ReserveOutcome.NOT_WORTH: Why.NOT_WORTH,
    ReserveOutcome.QUOTA: Why.QUOTA,
    ReserveOutcome.LEASE_LIMIT: Why.LEASE_LIMIT,
    ReserveOutcome.PARENT_MISSING: Why.PARENT_MISSING,
}


# Keys answered in one turn of the loop, each in some 20 microseconds.
MOST_AT_ONCE = 128


class Reserving:
    """Gives a session write slots under one lease. `most_bytes` is what it may hold reserved;
    `label` is what its engine says of the chunks."""

    def __init__(
        self, landing: Landing, most_bytes: int, session: Session, lease: Lease, label: int
    ) -> None:
        self._placement = landing.placement
        self._landing = landing
        self._most_bytes = most_bytes
        self._session = session
        self._branch = session.branch
        self._lease = lease
        self._label = label
        self._created_s = landing.placement.clock()  # one object, however many chunks
        self._coming: dict[tuple[TierId, int], Coming] = {}
        self._claim = landing.placement.claim(TierId.CPU, session.branch)
        self._refusal: Refusal | None = None

    def reserve(self, keys: Sequence[ChunkKey], parent: ChunkKey) -> Iterator[list[Reserved]]:
        """Answer every key, in order; each is the parent of the next. Between two pieces others may
        have their turn. Raises InvalidRequest when one of them ends the lease."""
        self._branch.tenant.asked_s = self._created_s
        parents = [parent, *keys]
        for first in range(0, len(keys), MOST_AT_ONCE):
            self._claim = self._placement.claim(TierId.CPU, self._branch)
            piece = range(len(keys))[first : first + MOST_AT_ONCE]
            yield [self._reserve_one(keys, index, parents[index]) for index in piece]
            if self._lease.ended:  # the slots may be somebody else's now: nobody may be told of one
                raise InvalidRequest(f"lease_id: lease {self._lease.id} ended while it was filled")

    def _reserve_one(self, keys: Sequence[ChunkKey], index: int, parent: ChunkKey) -> Reserved:
        branch = self._branch
        node, above = branch.nodes.get(keys[index]), branch.nodes.get(parent)
        if node is not None and node.held:
            return Reserved(ReserveOutcome.EXISTS)
        if node is not None and node.in_cpu is not None:
            return Reserved(ReserveOutcome.BEING_WRITTEN)
        if parent != branch.digest and (above is None or not any(above.replicas)):
            return self._refuse_orphan(keys[index])
        if self._session.leases.write_bytes + branch.nbytes > self._most_bytes:
            return self._refuse(keys[index], ReserveOutcome.LEASE_LIMIT)
        return self._grant(keys, index, above)

    def _refuse_orphan(self, key: ChunkKey) -> Reserved:
        if self._refusal is not None:  # it goes the way of what it continues
            return self._refuse(key, _REFUSED[self._refusal])
        return self._refuse(key, ReserveOutcome.PARENT_MISSING)

    def _grant(self, keys: Sequence[ChunkKey], index: int, above: Node | None) -> Reserved:
        replica = self._begin_below(above, keys, index)
        if isinstance(replica, Refusal):
            self._refusal = replica
            return self._refuse(keys[index], _REFUSED[replica])
        self._placement.counters.reserved_chunks += 1
        self._session.leases.add_write(self._lease, index, replica)
        return Reserved(ReserveOutcome.WRITE, replica.slot)

    def _refuse(self, key: ChunkKey, outcome: ReserveOutcome) -> Reserved:
        self._placement.counters.add_refused(outcome.name.lower())
        self._placement.refused(self._branch, key, _WHY[outcome])
        return Reserved(outcome)

    def _begin_below(
        self, above: Node | None, keys: Sequence[ChunkKey], index: int
    ) -> Replica | Refusal:
        found = self._begin(above, keys, index, admit=True)
        if found is not Refusal.NOT_WORTH:
            return found
        comings = [self._expect(tier, above, keys, index) for tier in (TierId.CPU, TierId.DISK)]
        if not self._landing.takes(self._branch, keys[index], *comings):
            return found
        found = self._begin(above, keys, index, admit=False)
        if not isinstance(found, Refusal):
            self._landing.landed(found)
        return found

    def _begin(
        self, above: Node | None, keys: Sequence[ChunkKey], index: int, *, admit: bool
    ) -> Replica | Refusal:
        branch, tree = self._branch, self._placement.index
        if not admit:  # that arrival was refused; of what follows, each chunk is asked for again
            [anew] = self._arrive(TierId.CPU, above, keys[index : index + 1])
            self._coming[TierId.CPU, index] = anew
        coming = self._expect(TierId.CPU, above, keys, index)
        kept = above.ready(TierId.CPU) if above is not None else None

        def begin(slot: Slot) -> Replica:
            parent = above.key if above is not None else branch.digest
            node = tree.enter(branch, keys[index], parent, self._created_s)
            return tree.begin(node, TierId.CPU, slot, coming)

        if kept is not None:
            tree.pin(kept)  # the room must not be its own parent's
        try:
            return self._placement.begin_in(self._claim, begin, coming if admit else None)
        finally:
            if kept is not None:
                tree.unpin(kept)

    def _expect(
        self, tier: TierId, above: Node | None, keys: Sequence[ChunkKey], index: int
    ) -> Coming:
        """What a tier's policy takes a chunk to be; asked once for all that follow it."""
        if (tier, index) not in self._coming:
            rest = self._arrive(tier, above, keys[index:])
            self._coming |= {(tier, place): each for place, each in enumerate(rest, index)}
        return self._coming[tier, index]

    def _arrive(self, tier: TierId, above: Node | None, keys: Sequence[ChunkKey]) -> list[Coming]:
        tree, label = self._placement.index, self._label
        return tree.arrival(self._branch, tier, above, keys, self._created_s, label)
