"""RAM to disk, behind the clients' backs: chunks are written in groups, in the order they came."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from kvtier.service.demotion import Cause
from kvtier.service.pace import Pace
from kvtier.service.placement import Claim, Placement
from kvtier.tiers.base import ChunkMeta, Coming, Record, StoreJob
from kvtier.tiers.tree import Node, Replica, State, TierId
from kvtier.transfer.mover import Mover

# In one transaction, however small chunks are: it is prepared and entered while others wait.
_MOST_CHUNKS = 1024
# Chunks looked at between two turns of the loop, each some ten microseconds.
_STEPS = 128


@dataclass(frozen=True, slots=True)
class _Write:
    """A chunk on its way from RAM to a begun disk replica."""

    source: Replica
    target: Replica
    cause: Cause
    job: StoreJob


@dataclass(slots=True)
class _Group:
    """What goes into one transaction. `promised_bytes` is the most that it takes of the disk."""

    writes: list[_Write] = field(default_factory=list)
    nbytes: int = 0
    promised_bytes: int = 0

    @property
    def room(self) -> int:
        """How many more chunks it may have."""
        return _MOST_CHUNKS - len(self.writes)


class WriteBehind:
    """Chunks that RAM holds and the disk is to have. They cost no memory of their own: one that RAM
    must give up before its turn is simply not written."""

    def __init__(
        self, placement: Placement, mover: Mover, commit_bytes: int, commit_interval_s: float
    ) -> None:
        self._placement = placement
        self._mover = mover
        self._commit_bytes = commit_bytes
        self._interval_s = commit_interval_s
        # Not a plain dict: one that is emptied from the front is scanned over its dead entries.
        self._dirty: OrderedDict[Node, Cause] = OrderedDict()
        self._dirty_bytes = 0
        self._beginning: dict[Node, Cause] = {}  # a run that is out of it
        self._some = asyncio.Event()
        self._full = asyncio.Event()
        self._clean = asyncio.Event()
        self._clean.set()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        """Start writing; needs the running loop."""
        self._task = asyncio.create_task(self._run(), name="kvtier-write-behind")

    def add(self, nodes: Iterable[Node], cause: Cause) -> None:
        """Note chunks that the disk is to have, parents before their children."""
        for node in nodes:
            if node.in_disk is None and node not in self:
                self._dirty[node] = cause
                self._dirty_bytes += node.branch.nbytes
        if self._dirty:
            self._clean.clear()
            self._some.set()
        if self._enough:
            self._full.set()

    def __contains__(self, node: Node) -> bool:
        """Whether a chunk waits to be written; then all before it is on its way, too."""
        return node in self._dirty or node in self._beginning

    async def flush(self, timeout_s: float) -> bool:
        """Write everything now; False when time ran out first."""
        self._full.set()
        try:
            await asyncio.wait_for(self._clean.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop after the transaction under way."""
        # Python 3.11's wait_for may swallow a cancellation that comes as its own wait ends.
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while not self._closing:
            await self._some.wait()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), self._interval_s)
            group = await self._take()
            if group.writes:
                # Shielded: a transaction that has begun must be entered in the index or taken back.
                await asyncio.shield(asyncio.ensure_future(self._write(group.writes)))
            if not self._dirty:
                self._some.clear()
                self._full.clear()
                self._clean.set()

    async def _take(self) -> _Group:
        """The next group; room for it is made, while others have their turns."""
        group = _Group()
        pace = Pace(_STEPS)
        try:
            while self._dirty and group.nbytes < self._commit_bytes and group.room:
                self._beginning = self._pop_run(group.room)
                await self._begin_run(group, pace)
        except BaseException:  # also the end: what was begun is taken back
            for write in group.writes:
                self._finish(write, None)
            raise
        if not self._enough:
            self._full.clear()
        return group

    def _pop_run(self, most: int) -> dict[Node, Cause]:
        """Chunks from the front, each the parent of the next."""
        run: dict[Node, Cause] = {}
        nbytes = 0
        last: Node | None = None
        while self._dirty and nbytes < self._commit_bytes and len(run) < most:
            node = next(iter(self._dirty))
            if last is not None and node.parent is not last:
                break
            run[node] = self._dirty.pop(node)
            nbytes += node.branch.nbytes
            last = node
        self._dirty_bytes -= nbytes
        return run

    async def _begin_run(self, group: _Group, pace: Pace) -> None:
        """Begin what is still to be written of a run, as one arrival."""
        run = list(self._beginning)
        claim: Claim | None = None
        for node, coming in zip(run, self._placement.coming(TierId.DISK, run), strict=True):
            cause = self._beginning.pop(node)
            claim = claim or self._placement.claim(TierId.DISK, node.branch)
            write = self._begin(claim, node, coming, cause, group.promised_bytes)
            if write is not None:
                group.writes.append(write)
                group.nbytes += node.branch.nbytes
                group.promised_bytes += self._worst_bytes(node)
            if await pace.stepped():
                claim = None  # it was for that turn

    def _begin(
        self, claim: Claim, node: Node, coming: Coming, cause: Cause, promised: int
    ) -> _Write | None:
        """Begin a chunk's disk replica where there is room for it beside what was promised."""
        placement = self._placement
        source = self._writable(node)
        if source is None:
            return None
        placement.index.pin(source)  # making room must not take it
        above = node.parent.ready(TierId.DISK) if node.parent is not None else None
        if above is not None:
            placement.index.pin(above)  # nor what it continues
        nbytes = promised + self._worst_bytes(node)
        refusal = placement.room_on_disk(claim, nbytes, coming)
        if above is not None:
            placement.index.unpin(above)
        if refusal is not None:
            placement.counters.disk_skipped_chunks += 1
            placement.index.unpin(source)
            return None
        meta = ChunkMeta(node.key, node.parent_key, node.branch.space, node.created_s)
        job = StoreJob(meta, placement.memory.view(source.slot))
        return _Write(source, placement.index.begin(node, TierId.DISK, None, coming), cause, job)

    def _worst_bytes(self, node: Node) -> int:
        store = self._placement.store
        assert store is not None
        return store.worst_bytes(node.branch.nbytes)

    @property
    def _enough(self) -> bool:
        """Whether a transaction can be filled."""
        return self._dirty_bytes >= self._commit_bytes or len(self._dirty) >= _MOST_CHUNKS

    def _writable(self, node: Node) -> Replica | None:
        """Its RAM replica, if it should still be written: a child is of no use without its
        parent."""
        if node.in_disk is not None:
            return None
        if node.parent is not None and node.parent.in_disk is None:
            self._placement.counters.disk_skipped_chunks += 1
            return None
        return node.ready(TierId.CPU)

    async def _write(self, writes: list[_Write]) -> None:
        records: list[Record | None] = [None] * len(writes)
        try:
            records = await self._mover.store([write.job for write in writes])
        finally:
            pace = Pace(_STEPS)
            for write, record in zip(writes, records, strict=True):
                self._finish(write, record)
                await pace.stepped()

    def _finish(self, write: _Write, record: Record | None) -> None:
        index, counters = self._placement.index, self._placement.counters
        write.target.place = record
        # Evicted meanwhile, by a client's wish or its age?
        evicted = write.source.state is not State.READY
        if record is not None and not evicted and index.commit(write.target):
            counters.add_written(write.cause.value, record.stored_bytes)
        else:
            index.abort(write.target)
            counters.disk_skipped_chunks += 1
        index.unpin(write.source)
