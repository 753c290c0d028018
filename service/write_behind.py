"""RAM to disk, behind the clients' backs: what was committed is written in groups, oldest first."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress

from kvtier.service.placement import Placement
from kvtier.tiers.base import ChunkMeta, Record, StoreJob
from kvtier.tiers.index import Node, Replica, State, TierId
from kvtier.transfer.mover import Mover

# In one transaction: preparing it must not hold the loop up, however small chunks are.
_MOST_CHUNKS = 1024


class WriteBehind:
    """Chunks that RAM holds and disk does not yet. They cost no memory of their own: one that RAM
    must give up before its turn is simply not written."""

    def __init__(
        self, placement: Placement, mover: Mover, commit_bytes: int, commit_interval_s: float
    ) -> None:
        self._placement = placement
        self._mover = mover
        self._commit_bytes = commit_bytes
        self._interval_s = commit_interval_s
        # Not a plain dict: one that is emptied from the front is scanned over its dead entries.
        self._dirty: OrderedDict[Node, None] = OrderedDict()
        self._dirty_bytes = 0
        self._some = asyncio.Event()
        self._full = asyncio.Event()
        self._clean = asyncio.Event()
        self._clean.set()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        """Start writing; needs the running loop."""
        self._task = asyncio.create_task(self._run(), name="kvtier-write-behind")

    def add(self, nodes: Iterable[Node]) -> None:
        """Note chunks new in RAM, parents before their children."""
        for node in nodes:
            if node.replicas[TierId.DISK] is None and node not in self._dirty:
                self._dirty[node] = None
                self._dirty_bytes += node.branch.space.layout.nbytes
        if self._dirty:
            self._clean.clear()
            self._some.set()
        if self._enough:
            self._full.set()

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
            batch = self._take()
            if batch:
                # Shielded: a transaction that has begun must be entered in the index or taken back.
                await asyncio.shield(asyncio.ensure_future(self._write(batch)))
            if not self._dirty:
                self._some.clear()
                self._full.clear()
                self._clean.set()

    def _take(self) -> list[tuple[Replica, Replica]]:
        """The next group, as (RAM replica, begun disk replica); room for it is made."""
        batch: list[tuple[Replica, Replica]] = []
        placement = self._placement
        store = placement.store
        assert store is not None
        promised = 0
        taken = 0
        while self._dirty and taken < self._commit_bytes and len(batch) < _MOST_CHUNKS:
            node, _ = self._dirty.popitem(last=False)
            nbytes = node.branch.space.layout.nbytes
            self._dirty_bytes -= nbytes
            source = self._writable(node)
            if source is None:
                continue
            placement.index.pin(source)  # making room must not take it
            promised += store.worst_bytes(nbytes)
            if not placement.room_on_disk(promised):
                promised -= store.worst_bytes(nbytes)
                placement.counters.disk_skipped_chunks += 1
                placement.index.unpin(source)
                continue
            target = placement.index.begin_copy(node, TierId.DISK, None)
            batch.append((source, target))
            taken += nbytes
        if not self._enough:
            self._full.clear()
        return batch

    @property
    def _enough(self) -> bool:
        """Whether a transaction can be filled."""
        return self._dirty_bytes >= self._commit_bytes or len(self._dirty) >= _MOST_CHUNKS

    def _writable(self, node: Node) -> Replica | None:
        """Its RAM replica, if it should still be written: a child is of no use without its
        parent."""
        if node.replicas[TierId.DISK] is not None:
            return None
        if node.parent is not None and node.parent.replicas[TierId.DISK] is None:
            self._placement.counters.disk_skipped_chunks += 1
            return None
        return node.ready(TierId.CPU)

    async def _write(self, batch: list[tuple[Replica, Replica]]) -> None:
        memory = self._placement.memory
        jobs = [
            StoreJob(
                ChunkMeta(node.key, node.parent_key, node.branch.space, node.created_s),
                memory.view(source.slot),
            )
            for source, _ in batch
            for node in [source.node]
        ]
        records: list[Record | None] = [None] * len(batch)
        try:
            records = await self._mover.store(jobs)
        finally:
            for (source, target), record in zip(batch, records, strict=True):
                self._finish(source, target, record)

    def _finish(self, source: Replica, target: Replica, record: Record | None) -> None:
        index, counters = self._placement.index, self._placement.counters
        target.place = record
        evicted = source.state is not State.READY  # meanwhile, by a client's wish or its age
        if record is not None and not evicted and index.commit(target):
            counters.disk_written_chunks += 1
        else:
            index.abort(target)
            counters.disk_skipped_chunks += 1
        index.unpin(source)
