"""Tables of counts as bytes, for the next run: a header, then halves of float32, zlibbed.

    magic "kvtG" | version u8 | bins u8 | classes u16 | tables u8 | rows u16 | CRC-32 of the rest

Numbers are little endian. Half a float32 keeps two digits, and a count needs no more.
"""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvtier.tiers.policies.classes import BINS

_HEADER = struct.Struct("<4sBBHBHI")
_MAGIC = b"kvtG"
_VERSION = 1
_MOST = 1e15  # a count above this was not counted

Table = npt.NDArray[np.float64]


def encode(tables: Sequence[Table], classes: int) -> bytes:
    """Tables of one shape, [rows, BINS], of finite counts; `classes` rows are one label's."""
    stacked = np.stack(tables).astype("<f4")
    body = zlib.compress((stacked.view("<u4") >> 16).astype("<u2").tobytes(), 1)
    rows = stacked.shape[1]
    header = _HEADER.pack(_MAGIC, _VERSION, BINS, classes, len(tables), rows, zlib.crc32(body))
    return header + body


def decode(encoded: bytes, tables: int, classes: int, labels: int) -> list[Table] | None:
    """What `encode` was given, to two digits; None unless it is just that: so many tables, of the
    rows of at most so many labels."""
    if len(encoded) < _HEADER.size:
        return None
    magic, version, bins, *shape, rows, checksum = _HEADER.unpack_from(encoded)
    body = encoded[_HEADER.size :]
    if (magic, version, bins, shape) != (_MAGIC, _VERSION, BINS, [classes, tables]):
        return None
    if rows % classes or not 0 < rows <= labels * classes or zlib.crc32(body) != checksum:
        return None
    raw = _inflated(body, tables * rows * BINS * 2)
    if raw is None:
        return None
    halves = np.frombuffer(raw, "<u2").astype("<u4") << 16
    counts = halves.view("<f4").astype(np.float64).reshape(tables, rows, BINS)
    if not (np.isfinite(counts).all() and (counts >= 0).all() and (counts <= _MOST).all()):
        return None
    return list(counts)


def _inflated(body: bytes, size: int) -> bytes | None:
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(body, size)
        whole = len(raw) == size and not inflate.decompress(inflate.unconsumed_tail, 1)
    except zlib.error:
        return None
    return raw if whole and inflate.eof else None
