"""Writing to the data file: transactions of many chunks and deletes, all on one thread.

LMDB never overwrites a page that the last two commits can see, so a page that a delete gives up is
free only two transactions later. When room is short the writer therefore settles first: it commits
the deletes, waits for readers of the older state, and makes one more small commit.
"""

import ctypes
import logging
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import lmdb
import numpy as np
from xxhash import xxh3_64_intdigest as checksum_of

from kvtier.kernels.codecs import Codec, codec_by_id
from kvtier.kernels.codecs.raw import RawCodec
from kvtier.tiers.base import Record, StoreJob
from kvtier.tiers.disk_directory import OwnedDirectory
from kvtier.tiers.disk_file import NEXT_ID_KEY, DataFile, ViewTransaction
from kvtier.tiers.disk_format import (
    EXTENT_LADDER,
    NO_PAGE,
    PAGE_BYTES,
    PAGE_HEADER_BYTES,
    Extent,
    Header,
    StoredChunk,
    charge,
    extent_key,
    extent_sizes,
    id_of,
    meta_key,
    pack_number,
)
from kvtier.tiers.disk_read import ReadersAtWork

_log = logging.getLogger(__name__)

# A free list is one LMDB value: deleting more at once would need a long run of free pages for it.
_DELETED_PER_COMMIT = 256 << 20
_READER_WAIT_S = 2.0
# Compressing is worth it when it saves more than this share of the bytes.
_WORTH = 16
_LEAST_BLOCK_BYTES = min(codec.block_bytes for codec in codec_by_id().values())
_PAGE_START = struct.Struct("=QHHI")  # number, padding, flags, pages
_OVERFLOW_PAGE = 0x04
# What says that the file is damaged and not that the medium is full or failing.
_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.BadTxnError)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A chunk as it will be stored, not yet cut into extents."""

    codec: Codec
    pieces: Sequence[bytes | memoryview]
    blocks: tuple[int, ...]
    nbytes: int


def encode(source: memoryview, itemsize: int, codec: Codec) -> Encoded:
    """Encode a chunk block by block; one that hardly shrinks is left as it is."""
    if not codec.verbatim:
        pieces: list[bytes | memoryview] = []
        blocks = []
        for start in range(0, source.nbytes, codec.block_bytes):
            block = codec.encode(source[start : start + codec.block_bytes], itemsize)
            pieces += block
            blocks.append(sum(memoryview(piece).nbytes for piece in block))
        if sum(blocks) <= source.nbytes - source.nbytes // _WORTH:
            return Encoded(codec, pieces, tuple(blocks), sum(blocks))
    return Encoded(RawCodec(), [source], (), source.nbytes)


def cut(encoded: Encoded, extent_bytes: int) -> Iterator[memoryview]:
    """The encoded chunk as extents, each in one piece of memory."""
    if len(encoded.pieces) == 1:
        whole = memoryview(encoded.pieces[0])
        for start in range(0, whole.nbytes, extent_bytes):
            yield whole[start : start + extent_bytes]
        return
    pieces = iter(encoded.pieces)
    piece = memoryview(b"")
    for nbytes in extent_sizes(encoded.nbytes, extent_bytes):
        extent = memoryview(bytearray(nbytes))
        filled = 0
        while filled < nbytes:
            if not piece.nbytes:
                piece = memoryview(next(pieces)).cast("B")
            part = min(piece.nbytes, nbytes - filled)
            extent[filled : filled + part] = piece[:part]
            piece = piece[part:]
            filled += part
        yield extent


@dataclass(frozen=True, slots=True)
class Committed:
    """What came of one call of `ChunkWriter.write`."""

    records: list[Record | None]  # one per job
    undeleted: list[Record]  # deletes that did not become durable
    commits: int
    failure: str = ""  # why a transaction was given up; empty when none was
    damaged: bool = False  # the file itself is damaged: no later write can work


class ChunkWriter:
    """The one writer of a data file. All methods but the constructor run on the writer's thread."""

    def __init__(
        self,
        directory: OwnedDirectory,
        file: DataFile,
        codec: Codec,
        readers: ReadersAtWork,
        budget_bytes: int,
        next_id: int,
    ) -> None:
        self._file = file
        self._codec = codec
        self._directory = directory
        self._readers = readers
        self._budget_bytes = budget_bytes
        self._next_id = next_id
        self._cooling = [0, 0]  # bytes that the last two commits freed: not yet reusable
        self._commits = 0
        self._rung = 0  # of the extent ladder, where the last transaction found room
        self._encoder = ThreadPoolExecutor(1, "kvtier-disk-encode")

    def close(self) -> None:
        """Release the writer's threads; the data file stays open."""
        self._encoder.shutdown()

    def write(self, jobs: list[StoreJob], deletes: list[Record], used_bytes: int) -> Committed:
        """Store all jobs in one transaction, after or with the deletes.

        `used_bytes` is what the chunks take that stay. Never raises for a full or failing medium.
        """
        before = self._commits
        left = list(deletes)
        failure, damaged = "", False
        records: list[Record | None] = [None] * len(jobs)
        try:
            records[:] = self._write(jobs, left, used_bytes)
        except (lmdb.Error, OSError) as error:
            failure = str(error) or type(error).__name__
            damaged = isinstance(error, _DAMAGE)
        return Committed(records, left, self._commits - before, failure, damaged)

    def _write(self, jobs: list[StoreJob], left: list[Record], used_bytes: int) -> list[Record]:
        while len(_first(left)) < len(left):
            self._transact([], left)
        if not jobs:
            return self._transact(jobs, left) if left else []
        worst = sum(worst_charge(job.source.nbytes) for job in jobs)
        freed = sum(record.stored_bytes for record in left)
        if used_bytes + worst + freed + sum(self._cooling) > self._budget_bytes:
            self._settle(left)
        for rung in range(max(0, self._rung - 1), len(EXTENT_LADDER)):
            try:
                records = self._transact(jobs, left, EXTENT_LADDER[rung])
            except lmdb.MapFullError:
                self._settle(left)
            except lmdb.Error:
                # Perhaps a full disk: the file must not grow beyond what it has now.
                self._budget_bytes = min(self._budget_bytes, used_bytes)
                raise
            else:
                self._rung = rung
                return records
        raise lmdb.MapFullError("free space is in pieces too small")

    def _settle(self, left: list[Record]) -> None:
        """Make every page reusable that deletes have given up so far."""
        self._transact([], left)
        self._readers.wait_for_current(_READER_WAIT_S)
        self._transact([], left)
        self._cooling = [0, 0]

    def _transact(
        self, jobs: list[StoreJob], left: list[Record], extent_bytes: int = EXTENT_LADDER[0]
    ) -> list[Record]:
        """One durable transaction: the first of the deletes, taken off `left`, and all jobs."""
        deletes = _first(left)
        with self._directory.writing(), self._file.env.begin(write=True, buffers=True) as txn:
            for record in deletes:
                self._delete(txn, record)
            records = [
                self._put(txn, job, encoded, extent_bytes)
                for job, encoded in zip(jobs, self._encode(jobs), strict=True)
            ]
            txn.put(NEXT_ID_KEY, pack_number(self._next_id), db=self._file.head)
        del left[: len(deletes)]
        self._cooling = [self._cooling[1], sum(record.stored_bytes for record in deletes)]
        self._commits += 1
        return records

    def _encode(self, jobs: list[StoreJob]) -> Iterator[Encoded]:
        """Encode one chunk ahead of the one that is being put."""
        if self._codec.verbatim:
            yield from map(self._encode_one, jobs)
            return
        ahead: deque[Future[Encoded]] = deque()
        for job in jobs:
            ahead.append(self._encoder.submit(self._encode_one, job))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        for each in ahead:
            yield each.result()

    def _encode_one(self, job: StoreJob) -> Encoded:
        itemsize = job.meta.space.layout.itemsize
        return encode(job.source, itemsize, self._codec)

    def _put(
        self, txn: ViewTransaction, job: StoreJob, encoded: Encoded, extent_bytes: int
    ) -> Record:
        chunk_id = self._next_id
        self._next_id += 1
        space = job.meta.space.digest
        extents = put_extents(txn, self._file, chunk_id, cut(encoded, extent_bytes))
        header = Header(
            checksum=0,
            key=job.meta.key,
            parent=job.meta.parent,
            space=space,
            created_s=job.meta.created_s,
            nbytes=job.source.nbytes,
            charged=charge([extent.nbytes for extent in extents], len(encoded.blocks)),
            extents=len(extents),
            blocks=len(encoded.blocks),
            codec=encoded.codec.id,
            itemsize=job.meta.space.layout.itemsize,
        )
        packed = StoredChunk(header, extents, encoded.blocks).pack(chunk_id)
        append(txn, meta_key(chunk_id), packed, self._file.meta)
        txn.put(space, job.meta.space.to_json(), overwrite=False, db=self._file.spaces)
        return Record(
            chunk_id, job.meta.key, job.meta.parent, space, header.charged, job.meta.created_s
        )

    def _delete(self, txn: ViewTransaction, record: Record) -> None:
        txn.delete(meta_key(record.id), db=self._file.meta)
        for key in _extent_keys(txn, self._file, record.id):
            txn.delete(key, db=self._file.data)


def put_extents(
    txn: ViewTransaction, file: DataFile, chunk_id: int, values: Iterable[memoryview]
) -> tuple[Extent, ...]:
    """Append a chunk's extents to the data database. `chunk_id` is higher than any in it."""
    extents = []
    for number, value in enumerate(values):
        key = extent_key(chunk_id, number)
        append(txn, key, value, file.data)
        extents.append(Extent(checksum_of(value), _page_of(txn, file, key), value.nbytes))
    return tuple(extents)


def append(txn: ViewTransaction, key: bytes, value: bytes | memoryview, db: Any) -> None:
    """Put a value under a key higher than all others: LMDB then fills its pages."""
    if not txn.put(key, value, append=True, db=db):
        raise lmdb.CorruptedError("a key that was never used is taken")


def worst_charge(nbytes: int) -> int:
    """The most of the capacity that a chunk of `nbytes` can take, however it is cut and encoded."""
    blocks = -(-nbytes // _LEAST_BLOCK_BYTES)
    return charge(extent_sizes(nbytes, EXTENT_LADDER[-1]), blocks)


def _extent_keys(txn: ViewTransaction, file: DataFile, chunk_id: int) -> list[bytes]:
    """The keys of a chunk's extents, whatever its metadata says."""
    with txn.cursor(db=file.data) as cursor:
        if not cursor.set_range(meta_key(chunk_id)):
            return []
        keys = map(bytes, cursor.iternext(values=False))
        return list(takewhile(lambda key: id_of(key) == chunk_id, keys))


def _page_of(txn: ViewTransaction, file: DataFile, key: bytes) -> int:
    """The file's page that a value just put will begin in; NO_PAGE when LMDB does not say so.

    LMDB gives a large value its page number when it is put, in the header just before it. A wrong
    answer costs a slower read and nothing else.
    """
    value = txn.get(key, db=file.data)
    if value is None or value.nbytes < PAGE_BYTES:
        return NO_PAGE  # it may lie within a page of the tree
    address = np.frombuffer(value, np.uint8).__array_interface__["data"][0]
    start = ctypes.string_at(address - PAGE_HEADER_BYTES, PAGE_HEADER_BYTES)
    number, _, flags, pages = _PAGE_START.unpack(start)
    expected = -(-(value.nbytes + PAGE_HEADER_BYTES) // PAGE_BYTES)
    return number if flags & _OVERFLOW_PAGE and pages == expected else NO_PAGE


def _first(deletes: list[Record]) -> list[Record]:
    """As many of the deletes, from the first, as one transaction takes; at least one."""
    total = 0
    for count, record in enumerate(deletes):
        total += record.stored_bytes
        if count and total > _DELETED_PER_COMMIT:
            return deletes[:count]
    return list(deletes)
