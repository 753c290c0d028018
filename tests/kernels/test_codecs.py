"""The lossless codecs."""

import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import zstandard

from kvtier.errors import ConfigError
from kvtier.kernels.codecs import Codec, CodecError, codec_by_id, codec_by_name, codec_names
from kvtier.kernels.codecs.byteplane import BytePlaneCodec
from kvtier.kernels.codecs.raw import RawCodec
from tests.contracts.codec import CodecContract, kv_like


class TestRaw(CodecContract):
    def make(self) -> Codec:
        return RawCodec()


class TestBytePlane(CodecContract):
    def make(self) -> Codec:
        return BytePlaneCodec()

    @pytest.mark.parametrize(("itemsize", "most"), [(2, 0.75), (4, 0.9), (8, 0.96)])
    def test_floats_shrink(self, itemsize: int, most: float) -> None:
        source = kv_like(BytePlaneCodec.block_bytes, itemsize, 5)
        assert len(self.encoded(source, itemsize)) < most * len(source)

    def test_a_frame_that_promises_more_than_the_plane_is_never_expanded(self) -> None:
        bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
        encoded = struct.pack("<I", len(bomb)) + bomb
        with pytest.raises(CodecError, match="does not hold"):
            self.decoded(encoded, 1 << 20, 1)

    def test_a_frame_without_a_size_is_refused(self) -> None:
        compressor = zstandard.ZstdCompressor(write_content_size=False)
        frame = compressor.compress(bytes(4096))
        with pytest.raises(CodecError):
            self.decoded(struct.pack("<I", len(frame)) + frame, 4096, 1)

    def test_one_codec_serves_several_threads(self) -> None:
        codec = self.make()
        sources = [kv_like(200_000 + index, 2, index) for index in range(8)]

        def roundtrip(source: bytes) -> bool:
            target = bytearray(len(source))
            encoded = b"".join(map(bytes, codec.encode(memoryview(source), 2)))
            codec.decode(memoryview(encoded), memoryview(target), 2)
            return target == source

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(roundtrip, sources * 4))


def test_numbers_on_disk_never_change() -> None:
    assert {number: codec.name for number, codec in codec_by_id().items()} == {
        0: "none",
        1: "byteplane",
    }


def test_codecs_are_found_by_name() -> None:
    assert [codec_by_name(name).name for name in codec_names()] == codec_names()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="byteplane"):
        codec_by_name("gzip")
