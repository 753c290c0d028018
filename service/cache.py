"""The cache: what each request means. No gRPC here; the servicer, benchmarks and tests drive it.

Everything runs on one event loop's thread, so nothing here locks. Between two awaits the index is
never seen half changed.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from kvtier.chunks import ChunkKey
from kvtier.config import Limits
from kvtier.errors import InvalidRequest, LimitReached, ServiceStopping
from kvtier.service.answers import (
    CommitOutcome,
    Landed,
    LoadStop,
    Reserved,
    ReserveOutcome,
    TierUse,
)
from kvtier.service.history import Loss
from kvtier.service.leases import Lease, Mode
from kvtier.service.loading import Loading
from kvtier.service.placement import Placement
from kvtier.service.promotion import Promotions
from kvtier.service.raising import Raisings
from kvtier.service.sessions import Session, Sessions
from kvtier.spaces import Space
from kvtier.tiers.arena import slot_bytes_of
from kvtier.tiers.index import Branch, Node, Replica, TierId
from kvtier.transfer.mover import Priority

_IN_MEMORY = (TierId.GPU, TierId.CPU)


@dataclass(frozen=True, slots=True)
class Rules:
    """The cache's own settings. `ttl_s` of 0 keeps chunks until they are evicted."""

    ttl_s: float
    limits: Limits


class Cache:
    """All operations of the service, for sessions that `open_session` gave out."""

    def __init__(
        self,
        placement: Placement,
        promotions: Promotions,
        sessions: Sessions,
        rules: Rules,
        raisings: Raisings | None = None,
    ) -> None:
        self.placement = placement
        self.sessions = sessions
        self.rules = rules
        self._promotions = promotions
        self._raisings = raisings
        self._counters = placement.counters
        self._index = placement.index
        self._stopping = False

    # ── sessions ──────────────────────────────────────────────────────────────────────────────────

    @property
    def write_lease_limit(self) -> int:
        """Bytes that one session may hold reserved."""
        share = self.rules.limits.session_lease_percent
        return self.placement.memory.arena.nbytes * share // 100

    def open_session(
        self, client: str, space: Space, *, tethered: bool, in_vram: bool = False
    ) -> Session:
        """Connect a client to a space; `in_vram` when it also reaches the VRAM tier.

        Raises InvalidRequest when the space's chunks cannot fit in the arena, LimitReached when
        there are too many spaces or sessions.
        """
        if self._stopping:
            raise ServiceStopping("the service is stopping; connect again later")
        arena = self.placement.memory.arena
        if slot_bytes_of(space.layout.nbytes) > self.write_lease_limit:
            raise InvalidRequest(
                f"space.layout: a chunk of {space.layout.nbytes} bytes is more than a session may "
                f"reserve of the arena of {arena.nbytes}; raise cpu.capacity or lower layout.tokens"
            )
        if self._index.known(space.digest) is None:
            self._make_room_for_a_space()
        branch = self._index.branch(space)
        session = self.sessions.open(client, branch, tethered=tethered, in_vram=in_vram)
        self._counters.sessions_opened += 1
        return session

    def end_session(self, session: Session) -> None:
        """The client is gone; what it leased ends as soon as it can no longer touch it."""
        self._counters.sessions_ended += 1
        self.sessions.end(session)

    def announce_stop(self) -> None:
        """Take no new sessions and ask the present ones to go."""
        self._stopping = True
        self.sessions.announce_stop()

    def _make_room_for_a_space(self) -> None:
        limit = self.rules.limits.spaces
        if len(self._index.spaces) < limit:
            return
        for space in self._index.spaces:
            branch = self._index.branch(space)
            if not self.sessions.uses(branch) and self._index.forget_if_empty(branch):
                return
        raise LimitReached(f"limits.spaces: {limit} spaces hold chunks or sessions; raise it")

    # ── reading ───────────────────────────────────────────────────────────────────────────────────

    def lookup(self, session: Session, keys: Sequence[ChunkKey]) -> tuple[int, int]:
        """How many leading chunks are held, and how many of them are in RAM or VRAM. Moves
        nothing."""
        run = self._match(session.branch, keys)
        in_ram = self._index.leading(run, _IN_MEMORY)
        self._counters.lookups += 1
        self._counters.lookup_chunks += len(keys)
        self._counters.lookup_hits += len(run)
        return len(run), in_ram

    def open_read(self, session: Session, lease_id: int) -> Lease:
        """A read lease for `load`. Raises InvalidRequest when the id is in use."""
        return session.leases.open(lease_id, Mode.READ)

    def load(
        self,
        session: Session,
        lease: Lease,
        keys: Sequence[ChunkKey],
        deadline_s: float | None,
        *,
        in_vram: bool = False,
    ) -> "tuple[AsyncIterator[Landed], Loading]":
        """Bring the longest held run under a read lease; with `in_vram`, for a session that reaches
        it, chunks that are in VRAM are answered there.

        The chunks come from the iterator, which the caller must start at once; why it stopped
        stands in `stop` of the second value afterwards.
        """
        run = self._match(session.branch, keys)
        self._counters.loads += 1
        self._counters.load_chunks += len(keys)
        self.placement.hit(run)
        raisings = self._raisings if in_vram and session.in_vram else None
        loading = Loading(self.placement, self._promotions, raisings, session.leases, lease)
        if len(run) < len(keys):
            loading.stop = LoadStop.MISS
        return loading.chunks(run, deadline_s), loading

    def prefetch(self, session: Session, keys: Sequence[ChunkKey]) -> tuple[int, int]:
        """Start promoting the leading run; returns (already in RAM, on their way)."""
        in_ram = promoting = 0
        for node in self._match(session.branch, keys):
            if self._index.leading([node], _IN_MEMORY):
                in_ram += 1
            elif not node.ready(TierId.DISK):
                break  # evicted just now, to make room for those before it
            elif not self._promotions.join(node, Priority.PREFETCH):
                break
            else:
                promoting += 1
        return in_ram, promoting

    def release(self, session: Session, lease_id: int) -> None:
        """End a read lease; unknown ones are ignored."""
        lease = session.leases.find(lease_id, Mode.READ)
        if lease is not None:
            session.leases.end(lease)

    def _match(self, branch: Branch, keys: Sequence[ChunkKey]) -> list[Node]:
        ttl_s = self.rules.ttl_s
        if not ttl_s:
            return self._index.match(branch, keys)
        oldest_s = self.placement.clock() - ttl_s
        run = self._index.match(branch, keys, oldest_s)
        if len(run) < len(keys):
            node = branch.nodes.get(keys[len(run)])
            if node is not None and node.held:
                detail = f"it was older than retention.ttl_s ({ttl_s:g} s)"
                self._counters.expired_chunks += self.placement.lose(node, Loss.EXPIRED, detail)
        return run

    # ── writing ───────────────────────────────────────────────────────────────────────────────────

    def reserve(
        self, session: Session, lease_id: int, keys: Sequence[ChunkKey], parent: ChunkKey
    ) -> list[Reserved]:
        """Give a write slot for each key that is wanted; answers every key, in order.

        Room is made here and now. Raises InvalidRequest when the lease id is in use, or when a key
        is the space's root: stored as a chunk, that would become the parent of every prompt.
        """
        if session.branch.digest in keys:
            raise InvalidRequest("keys: the space digest is given; it is the key of no chunk")
        lease = session.leases.open(lease_id, Mode.WRITE)
        self.placement.hit(self._match(session.branch, keys))
        answers = []
        for index, key in enumerate(keys):
            answers.append(self._reserve_one(session, lease, index, key, parent))
            parent = key
        if not lease.replicas:
            session.leases.end(lease)
        return answers

    def _reserve_one(
        self, session: Session, lease: Lease, index: int, key: ChunkKey, parent: ChunkKey
    ) -> Reserved:
        branch, counters = session.branch, self._counters
        node = branch.nodes.get(key)
        if node is not None and node.held:
            return Reserved(ReserveOutcome.EXISTS)
        if node is not None and node.replicas[TierId.CPU] is not None:
            return Reserved(ReserveOutcome.BEING_WRITTEN)
        above = branch.nodes.get(parent)
        if parent != branch.digest and (above is None or not any(above.replicas)):
            counters.refused_parent_missing += 1
            return Reserved(ReserveOutcome.PARENT_MISSING)
        nbytes = branch.space.layout.nbytes
        if session.leases.write_bytes + nbytes > self.write_lease_limit:
            counters.refused_lease_limit += 1
            return Reserved(ReserveOutcome.LEASE_LIMIT)
        replica = self._begin_below(above, branch, key, parent)
        if replica is None:
            counters.refused_no_room += 1
            return Reserved(ReserveOutcome.NO_ROOM)
        counters.reserved_chunks += 1
        session.leases.add_write(lease, index, replica)
        return Reserved(ReserveOutcome.WRITE, replica.slot)

    def _begin_below(
        self, above: Node | None, branch: Branch, key: ChunkKey, parent: ChunkKey
    ) -> Replica | None:
        created_s = self.placement.clock()
        kept = above.ready(TierId.CPU) if above is not None else None
        if kept is not None:
            self._index.pin(kept)  # the room must not be its own parent's
        try:
            return self.placement.begin_in(
                TierId.CPU,
                branch.space.layout.nbytes,
                lambda slot: self._index.begin(branch, key, parent, created_s, TierId.CPU, slot),
            )
        finally:
            if kept is not None:
                self._index.unpin(kept)

    def write_lease(self, session: Session, lease_id: int) -> Lease | None:
        """The session's write lease of that id."""
        return session.leases.find(lease_id, Mode.WRITE)

    def commit(
        self, session: Session, lease_id: int, indexes: Sequence[int]
    ) -> list[CommitOutcome]:
        """Publish the named chunks of a write lease, in order; the rest of it is discarded."""
        lease = self.write_lease(session, lease_id)
        if lease is None:
            return [CommitOutcome.NOT_RESERVED] * len(indexes)
        outcomes, stored = [], []
        for index in indexes:
            replica = session.leases.take_written(lease, index)
            if replica is None:
                outcomes.append(CommitOutcome.NOT_RESERVED)
            elif self._index.commit(replica):
                outcomes.append(CommitOutcome.STORED)
                stored.append(replica.node)
            else:
                self._index.abort(replica)
                self._counters.aborted_chunks += 1
                outcomes.append(CommitOutcome.PARENT_MISSING)
        self._counters.committed_chunks += len(stored)
        self._counters.aborted_chunks += session.leases.end(lease)
        self.placement.committed(stored)
        return outcomes

    def abort(self, session: Session, lease_id: int) -> None:
        """Discard a write lease; unknown ones are ignored."""
        lease = self.write_lease(session, lease_id)
        if lease is not None:
            self._counters.aborted_chunks += session.leases.end(lease)

    # ── the operator's ────────────────────────────────────────────────────────────────────────────

    def evict(self, session: Session, keys: Sequence[ChunkKey], *, whole_space: bool) -> int:
        """Remove chunks of the session's space and all that continues them; returns how many."""
        nodes = session.branch.nodes
        doomed = list(nodes) if whole_space else list(keys)
        return sum(
            self.placement.lose(node, Loss.EVICTED, "a client asked for its removal")
            for key in doomed
            if (node := nodes.get(key)) is not None
        )

    def tiers(self) -> list[TierUse]:
        """What each tier holds."""
        arena, store = self.placement.memory.arena, self.placement.store
        used = [TierUse("cpu", arena.nbytes, arena.used_bytes, self._index.chunks[TierId.CPU])]
        if self.placement.vram is not None:
            arena, chunks = self.placement.vram.arena, self._index.chunks[TierId.GPU]
            used.insert(0, TierUse("gpu", arena.nbytes, arena.used_bytes, chunks))
        if store is not None:
            chunks = self._index.chunks[TierId.DISK]
            used.append(TierUse("disk", store.capacity_bytes, store.used_bytes, chunks))
        return used
