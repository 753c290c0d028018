"""Opening the disk tier's data file, and finding out whether it can be trusted.

A damaged file never keeps the service from starting: it is moved aside and the tier starts empty.
"""

import logging
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import lmdb
from lmdb.verify import VerifyError, verify

from kvtier.chunks import ChunkKey
from kvtier.errors import ConfigError, InvalidRequest
from kvtier.spaces import Space
from kvtier.tiers.base import Record
from kvtier.tiers.disk_directory import OwnedDirectory
from kvtier.tiers.disk_format import (
    FORMAT_VERSION,
    PAGE_BYTES,
    DamagedRecord,
    id_of,
    pack_number,
    unpack_header,
    unpack_number,
)

_log = logging.getLogger(__name__)

# The class of the C extension takes no parameters at run time.
BytesTransaction: TypeAlias = "lmdb.Transaction[bytes]"
ViewTransaction: TypeAlias = "lmdb.Transaction[memoryview]"

DATA_FILE = "data.mdb"
READERS_FILE = "data.mdb-lock"  # LMDB's table of readers
# Left by a writer that met damage, for the next start.
DAMAGED_MARK = "DAMAGED"
VERSION_KEY = b"version"
NEXT_ID_KEY = b"next_id"
STARTS_KEY = b"starts"

# LMDB never writes pages that a transaction took and gave back, so its file may end a little before
# the last page it speaks of. More than this is a truncation.
_MOST_MISSING_BYTES = 64 << 20
_READERS = 128
_SWEPT_PER_COMMIT = 512
_SUSPICIOUS_DEATHS = 2
_MOST_DEATHS = 8
# What speaks of the medium or of permissions, not of the file's content.
_NOT_DAMAGE = (lmdb.DiskError, lmdb.LockError, lmdb.ReadonlyError, lmdb.ReadersFullError)


class DamagedFile(Exception):
    """The data file cannot be trusted as a whole."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """An open LMDB environment and its databases, with what a start-up reads of it."""

    env: lmdb.Environment
    head: Any  # lmdb._Database has no public name
    spaces: Any
    meta: Any
    data: Any
    path: Path

    def close(self) -> None:
        """Close the environment; no transaction may be open."""
        self.env.close()


@dataclass(slots=True)
class Survivors:
    """What metadata alone says of the last run."""

    records: dict[int, Record]
    spaces: dict[bytes, Space]
    next_id: int
    extents: int
    damaged: int  # metadata records that were not what was written


def open_or_start_empty(owned: OwnedDirectory, map_bytes: int) -> tuple[DataFile, Survivors]:
    """Open the directory's data file; move a damaged one aside and start a new one.

    Raises ConfigError for another format version, or when the directory cannot be used.
    """
    directory = owned.path
    (directory / READERS_FILE).unlink(missing_ok=True)  # of a dead process: we are alone here
    mark = directory / DAMAGED_MARK
    try:
        if mark.exists():
            raise DamagedFile("the last run met damage while writing")
        if owned.deaths >= _SUSPICIOUS_DEATHS:
            _verify(directory / DATA_FILE, owned.deaths)
        return open_data_file(directory / DATA_FILE, map_bytes)
    except (*_NOT_DAMAGE, OSError) as error:
        raise ConfigError(f"disk.directory: {directory}: {error}") from None
    except (DamagedFile, DamagedRecord, lmdb.Error) as error:
        _log.warning("disk tier starts empty: its file is moved aside as damaged: %s", error)
    _move_aside(directory)
    mark.unlink(missing_ok=True)
    try:
        return open_data_file(directory / DATA_FILE, map_bytes)
    except (DamagedFile, DamagedRecord, lmdb.Error, OSError) as error:
        raise ConfigError(f"disk.directory: {directory}: no new file: {error}") from None


def open_data_file(path: Path, map_bytes: int) -> tuple[DataFile, Survivors]:
    """Open one data file and read its metadata.

    Opened twice: reading all metadata maps many pages around it, which closing gives back.
    Raises DamagedFile, DamagedRecord or lmdb.Error when it cannot be trusted, ConfigError when it
    is sound but of another format version.
    """
    file = _open(path, map_bytes)
    try:
        _check_version(file)
        found = _read_survivors(file)
    finally:
        file.close()
    return _open(path, map_bytes), found


def _open(path: Path, map_bytes: int) -> DataFile:
    """Open the environment and make sure of its length and page size."""
    env = lmdb.open(
        str(path),
        map_size=map_bytes,
        subdir=False,
        mode=0o600,
        # Values are read from the file; what LMDB touches itself are single pages of trees.
        readahead=False,
        max_dbs=4,
        max_readers=_READERS,
        lib_version=0,
    )
    try:
        _settle_length(env, path, map_bytes)
        if env.stat()["psize"] != PAGE_BYTES:
            raise ConfigError(f"{path} has pages of {env.stat()['psize']} bytes, not {PAGE_BYTES}")
        head, spaces, meta, data = map(env.open_db, (b"head", b"spaces", b"meta", b"data"))
        return DataFile(env, head, spaces, meta, data, path)
    except BaseException:
        env.close()
        raise


def _verify(path: Path, deaths: int) -> None:
    """Check all of LMDB's own pages, which takes seconds: some damage makes LMDB abort or hang.

    Raises DamagedFile when something is wrong, or when too many have died in spite of it.
    """
    if not path.exists():
        return
    try:
        problems = verify(str(path), subdir=False)  # type: ignore[no-untyped-call]
    except VerifyError as error:
        problems = [str(error)]
    _log.warning("disk tier: %d processes died of %s; found: %s", deaths, path, problems[:3])
    if problems or deaths >= _MOST_DEATHS:
        raise DamagedFile(f"{deaths} processes in a row died opening or writing it")


def _settle_length(env: lmdb.Environment, path: Path, map_bytes: int) -> None:
    """Make the file as long as the map, with a hole at its end.

    Touching a mapped page past the end of the file is SIGBUS, and a damaged tree may lead there.
    """
    missing = taken_bytes(env) - path.stat().st_size
    if missing > _MOST_MISSING_BYTES:
        raise DamagedFile(f"{missing} of {taken_bytes(env)} bytes are missing at its end")
    os.truncate(path, max(map_bytes, taken_bytes(env)))


def taken_bytes(env: lmdb.Environment) -> int:
    """Where the last page lies that LMDB ever used; the file cannot be cut before it."""
    return (env.info()["last_pgno"] + 1) * PAGE_BYTES


def _check_version(file: DataFile) -> None:
    """Stamp a new file, refuse one of another version.

    Counting the start is a write, so that a damaged list of free pages is found out now.
    """
    with file.env.begin(db=file.head) as txn:
        packed, starts = txn.get(VERSION_KEY), txn.get(STARTS_KEY)
    if packed is not None and (found := unpack_number(packed)) != FORMAT_VERSION:
        raise ConfigError(
            f"disk.directory: {file.path} has format version {found}, this build reads"
            f" {FORMAT_VERSION}: name another directory, or delete this one to start empty"
        )
    try:
        with file.env.begin(write=True, db=file.head) as txn:
            txn.put(VERSION_KEY, pack_number(FORMAT_VERSION))
            txn.put(STARTS_KEY, pack_number(1 + (unpack_number(starts) if starts else 0)))
    except (lmdb.MapFullError, lmdb.DiskError) as error:
        if packed is None:
            raise
        _log.warning("disk tier: no room to write: %s", error)


def _read_survivors(file: DataFile) -> Survivors:
    with file.env.begin() as txn:
        spaces = _read_spaces(txn, file)
        packed = txn.get(NEXT_ID_KEY, db=file.head)
        found = Survivors({}, spaces, unpack_number(packed) if packed else 1, 0, 0)
        interned: dict[bytes, bytes] = {digest: digest for digest in spaces}
        for key, value in txn.cursor(db=file.meta):
            _read_record(found, interned, key, value)
        stray = txn.stat(db=file.meta)["entries"] != len(found.records)
        stray |= txn.stat(db=file.data)["entries"] != found.extents
    if stray:
        _sweep(file, found)
    return found


def _read_spaces(txn: BytesTransaction, file: DataFile) -> dict[bytes, Space]:
    """Spaces by digest; one whose content does not give its digest is left out."""
    spaces = {}
    for digest, encoded in txn.cursor(db=file.spaces):
        try:
            space = Space.from_json(encoded)
        except InvalidRequest:
            continue
        if space.digest == digest:
            spaces[digest] = space
    return spaces


def _read_record(found: Survivors, interned: dict[bytes, bytes], key: bytes, value: bytes) -> None:
    chunk_id = id_of(key)
    try:
        if chunk_id is None:
            raise DamagedRecord("a metadata key is damaged")
        header = unpack_header(chunk_id, value)
    except DamagedRecord:
        found.damaged += 1
        return
    if header.space not in found.spaces:
        found.damaged += 1
        return
    # A parent is another chunk's key: one object for both halves what the index holds.
    found.records[chunk_id] = Record(
        id=chunk_id,
        key=ChunkKey(interned.setdefault(header.key, header.key)),
        parent=ChunkKey(interned.setdefault(header.parent, header.parent)),
        space=interned[header.space],
        stored_bytes=header.charged,
        created_s=header.created_s,
    )
    found.extents += header.extents
    found.next_id = max(found.next_id, chunk_id + 1)


def _sweep(file: DataFile, found: Survivors) -> None:
    """Delete what no surviving record accounts for; it would take room for ever."""
    swept = 0
    for db in (file.meta, file.data):
        doomed = [b""]
        while doomed:
            try:
                with file.env.begin(write=True, db=db) as txn:
                    doomed = _strays(txn, doomed[-1], found)
                    for key in doomed:
                        txn.delete(key)
            except (lmdb.MapFullError, lmdb.DiskError):
                break  # the next start tries again
            swept += len(doomed)
    _log.warning("disk tier: %d stray values of damaged chunks were deleted", swept)


def _strays(txn: BytesTransaction, start: bytes, found: Survivors) -> list[bytes]:
    """The next keys from `start` that belong to no record; as many as one transaction takes."""
    cursor = txn.cursor()
    if not (cursor.set_range(start) if start else cursor.first()):
        return []
    keys = (key for key in cursor.iternext(values=False) if id_of(key) not in found.records)
    return list(islice(keys, _SWEPT_PER_COMMIT))


def _move_aside(directory: Path) -> None:
    """Rename the data file, keeping no older damaged one."""
    (directory / READERS_FILE).unlink(missing_ok=True)
    if not (directory / DATA_FILE).exists():
        return
    earlier = list(directory.glob(f"{DATA_FILE}.damaged-*"))
    numbers = [int(text) for path in earlier if (text := path.name.rpartition("-")[2]).isdigit()]
    aside = directory / f"{DATA_FILE}.damaged-{max(numbers, default=0) + 1}"
    (directory / DATA_FILE).rename(aside)
    for path in earlier:
        path.unlink()
