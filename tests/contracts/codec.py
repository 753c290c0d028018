"""What every codec keeps."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.kernels.codecs import Codec, CodecError

# Several codecs inherit the same test; each of them is deterministic.
shared = settings(suppress_health_check=[HealthCheck.differing_executors])
ITEM_SIZES = st.sampled_from([1, 2, 3, 4, 8])


def kv_like(nbytes: int, itemsize: int, seed: int) -> bytes:
    """Bytes that look like keys and values: floats around one scale, truncated to `itemsize`."""
    rng = np.random.default_rng(seed)
    wide = rng.standard_normal(nbytes // itemsize + 1).astype("<f8").view(np.uint8).reshape(-1, 8)
    return wide[:, 8 - itemsize :].tobytes()[:nbytes]


class CodecContract:
    """Subclass it and make the codec."""

    def make(self) -> Codec:
        raise NotImplementedError

    def encoded(self, source: bytes, itemsize: int) -> bytes:
        return b"".join(map(bytes, self.make().encode(memoryview(source), itemsize)))

    def decoded(self, encoded: bytes, nbytes: int, itemsize: int) -> bytes:
        """Decodes between guards, which must stay as they are."""
        guarded = bytearray(b"\xa5" * (nbytes + 64))
        try:
            self.make().decode(memoryview(encoded), memoryview(guarded)[32 : 32 + nbytes], itemsize)
        finally:
            assert guarded[:32] + guarded[-32:] == b"\xa5" * 64
        return bytes(guarded[32:-32])

    @shared
    @given(st.binary(max_size=400), ITEM_SIZES)
    def test_any_bytes_come_back(self, source: bytes, itemsize: int) -> None:
        encoded = self.encoded(source, itemsize)
        assert self.decoded(encoded, len(source), itemsize) == source
        assert len(encoded) <= self.make().most_bytes(len(source), itemsize)

    @shared
    @given(st.integers(0, 70_000), ITEM_SIZES, st.integers(0, 99))
    def test_keys_and_values_of_odd_lengths_come_back(
        self, nbytes: int, itemsize: int, seed: int
    ) -> None:
        source = kv_like(nbytes, itemsize, seed)
        encoded = self.encoded(source, itemsize)
        assert self.decoded(encoded, nbytes, itemsize) == source
        assert len(encoded) <= self.make().most_bytes(nbytes, itemsize)

    @pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
    def test_a_whole_block_comes_back(self, itemsize: int) -> None:
        codec = self.make()
        source = kv_like(codec.block_bytes, itemsize, 7)
        assert self.decoded(self.encoded(source, itemsize), len(source), itemsize) == source

    def test_the_source_may_be_read_only_and_the_target_any_writable_buffer(self) -> None:
        source = kv_like(5_000, 2, 1)
        target = np.zeros(5_000, np.uint8)
        encoded = self.encoded(source, 2)
        self.make().decode(memoryview(encoded), target.data, 2)
        assert target.tobytes() == source

    @shared
    @given(st.integers(1, 3_000), ITEM_SIZES, st.data())
    def test_a_truncated_or_extended_block_is_refused(
        self, nbytes: int, itemsize: int, data: st.DataObject
    ) -> None:
        encoded = self.encoded(kv_like(nbytes, itemsize, 3), itemsize)
        cut = encoded[: data.draw(st.integers(0, len(encoded) - 1))]
        with pytest.raises(CodecError):
            self.decoded(cut, nbytes, itemsize)
        with pytest.raises(CodecError):
            self.decoded(encoded + b"\0", nbytes, itemsize)

    @shared
    @given(st.integers(1, 3_000), ITEM_SIZES, st.data())
    def test_garbled_bytes_are_refused_or_stay_in_bounds(
        self, nbytes: int, itemsize: int, data: st.DataObject
    ) -> None:
        encoded = bytearray(self.encoded(kv_like(nbytes, itemsize, 3), itemsize))
        for _ in range(data.draw(st.integers(1, 8))):
            encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
        with suppress(CodecError):
            self.decoded(bytes(encoded), nbytes, itemsize)

    @shared
    @given(st.binary(max_size=300), st.integers(0, 300), ITEM_SIZES)
    def test_noise_is_refused_or_stays_in_bounds(
        self, noise: bytes, nbytes: int, itemsize: int
    ) -> None:
        with suppress(CodecError):
            self.decoded(noise, nbytes, itemsize)
