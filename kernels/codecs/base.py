"""What a codec is: a lossless transform of one block of chunk bytes, named on disk by a number."""

from collections.abc import Sequence
from typing import ClassVar, Protocol


class CodecError(ValueError):
    """Encoded bytes are malformed; the target's content is undefined."""


class Codec(Protocol):
    """Encodes and decodes one block at a time. Safe to call from several threads at once.

    `id` is written to disk: it is never reused for another meaning, not even when a codec goes.
    `block_bytes` is how much source the codec likes to be given at once (a multiple of 8); any
    length works. A codec with `verbatim` encodes every block to itself, so that a reader may put
    the bytes straight where they belong.
    """

    id: ClassVar[int]
    name: ClassVar[str]
    block_bytes: ClassVar[int]
    verbatim: ClassVar[bool]

    def encode(self, source: memoryview, itemsize: int) -> Sequence[bytes | memoryview]:
        """The encoded block in pieces, to be joined in order.

        `itemsize` is the bytes of one element. Pieces may refer to `source`.
        """
        ...

    def decode(self, encoded: memoryview, target: memoryview, itemsize: int) -> None:
        """Write exactly `target.nbytes` bytes. Raises CodecError when `encoded` is malformed."""
        ...

    def most_bytes(self, nbytes: int, itemsize: int) -> int:
        """The most that a block of `nbytes` can take once encoded."""
        ...
