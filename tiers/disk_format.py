"""How a chunk is written on disk: the records, keys and sizes of the disk tier. Touches no file.

`docs/formats.md` describes the same in prose.
"""

import mmap
import struct
from dataclasses import dataclass
from typing import NamedTuple, Self

from xxhash import xxh3_64_intdigest as checksum_of

FORMAT_VERSION = 1

PAGE_BYTES = mmap.PAGESIZE  # LMDB takes the system's
# LMDB precedes a value that has pages of its own with a header. Less that, a full extent fills its
# pages exactly, so that freed extents and new ones fit each other.
PAGE_HEADER_BYTES = 16
EXTENT_BYTES = (1 << 20) - PAGE_HEADER_BYTES
# When free space is in pieces, smaller extents still find room.
EXTENT_LADDER = (
    EXTENT_BYTES,
    (1 << 17) - PAGE_HEADER_BYTES,
    (1 << 14) - PAGE_HEADER_BYTES,
)
NO_PAGE = 0  # page 0 is LMDB's own, so it never holds an extent

_HEADER = struct.Struct("<Q32s32s32sdQQIIBB2x")
_EXTENT = struct.Struct("<QQI")
_BLOCK_BYTES = 4
_CHECKED_FROM = 8
_ID = struct.Struct(">Q")
_EXTENT_KEY = struct.Struct(">QI")
_NUMBER = struct.Struct("<16sQQ")
_MAGIC = b"kvtier disk tier"

# LMDB keeps B-tree pages at least a quarter full; a node costs its header, key and, for an extent,
# the number of its first page.
_LEAST_FILL = 4
_EXTENT_NODE_BYTES = 30
_META_NODE_BYTES = 18


class DamagedRecord(Exception):
    """A metadata record is not what was written."""


class Header(NamedTuple):
    """The fixed part of a chunk's metadata record."""

    checksum: int  # xxh3_64 of the rest of the record, seeded with the id it is stored under
    key: bytes
    parent: bytes
    space: bytes  # digest
    created_s: float
    nbytes: int  # decoded
    charged: int  # bytes of the tier's capacity
    extents: int
    blocks: int
    codec: int
    itemsize: int


class Extent(NamedTuple):
    """One stored value of a chunk: consecutive bytes of its encoded form."""

    checksum: int  # xxh3_64 of the stored bytes
    page: int  # where LMDB put it: a hint, NO_PAGE when unknown
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk's metadata record, whole."""

    header: Header
    extents: tuple[Extent, ...]
    blocks: tuple[int, ...]  # encoded bytes of each block; empty for a verbatim codec

    def pack(self, chunk_id: int) -> bytes:
        """The record to store under `chunk_id`; the header's checksum is made here."""
        packed = b"".join(
            (
                _HEADER.pack(*self.header)[_CHECKED_FROM:],
                *(_EXTENT.pack(*extent) for extent in self.extents),
                struct.pack(f"<{len(self.blocks)}I", *self.blocks),
            )
        )
        return checksum_of(packed, chunk_id).to_bytes(_CHECKED_FROM, "little") + packed

    @classmethod
    def unpack(cls, chunk_id: int, packed: bytes) -> Self:
        """The record that `pack` wrote. Raises DamagedRecord for anything else."""
        header = unpack_header(chunk_id, packed)
        table = _HEADER.size + header.extents * _EXTENT.size
        extents = _EXTENT.iter_unpack(packed[_HEADER.size : table])
        return cls(
            header,
            tuple(Extent(*each) for each in extents),
            struct.unpack(f"<{header.blocks}I", packed[table:]),
        )


def unpack_header(chunk_id: int, packed: bytes) -> Header:
    """The fixed part of a record, after checking all of it. Raises DamagedRecord."""
    if len(packed) < _HEADER.size:
        raise DamagedRecord(f"chunk {chunk_id}: {len(packed)} bytes of metadata")
    header = Header(*_HEADER.unpack_from(packed))
    if header.checksum != checksum_of(memoryview(packed)[_CHECKED_FROM:], chunk_id):
        raise DamagedRecord(f"chunk {chunk_id}: the metadata's checksum is wrong")
    if len(packed) != _record_bytes(header.extents, header.blocks):
        raise DamagedRecord(f"chunk {chunk_id}: the metadata's length is wrong")
    return header


def meta_key(chunk_id: int) -> bytes:
    """Key of a chunk's metadata and start of its extents' keys; ids sort by age."""
    return _ID.pack(chunk_id)


def id_of(key: bytes) -> int | None:
    """The id in a metadata key or extent key; None for a key that we did not write."""
    if len(key) not in (_ID.size, _EXTENT_KEY.size):
        return None
    chunk_id: int = _ID.unpack_from(key)[0]
    return chunk_id


def extent_key(chunk_id: int, number: int) -> bytes:
    """Key of one extent of a chunk."""
    return _EXTENT_KEY.pack(chunk_id, number)


def pack_number(number: int) -> bytes:
    """A number for the head database, recognisable and checked."""
    return _NUMBER.pack(_MAGIC, number, checksum_of(_MAGIC, number))


def unpack_number(packed: bytes) -> int:
    """The number that `pack_number` wrote. Raises DamagedRecord for anything else."""
    if len(packed) == _NUMBER.size:
        magic, number, _ = _NUMBER.unpack(packed)
        if magic == _MAGIC and packed == pack_number(number):
            return int(number)
    raise DamagedRecord("a number of the head database is damaged")


def charge(extent_bytes: list[int], blocks: int) -> int:
    """The bytes of the file that a chunk takes: whole pages, and its share of the B-trees."""
    pages = sum(-(-(nbytes + PAGE_HEADER_BYTES) // PAGE_BYTES) for nbytes in extent_bytes)
    nodes = len(extent_bytes) * _EXTENT_NODE_BYTES
    nodes += _META_NODE_BYTES + _record_bytes(len(extent_bytes), blocks)
    return pages * PAGE_BYTES + nodes * _LEAST_FILL


def extent_sizes(nbytes: int, extent_bytes: int) -> list[int]:
    """How `nbytes` of encoded chunk are cut."""
    whole, rest = divmod(nbytes, extent_bytes)
    return [extent_bytes] * whole + [rest] * (rest > 0)


def _record_bytes(extents: int, blocks: int) -> int:
    return _HEADER.size + extents * _EXTENT.size + blocks * _BLOCK_BYTES
