"""Opening a data file that is larger than the capacity now configured.

LMDB never gives pages back to the file system, so the file is written anew with what fits.
"""

import heapq
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lmdb

from kvtier.errors import ConfigError
from kvtier.tiers.base import Record
from kvtier.tiers.disk_directory import OwnedDirectory
from kvtier.tiers.disk_file import (
    DATA_FILE,
    NEXT_ID_KEY,
    READERS_FILE,
    DamagedFile,
    DataFile,
    Survivors,
    ViewTransaction,
    open_data_file,
    open_or_start_empty,
    taken_bytes,
)
from kvtier.tiers.disk_format import (
    DamagedRecord,
    StoredChunk,
    extent_key,
    meta_key,
    pack_number,
)
from kvtier.tiers.disk_write import append, put_extents

_log = logging.getLogger(__name__)

_NEW_FILE = DATA_FILE + ".new"
_COPIED_PER_COMMIT = 32 << 20


def open_within(
    owned: OwnedDirectory, map_bytes: int, budget_bytes: int
) -> tuple[DataFile, Survivors]:
    """Open the directory's data file, at most `map_bytes` long.

    A longer one is copied with as many chunks as fit in `budget_bytes`; where that fails, for want
    of space say, the tier starts empty. Raises ConfigError as `open_or_start_empty`.
    """
    directory = owned.path
    _remove_new(directory)
    file, found = open_or_start_empty(owned, map_bytes)
    size = taken_bytes(file.env)
    if size <= map_bytes:
        return file, found
    _log.warning("disk tier: %s takes %d bytes, %d allowed: copying it", file.path, size, map_bytes)
    try:
        _copy_to_new(directory, file, found, map_bytes, list(_fitting(found.records, budget_bytes)))
        file.close()
        (directory / _NEW_FILE).replace(directory / DATA_FILE)
    except (lmdb.Error, OSError, DamagedFile, ConfigError) as error:
        _log.warning("disk tier starts empty: %s could not be copied: %s", file.path, error)
        file.close()
        file.path.unlink()
    _remove_new(directory)
    (directory / READERS_FILE).unlink(missing_ok=True)
    return open_or_start_empty(owned, map_bytes)


def _fitting(records: dict[int, Record], budget_bytes: int) -> Iterator[Record]:
    """What is left in `budget_bytes` when leaves are given up first, the oldest of them first."""
    by_key = {record.key: record for record in records.values()}
    children = Counter(record.parent for record in records.values())
    leaves = [record.id for record in records.values() if not children[record.key]]
    heapq.heapify(leaves)
    used = sum(record.stored_bytes for record in records.values())
    dropped: set[int] = set()
    while used > budget_bytes:
        record = records[heapq.heappop(leaves)]
        dropped.add(record.id)
        used -= record.stored_bytes
        parent = by_key.get(record.parent)
        children[record.parent] -= 1
        if parent is not None and not children[record.parent]:
            heapq.heappush(leaves, parent.id)
    return (record for record in records.values() if record.id not in dropped)


def _copy_to_new(
    directory: Path, file: DataFile, found: Survivors, map_bytes: int, keep: list[Record]
) -> None:
    new, _ = open_data_file(directory / _NEW_FILE, map_bytes)
    try:
        with new.env.begin(write=True) as txn:
            txn.put(NEXT_ID_KEY, pack_number(found.next_id), db=new.head)
            for digest, space in found.spaces.items():
                txn.put(digest, space.to_json(), db=new.spaces)
        for batch in _batches(keep):
            with (
                file.env.begin(buffers=True) as source,
                new.env.begin(write=True, buffers=True) as target,
            ):
                for record in batch:
                    _copy(record.id, file, source, new, target)
    finally:
        new.close()


def _copy(
    chunk_id: int,
    file: DataFile,
    source: ViewTransaction,
    new: DataFile,
    target: ViewTransaction,
) -> None:
    """Copy one chunk as it is stored; a damaged one is left behind."""
    try:
        chunk = StoredChunk.unpack(
            chunk_id, bytes(source.get(meta_key(chunk_id), b"", db=file.meta))
        )
    except DamagedRecord:
        return
    values = [
        source.get(extent_key(chunk_id, number), db=file.data)
        for number in range(len(chunk.extents))
    ]
    present = [value for value in values if value is not None]
    if len(present) < len(values):
        return
    written = put_extents(target, new, chunk_id, present)
    # The checksums stay those of the bytes once stored, so that damage on the way is seen.
    extents = tuple(
        old._replace(page=placed.page) for old, placed in zip(chunk.extents, written, strict=True)
    )
    packed = StoredChunk(chunk.header, extents, chunk.blocks).pack(chunk_id)
    append(target, meta_key(chunk_id), packed, new.meta)


def _batches(records: list[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if sum(each.stored_bytes for each in batch) >= _COPIED_PER_COMMIT:
            yield batch
            batch = []
    yield batch


def _remove_new(directory: Path) -> None:
    """Remove what an interrupted copy left."""
    for name in (_NEW_FILE, _NEW_FILE + "-lock"):
        (directory / name).unlink(missing_ok=True)
