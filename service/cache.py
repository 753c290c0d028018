"""The cache: what each request means. No gRPC here; the servicer, benchmarks and tests drive it.

Everything runs on one event loop's thread, so nothing here locks. Between two awaits the index is
never seen half changed.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from kvtier.chunks import ChunkKey
from kvtier.errors import InvalidRequest, LimitReached, ServiceStopping
from kvtier.sections import Limits
from kvtier.service.answers import CommitOutcome, Landed, LoadStop, Reserved, TierUse
from kvtier.service.hints import NOTHING_TOLD, Hints
from kvtier.service.history import Why
from kvtier.service.landing import Landing
from kvtier.service.leases import Lease, Mode
from kvtier.service.loading import Loading
from kvtier.service.overlaps import Offered, Overlaps
from kvtier.service.pins import Pinned, Pins, Terms
from kvtier.service.placement import Placement
from kvtier.service.promotion import Promotions
from kvtier.service.raising import Raisings
from kvtier.service.read_ahead import ReadAhead
from kvtier.service.removals import Removals
from kvtier.service.reserving import Reserving
from kvtier.service.sessions import Session, Sessions
from kvtier.service.uses import Call, Uses
from kvtier.spaces import Space
from kvtier.tiers.arena import slot_bytes_of
from kvtier.tiers.tree import Branch, Node, Replica, TierId

_IN_MEMORY = (TierId.GPU, TierId.CPU)
# Chunks of one Lookup that are begun.
_MOST_AHEAD = 256
# Chunks published in one turn of the loop, each in some 6 microseconds.
MOST_COMMITTED = 512


@dataclass(frozen=True, slots=True)
class Retained:
    """How long chunks are kept, and what clients may use up. `ttl_s` of 0 keeps chunks until they
    are evicted; `read_ahead_percent` is of RAM, for one session."""

    ttl_s: float
    limits: Limits
    read_ahead_percent: int


class Cache:
    """All operations of the service, for sessions that `open_session` gave out."""

    def __init__(
        self,
        placement: Placement,
        promotions: Promotions,
        sessions: Sessions,
        rules: Retained,
        pins: Pins,
        raisings: Raisings | None = None,
    ) -> None:
        self.placement = placement
        self.sessions = sessions
        self.rules = rules
        self._promotions = promotions
        self._landing = Landing(placement)
        self.pins = pins
        self.uses = Uses(placement)
        self._ahead = ReadAhead(placement, promotions, sessions, rules.read_ahead_percent)
        self._raisings = raisings
        self.removals = Removals(placement)
        self._counters = placement.counters
        self._index = placement.index
        self.overlaps = Overlaps(rules.limits.token_bytes, placement.counters)
        placement.index.on_gone = self.overlaps.tree.forget
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
        session.leases.on_discard = self._not_committed
        self._counters.sessions_opened += 1
        return session

    def end_session(self, session: Session) -> None:
        """The client is gone; what it leased ends as soon as it can no longer touch it."""
        self._counters.sessions_ended += 1
        self._ahead.end(session)
        self.pins.session_ended(session)
        self.sessions.end(session)

    def announce_stop(self) -> None:
        """Take no new sessions and ask the present ones to go."""
        self._stopping = True
        self.sessions.announce_stop()

    def _make_room_for_a_space(self) -> None:
        limit = self.rules.limits.spaces
        if len(self._index.spaces) < limit:
            return
        connected = self.sessions.branches
        for space in self._index.spaces:
            branch = self._index.branch(space)
            if branch not in connected and self._index.forget_if_empty(branch):
                return
        raise LimitReached(f"limits.spaces: {limit} spaces hold chunks or sessions; raise it")

    # ── reading ───────────────────────────────────────────────────────────────────────────────────

    def lookup(
        self, session: Session, keys: Sequence[ChunkKey], hints: Hints = NOTHING_TOLD
    ) -> tuple[int, int]:
        """How many leading chunks are held, and how many of them are in RAM or VRAM. The others
        start to come: whoever asks is about to load."""
        run = self._match(session.branch, keys)
        in_ram = self._index.leading(run, _IN_MEMORY)
        self._counters.lookups += 1
        self._counters.lookup_chunks += len(keys)
        self._counters.lookup_hits += len(run)
        if hints != NOTHING_TOLD:  # once it is answered
            asyncio.get_running_loop().call_soon(self._looked_up, session, keys, hints)
        if in_ram < len(run):  # likewise
            rest = run[in_ram : in_ram + _MOST_AHEAD]
            self._ahead.start(session, rest)
        return len(run), in_ram

    def _looked_up(self, session: Session, keys: Sequence[ChunkKey], hints: Hints) -> None:
        run = self._match(session.branch, keys)
        self.uses.used(session.branch, run, keys, hints, Call.LOOK)

    def open_read(self, session: Session, lease_id: int) -> Lease:
        """A read lease for `load`. Raises InvalidRequest when the id is in use."""
        return session.leases.open(lease_id, Mode.READ)

    def load(  # noqa: PLR0913 - what a request says, each by its name
        self,
        session: Session,
        lease: Lease,
        keys: Sequence[ChunkKey],
        deadline_s: float | None,
        *,
        hints: Hints = NOTHING_TOLD,
        in_vram: bool = False,
        offered: Offered | None = None,
    ) -> "tuple[AsyncIterator[Landed], Loading]":
        """Bring the longest held run under a read lease; with `in_vram`, for a session that reaches
        it, chunks that are in VRAM are answered there. With the prompt's tokens, a chunk that it
        leaves half-way comes last.

        The chunks come from the iterator, which the caller must start at once; why it stopped
        stands in `stop` of the second value afterwards.
        """
        run = self._match(session.branch, keys)
        self._counters.loads += 1
        self._counters.load_chunks += len(keys)
        if keys:  # else what comes later is the request's first use
            self.uses.used(session.branch, run, keys, hints, Call.READ)
        raisings = self._raisings if in_vram and session.in_vram else None
        loading = Loading(self.placement, self._promotions, raisings, session.leases, lease)
        loading.on_end = partial(self._ahead.load_ended, session, run)
        self._ahead.load_began(run)
        if len(run) < len(keys):
            loading.stop = LoadStop.MISS
        if offered is not None:
            oldest_s = self.placement.clock() - self.rules.ttl_s if self.rules.ttl_s else 0.0
            loading.overlap = self.overlaps.beyond(session.branch, run, offered, oldest_s)
        return loading.chunks(run, deadline_s), loading

    async def prefetch(self, session: Session, keys: Sequence[ChunkKey]) -> tuple[int, int]:
        """Start promoting the leading run; returns (already in RAM, on their way)."""
        return await self._ahead.bring(session, self._match(session.branch, keys))

    def cancel_prefetch(self, session: Session, keys: Sequence[ChunkKey]) -> int:
        """Give up what was started for a session by `prefetch` or `lookup`, unless somebody else
        wants it; returns how many chunks were on their way."""
        return self._ahead.give_up(session, keys)

    def pin(self, session: Session, keys: Sequence[ChunkKey], terms: Terms) -> Pinned:
        """Keep the leading held run from being evicted, within the bounds of pins."""
        return self.pins.pin(session, self._match(session.branch, keys), len(keys), terms)

    def release(self, session: Session, lease_id: int) -> None:
        """End a read lease; unknown ones are ignored."""
        lease = session.leases.find(lease_id, Mode.READ)
        if lease is not None:
            session.leases.end(lease)
            lease.on_release()

    def _match(self, branch: Branch, keys: Sequence[ChunkKey]) -> list[Node]:
        ttl_s = self.rules.ttl_s
        if not ttl_s:
            return self._index.match(branch, keys)
        oldest_s = self.placement.clock() - ttl_s
        run = self._index.match(branch, keys, oldest_s)
        if len(run) < len(keys):
            node = branch.nodes.get(keys[len(run)])
            if node is not None and node.held:
                self.removals.expire(node)
        return run

    # ── writing ───────────────────────────────────────────────────────────────────────────────────

    def reserve(
        self,
        session: Session,
        lease_id: int,
        keys: Sequence[ChunkKey],
        parent: ChunkKey,
        hints: Hints = NOTHING_TOLD,
    ) -> list[Reserved]:
        """Give a write slot for each key that is wanted, in one go; see `reserve_in_pieces`."""
        pieces = self.reserve_in_pieces(session, lease_id, keys, parent, hints)
        return list(chain.from_iterable(pieces))

    def reserve_in_pieces(
        self,
        session: Session,
        lease_id: int,
        keys: Sequence[ChunkKey],
        parent: ChunkKey,
        hints: Hints = NOTHING_TOLD,
    ) -> Iterator[list[Reserved]]:
        """Give a write slot for each key that is wanted; answers every key, in order. Between two
        pieces of the answers others may have their turn.

        Room is made here and now. Raises InvalidRequest when the lease id is in use, when the lease
        ends between two pieces, or when a key is the space's root: stored as a chunk, that would
        become the parent of every prompt.
        """
        if session.branch.digest in keys:
            raise InvalidRequest("keys: the space digest is given; it is the key of no chunk")
        lease = session.leases.open(lease_id, Mode.WRITE)
        run = self._match(session.branch, keys)  # what is too old makes place for the same anew
        above = session.branch.nodes.get(parent)
        self.uses.used(session.branch, run, keys, hints, Call.STORE, above)
        limit = self.write_lease_limit
        reserving = Reserving(self._landing, limit, session, lease, hints.label)
        try:
            yield from reserving.reserve(keys, parent)
        finally:
            if not lease.ended and not lease.replicas:
                session.leases.end(lease)

    def learn(self, session: Session, keys: Sequence[ChunkKey], offered: Offered) -> None:
        """Take the tokens of chunks that are held or reserved, where they make their keys."""
        self.overlaps.learn(session.branch, keys, offered)

    def write_lease(self, session: Session, lease_id: int) -> Lease | None:
        """The session's write lease of that id."""
        return session.leases.find(lease_id, Mode.WRITE)

    def commit(
        self, session: Session, lease_id: int, indexes: Sequence[int]
    ) -> list[CommitOutcome]:
        """Publish the named chunks of a write lease, in order, and discard the rest of it, in one
        go; see `commit_in_pieces`."""
        return list(chain.from_iterable(self.commit_in_pieces(session, lease_id, indexes)))

    def commit_in_pieces(
        self, session: Session, lease_id: int, indexes: Sequence[int]
    ) -> Iterator[list[CommitOutcome]]:
        """Publish the named chunks of a write lease, in order; the rest of it is discarded. Between
        two pieces of the answers others may have their turn: what is left of a lease that one of
        them ends is not reserved any more."""
        lease = self.write_lease(session, lease_id)
        try:
            for first in range(0, len(indexes), MOST_COMMITTED):
                yield self._commit(session, lease, indexes[first : first + MOST_COMMITTED])
        finally:
            if lease is not None and not lease.ended:
                self._discard(session, lease)

    def _commit(
        self, session: Session, lease: Lease | None, indexes: Sequence[int]
    ) -> list[CommitOutcome]:
        if lease is None or lease.ended:
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
                self.placement.refused(session.branch, replica.key, Why.PARENT_MISSING)
                outcomes.append(CommitOutcome.PARENT_MISSING)
        self._counters.committed_chunks += len(stored)
        self.overlaps.publish(stored)
        self.placement.committed(stored)
        self._landing.committed(stored)
        return outcomes

    def abort(self, session: Session, lease_id: int) -> None:
        """Discard a write lease; unknown ones are ignored."""
        lease = self.write_lease(session, lease_id)
        if lease is not None:
            self._discard(session, lease)

    def _discard(self, session: Session, lease: Lease) -> None:
        """End a write lease with what was not committed of it; where that is much, it is given back
        in a moment."""
        session.leases.end_soon(lease)
        self.sessions.give_back(session.leases)

    def _not_committed(self, replica: Replica) -> None:
        self.placement.refused(replica.node.branch, replica.key, Why.NOT_COMMITTED)

    # ── the operator's ────────────────────────────────────────────────────────────────────────────

    async def evict(self, session: Session, keys: Sequence[ChunkKey], *, whole_space: bool) -> int:
        """Remove chunks of the session's space and all that continues them; returns how many."""
        nodes = session.branch.nodes
        if whole_space:
            doomed = [node for node in nodes if node.parent is None]
        else:
            doomed = [node for key in keys if (node := nodes.get(key)) is not None]
        return await self.removals.remove(doomed)

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
