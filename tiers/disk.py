"""The disk tier: chunks in LMDB, written by group commit, found again after a restart."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from kvtier.errors import ConfigError
from kvtier.kernels.codecs import Codec, codec_by_id
from kvtier.spaces import Space
from kvtier.tiers.base import Outcome, Record, StoreJob
from kvtier.tiers.disk_directory import OwnedDirectory
from kvtier.tiers.disk_file import DAMAGED_MARK, DataFile, Survivors
from kvtier.tiers.disk_format import PAGE_BYTES
from kvtier.tiers.disk_read import ChunkReader, ReadersAtWork
from kvtier.tiers.disk_shrink import open_within
from kvtier.tiers.disk_write import ChunkWriter, Committed, worst_charge

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

LEAST_CAPACITY_BYTES = 4 << 20
# The lock files beside the data file.
_BESIDE_BYTES = 64 << 10


def _reserve_bytes(map_bytes: int) -> int:
    """What chunks may not use of the file.

    LMDB writes copies of the tree's pages and keeps lists of free ones; and free space comes in
    pieces that do not always fit.
    """
    return map_bytes // 64 + (1 << 20)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A directory that is ours, with its file open."""

    directory: OwnedDirectory
    file: DataFile
    found: Survivors
    map_bytes: int


class DiskTier:
    """A `Store` in one directory, owned by this process alone.

    All methods belong to one thread, the event loop's; bytes move on threads of its own. A record
    is either durable and whole or gone, whatever happens to the process.
    """

    def __init__(self, owned: _Opened, codec: Codec, read_threads: int) -> None:
        """For `open`."""
        codecs = codec_by_id() | {codec.id: codec}
        readers = ReadersAtWork()
        file, found, map_bytes = owned.file, owned.found, owned.map_bytes
        self._directory = owned.directory
        self._file = file
        self._capacity_bytes = map_bytes - _reserve_bytes(map_bytes)
        self._live = found.records
        self._spaces = found.spaces
        self._stored_bytes = sum(record.stored_bytes for record in found.records.values())
        self._logical_bytes = sum(map(self._logical_bytes_of, found.records.values()))
        self._in_flight_bytes = 0
        self._deleted: list[Record] = []
        self._read_only = False
        self._closed = False
        self._reader = ChunkReader(file, codecs, readers)
        self._writer = ChunkWriter(
            owned.directory, file, codec, readers, self._capacity_bytes, found.next_id
        )
        self._read_pool = ThreadPoolExecutor(read_threads, "kvtier-disk-read")
        self._write_pool = ThreadPoolExecutor(1, "kvtier-disk-write")
        self.corrupt_reads = 0
        self.failed_writes = 0  # chunks
        self.commits = 0

    @classmethod
    def open(cls, directory: Path, capacity_bytes: int, codec: Codec, read_threads: int) -> Self:
        """Take the directory, creating it if need be, and read the metadata in it.

        The data file never exceeds `capacity_bytes`. One that is damaged beyond opening is moved
        aside. Blocks. Raises AlreadyRunning when another process has the directory, ConfigError
        when it cannot be used or holds another format version.
        """
        if capacity_bytes < LEAST_CAPACITY_BYTES:
            raise ConfigError(
                f"disk.capacity: {capacity_bytes} bytes given,"
                f" at least {LEAST_CAPACITY_BYTES} needed"
            )
        owned = OwnedDirectory.take(directory)
        try:
            map_bytes = (capacity_bytes - _BESIDE_BYTES) // PAGE_BYTES * PAGE_BYTES
            with owned.opening():
                file, found = open_within(owned, map_bytes, map_bytes - _reserve_bytes(map_bytes))
            if found.damaged:
                _log.warning("disk tier: %d damaged records were dropped", found.damaged)
            return cls(_Opened(owned, file, found, map_bytes), codec, read_threads)
        except BaseException:
            owned.close()
            raise

    @property
    def capacity_bytes(self) -> int:
        """What chunks may use together: the configured bytes less what LMDB needs for itself."""
        return self._capacity_bytes

    @property
    def used_bytes(self) -> int:
        """What chunks take, those included that are being written."""
        return self._stored_bytes + self._in_flight_bytes

    @property
    def stored_chunks(self) -> int:
        """How many chunks are here."""
        return len(self._live)

    @property
    def stored_bytes(self) -> int:
        """What they take on disk."""
        return self._stored_bytes

    @property
    def logical_bytes(self) -> int:
        """What they would take uncompressed."""
        return self._logical_bytes

    def worst_bytes(self, nbytes: int) -> int:
        """The most of the capacity that a chunk of `nbytes` can take."""
        return worst_charge(nbytes)

    def records(self) -> list[Record]:
        """Every chunk that is here, oldest first."""
        return list(self._live.values())

    def spaces(self) -> dict[bytes, Space]:
        """The spaces of those records, by digest."""
        return dict(self._spaces)

    async def load(self, record: Record, into: memoryview) -> Outcome:
        """Read a chunk into `into`, which is as long as the chunk and undefined unless HIT.

        When cancelled, returns only once no thread writes to `into` any more.
        """
        if self._closed:
            return Outcome.FAILED
        if record.id not in self._live:
            return Outcome.MISS
        outcome = await _finished(
            self._read_pool.submit(self._reader.load, record, into), give_up=True
        )
        if outcome is Outcome.CORRUPT:
            self.corrupt_reads += 1
        return outcome

    async def store(self, jobs: list[StoreJob]) -> list[Record | None]:
        """Write all jobs in one transaction; None for each that could not be written.

        Durable on return. Holds up to twice the jobs' bytes meanwhile: the caller bounds a batch.
        """
        if self._closed or self._read_only or not jobs:
            self.failed_writes += len(jobs)
            return [None] * len(jobs)
        worst = sum(worst_charge(job.source.nbytes) for job in jobs)
        deletes, self._deleted = self._deleted, []
        used = self._stored_bytes + self._in_flight_bytes
        self._in_flight_bytes += worst
        return await self._run(lambda: self._writer.write(jobs, deletes, used), jobs, worst)

    def delete(self, record: Record) -> None:
        """Forget a record now; its bytes go with the next transaction."""
        if self._live.pop(record.id, None) is not None:
            self._stored_bytes -= record.stored_bytes
            self._logical_bytes -= self._logical_bytes_of(record)
            self._deleted.append(record)

    async def flush(self) -> None:
        """Return when every delete so far is durable, or has failed and waits for the next try."""
        if self._closed or self._read_only:
            return
        deletes, self._deleted = self._deleted, []
        used = self._stored_bytes + self._in_flight_bytes
        await self._run(lambda: self._writer.write([], deletes, used), [], 0)

    async def close(self) -> None:
        """Finish what was begun, make deletes durable and give the directory back."""
        if self._closed:
            return
        await self.flush()
        self._closed = True
        await asyncio.to_thread(self._release)

    def _release(self) -> None:
        self._read_pool.shutdown()
        self._write_pool.shutdown()
        self._writer.close()
        self._reader.close()
        self._file.close()
        self._directory.close()

    async def _run(
        self, write: Callable[[], Committed], jobs: list[StoreJob], worst: int
    ) -> list[Record | None]:
        """Run one call of the writer and take in what it did.

        A cancelled caller never learns its records, so they are deleted again.
        """
        pending = self._write_pool.submit(write)
        try:
            await _finished(pending, give_up=False)
        except asyncio.CancelledError:
            for record in self._take_in(pending.result(), jobs, worst):
                if record is not None:
                    self.delete(record)
            raise
        return self._take_in(pending.result(), jobs, worst)

    def _take_in(self, done: Committed, jobs: list[StoreJob], worst: int) -> list[Record | None]:
        self._in_flight_bytes -= worst
        self.commits += done.commits
        self._deleted = done.undeleted + self._deleted
        for job, record in zip(jobs, done.records, strict=True):
            if record is None:
                self.failed_writes += 1
                continue
            self._live[record.id] = record
            self._spaces[record.space] = job.meta.space
            self._stored_bytes += record.stored_bytes
            self._logical_bytes += self._logical_bytes_of(record)
        if done.failure:
            _log.warning("disk tier: %d chunks not written: %s", len(jobs), done.failure)
        if done.damaged:
            _log.error("disk tier: the data file is damaged; no more writes until a restart")
            self._read_only = True
            (self._directory.path / DAMAGED_MARK).touch(mode=0o600)
        return done.records

    def _logical_bytes_of(self, record: Record) -> int:
        return self._spaces[record.space].layout.nbytes


async def _finished(job: Future[_Result], *, give_up: bool) -> _Result:
    """The job's result. When cancelled, returns only once the job no longer runs.

    `give_up` allows a job that has not begun to be dropped then.
    """
    waiter = asyncio.wrap_future(job)
    try:
        return await asyncio.shield(waiter)
    except asyncio.CancelledError:
        if not (give_up and job.cancel()):
            await _ended(waiter)
        raise


async def _ended(waiter: asyncio.Future[_Result]) -> None:
    """Wait for the end whatever else is cancelled meanwhile."""
    while not waiter.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([waiter])
