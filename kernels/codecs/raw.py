"""The codec that leaves bytes as they are."""

from typing import ClassVar

from kvtier.kernels.codecs.base import CodecError


class RawCodec:
    """Encoded bytes are the bytes."""

    id: ClassVar[int] = 0
    name: ClassVar[str] = "none"
    block_bytes: ClassVar[int] = 1 << 20
    verbatim: ClassVar[bool] = True

    def encode(self, source: memoryview, itemsize: int) -> list[memoryview]:
        return [source]

    def decode(self, encoded: memoryview, target: memoryview, itemsize: int) -> None:
        if encoded.nbytes != target.nbytes:
            raise CodecError(f"raw: {encoded.nbytes} bytes encoded, {target.nbytes} expected")
        target[:] = encoded

    def most_bytes(self, nbytes: int, itemsize: int) -> int:
        return nbytes
