"""How the elements of a chunk may be encoded, and where the bytes of an encoded one lie.

"exact" is the array of elements itself. The others are quantised as `kernels/quantised.py` says,
and their names say all that decides the bytes:

    encoding        code     keys' group        values' group
    kivi-int8       8 bits   all tokens         the head_dim channels of a token
    kivi-int4-g32   4 bits   32 tokens          the same
    The last group of keys is shorter where the tokens do not fill it.

A quantised chunk has a record for each layer and head, layers outermost. A record has these arrays
in C order, each beginning at a multiple of 16 bytes, little-endian; what is between them is
undefined:

    codes of keys      [tokens, row]       uint8; int8: row = head_dim; int4: row = head_dim / 2,
    codes of values    [tokens, row]       rounded up, the even channel in the low half
    minima of keys     [groups, head_dim]  the layout's dtype
    minima of values   [tokens]            the layout's dtype
    scales of keys     [groups, head_dim]  bfloat16
    scales of values   [tokens]            bfloat16
"""

from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Self

EXACT = "exact"
QUANTISED_DTYPES = ("float32", "float16", "bfloat16")
INT4_GROUP_TOKENS = 32
RECORD_ALIGNMENT = 16
_SCALE_BYTES = 2


class Scheme(Enum):
    """How a chunk is quantised; the value is the encoding's name."""

    INT8 = "kivi-int8"
    INT4 = "kivi-int4-g32"

    @property
    def bits(self) -> int:
        """Of one code."""
        return 8 if self is Scheme.INT8 else 4

    def group_tokens(self, tokens: int) -> int:
        """Most tokens over which a channel of the keys has one scale, in a chunk of so many."""
        return tokens if self is Scheme.INT8 else INT4_GROUP_TOKENS

    def groups(self, tokens: int) -> int:
        """Groups of keys in a chunk of so many tokens."""
        return -(-tokens // self.group_tokens(tokens))

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of the codes of one token and head."""
        return -(-head_dim * self.bits // 8)


ENCODINGS = (EXACT, *(scheme.value for scheme in Scheme))


@dataclass(frozen=True, slots=True)
class Record:
    """Where the arrays of one layer and head begin in its record, and its size, in bytes."""

    key_codes: int
    value_codes: int
    key_minima: int
    value_minima: int
    key_scales: int
    value_scales: int
    nbytes: int

    @classmethod
    def of(cls, scheme: Scheme, *, tokens: int, head_dim: int, itemsize: int) -> Self:
        """The record of a chunk of so many tokens; `itemsize` is the bytes of an element."""
        groups = scheme.groups(tokens)
        sizes = (
            *(tokens * scheme.row_bytes(head_dim),) * 2,
            groups * head_dim * itemsize,
            tokens * itemsize,
            groups * head_dim * _SCALE_BYTES,
            tokens * _SCALE_BYTES,
        )
        aligned = (-(-size // RECORD_ALIGNMENT) * RECORD_ALIGNMENT for size in sizes)
        return cls(*accumulate(aligned, initial=0))
