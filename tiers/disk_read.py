"""Reading one chunk from the data file, each byte checked before it is believed.

LMDB says which chunks exist, and keeps their pages from being reused while a read transaction is
open. The bytes themselves are read from the file at the place the metadata remembers: a mapped
value would be faulted in page by page, would swell the process, and would be SIGBUS where the
medium fails. What is in the page cache is copied from there, the rest is read past it (O_DIRECT):
filling the cache takes several times the processor time, which engines beside us need, and the RAM
tier is the cache. The place is a hint: when the bytes there do not match the checksum, LMDB is
asked for the value.
"""

import logging
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
from xxhash import xxh3_64_intdigest as checksum_of

from kvtier.kernels.codecs import Codec, CodecError
from kvtier.kernels.page_cache import Residency
from kvtier.tiers.base import Outcome, Record
from kvtier.tiers.disk_file import BytesTransaction, DataFile
from kvtier.tiers.disk_format import (
    EXTENT_BYTES,
    NO_PAGE,
    PAGE_BYTES,
    PAGE_HEADER_BYTES,
    DamagedRecord,
    Extent,
    StoredChunk,
    extent_key,
    meta_key,
)

_log = logging.getLogger(__name__)


class ReadersAtWork:
    """Which reads are under way, so that the writer can wait until older ones have ended.

    LMDB cannot reuse a page that a reader may still look at.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._active: set[object] = set()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold around a read transaction."""
        token = object()
        with self._changed:
            self._active.add(token)
        try:
            yield
        finally:
            with self._changed:
                self._active.discard(token)
                self._changed.notify_all()

    def wait_for_current(self, timeout_s: float) -> None:
        """Return when every read that is under way now has ended, or the time is over."""
        with self._changed:
            before = set(self._active)
            self._changed.wait_for(lambda: not before & self._active, timeout_s)


class ChunkReader:
    """Loads chunks on whatever thread calls it; one may be used by several threads at once."""

    def __init__(self, file: DataFile, codecs: dict[int, Codec], readers: ReadersAtWork) -> None:
        self._file = file
        self._codecs = codecs
        self._readers = readers
        self._fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct = _open_direct(file.path)
        self._residency = Residency(self._fd)
        self._bytes = os.fstat(self._fd).st_size
        self._scratch = threading.local()

    def close(self) -> None:
        """Close the file; no load may be under way."""
        self._residency.close()
        os.close(self._fd)
        if self._direct is not None:
            os.close(self._direct)

    def load(self, record: Record, into: memoryview) -> Outcome:
        """Fill `into` with the chunk. `into` is undefined unless the outcome is HIT."""
        try:
            if self._truncated():
                return Outcome.FAILED
            with self._readers.reading(), self._file.env.begin() as txn:
                packed = txn.get(meta_key(record.id), db=self._file.meta)
                if packed is None:
                    return Outcome.MISS
                chunk = StoredChunk.unpack(record.id, packed)
                return self._load(txn, record, chunk, into)
        except (DamagedRecord, CodecError, lmdb.CorruptedError, lmdb.PageNotFoundError) as error:
            _log.warning("disk tier: chunk %s is corrupt: %s", record.key.hex(), error)
            return Outcome.CORRUPT
        except (OSError, lmdb.Error) as error:
            _log.warning("disk tier: chunk %s cannot be read: %s", record.key.hex(), error)
            return Outcome.FAILED

    def _truncated(self) -> bool:
        """Has somebody cut the file while it is mapped? It never gets shorter by itself."""
        size = os.fstat(self._fd).st_size
        if size >= self._bytes:
            return False
        _log.error("disk tier: %s was truncated while in use", self._file.path)
        return True

    def _load(
        self, txn: BytesTransaction, record: Record, chunk: StoredChunk, into: memoryview
    ) -> Outcome:
        header = chunk.header
        codec = self._codecs.get(header.codec)
        if header.key != record.key or header.nbytes != into.nbytes or codec is None:
            raise DamagedRecord("its metadata is another chunk's")
        if codec.verbatim:
            start = 0
            for number, extent in enumerate(chunk.extents):
                target = into[start : start + extent.nbytes]
                self._read_extent(txn, record.id, number, extent, target)
                start += extent.nbytes
            if start != into.nbytes:
                raise DamagedRecord("its extents do not add up")
            return Outcome.HIT
        self._decode(txn, record.id, chunk, codec, into)
        return Outcome.HIT

    def _decode(
        self,
        txn: BytesTransaction,
        chunk_id: int,
        chunk: StoredChunk,
        codec: Codec,
        into: memoryview,
    ) -> None:
        """Decode block after block from a window over the extents, which blocks ignore."""
        itemsize = chunk.header.itemsize
        most = codec.most_bytes(codec.block_bytes, itemsize)
        window = self._window(EXTENT_BYTES + most)
        extents = iter(enumerate(chunk.extents))
        begin = end = start = 0
        for length in chunk.blocks:
            while end - begin < length:
                number, extent = next(extents, (0, None))
                if extent is None or end - begin + extent.nbytes > window.nbytes:
                    raise DamagedRecord("its extents do not add up")
                window[: end - begin] = window[begin:end]
                begin, end = 0, end - begin + extent.nbytes
                self._read_extent(txn, chunk_id, number, extent, window[end - extent.nbytes : end])
            target = into[start : start + codec.block_bytes]
            codec.decode(window[begin : begin + length], target, itemsize)
            begin += length
            start += target.nbytes
        if start != into.nbytes or begin != end:
            raise DamagedRecord("its blocks do not add up")

    def _window(self, nbytes: int) -> memoryview:
        """This thread's own scratch memory."""
        window: memoryview | None = getattr(self._scratch, "window", None)
        if window is None or window.nbytes < nbytes:
            window = self._scratch.window = memoryview(bytearray(nbytes))
        return window

    def _read_extent(
        self,
        txn: BytesTransaction,
        chunk_id: int,
        number: int,
        extent: Extent,
        target: memoryview,
    ) -> None:
        offset = extent.page * PAGE_BYTES + PAGE_HEADER_BYTES
        if extent.page != NO_PAGE and offset < self._bytes:
            got = self._read(target, offset)
            if got == extent.nbytes and checksum_of(target) == extent.checksum:
                return
        value = txn.get(extent_key(chunk_id, number), db=self._file.data)
        if value is None or len(value) != extent.nbytes:
            raise DamagedRecord(f"extent {number} is missing or has another length")
        target[:] = value
        if checksum_of(target) != extent.checksum:
            raise DamagedRecord(f"the checksum of extent {number} is wrong")

    def _read(self, target: memoryview, offset: int) -> int:
        """Fill `target` from the file; how many bytes there were."""
        if self._direct is None or self._residency.cached(offset, target.nbytes):
            return os.preadv(self._fd, [target], offset)
        start = offset // PAGE_BYTES * PAGE_BYTES
        skipped = offset - start
        pages = self._pages()[: -(-(skipped + target.nbytes) // PAGE_BYTES) * PAGE_BYTES]
        came = os.preadv(self._direct, [pages], start)
        part = pages[skipped : min(came, skipped + target.nbytes)]
        target[: part.nbytes] = part
        return part.nbytes

    def _pages(self) -> memoryview:
        """This thread's own page-aligned memory, for an extent and the page before it."""
        pages: memoryview | None = getattr(self._scratch, "pages", None)
        if pages is None:
            pages = self._scratch.pages = memoryview(mmap.mmap(-1, EXTENT_BYTES + 2 * PAGE_BYTES))
        return pages


def _open_direct(path: Path) -> int | None:
    """The file, to be read past the page cache; None where the file system does not have that."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None
