"""What benchmarks move: chunks of a given size, filled and touched, and prompts to name them by."""

import numpy as np
from numpy.typing import NDArray

from kvtier.errors import KvtierError
from kvtier.spaces import Layout, Space

MIB = 1 << 20
TOKENS = 256
_HEAD_DIM = 128
# Bytes of one layer with one head: the step in which a chunk's size can be chosen.
_STEP_BYTES = 2 * 2 * _HEAD_DIM * TOKENS

Buffer = NDArray[np.uint8]


class WrongBytes(KvtierError):
    """A chunk came back with other bytes than were stored. No figure of such a run counts."""


def space_for(chunk_mib: float) -> Space:
    """A space whose chunks have about that size: bfloat16, 256 tokens, in steps of 128 KiB."""
    layers = max(1, round(chunk_mib * MIB / _STEP_BYTES))
    layout = Layout(dtype="bfloat16", layers=layers, heads=1, head_dim=_HEAD_DIM, tokens=TOKENS)
    return Space("kvtier-bench", layout)


def token_ids(count: int, seed: int) -> list[int]:
    """A prompt as a tokenizer gives it: a list of Python integers."""
    generator = np.random.default_rng(seed)
    ids: list[int] = generator.integers(0, 128_000, count).tolist()
    return ids


def filled(count: int, nbytes: int, seed: int) -> list[Buffer]:
    """Buffers of random bytes, every page of them touched."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, nbytes, np.uint8) for _ in range(count)]


def blank(count: int, nbytes: int) -> list[Buffer]:
    """Buffers to copy into, every page of them touched."""
    return [np.full(nbytes, 0x55, np.uint8) for _ in range(count)]


def renew(buffers: list[Buffer]) -> None:
    """Change every word in place, so that nothing left of an earlier round can pass for it."""
    for buffer in buffers:
        words = buffer[: buffer.nbytes // 8 * 8].view(np.uint64)
        words += np.uint64(0x0101_0101_0101_0101)


def kv_like(count: int, nbytes: int, seed: int) -> list[Buffer]:
    """bfloat16 gaussians with a scale per channel, as keys and values are: exponents that compress,
    mantissas that do not."""
    generator = np.random.default_rng(seed)
    scales = np.exp(generator.standard_normal(_HEAD_DIM, np.float32))
    chunks = []
    for _ in range(count):
        values = generator.standard_normal((nbytes // 2 // _HEAD_DIM, _HEAD_DIM), np.float32)
        values *= scales
        chunks.append((values.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(-1))
    return chunks


def check_same(got: list[Buffer], expected: list[Buffer]) -> None:
    """Raises WrongBytes naming the first chunk that is not what was stored."""
    for index, (mine, right) in enumerate(zip(got, expected, strict=True)):
        if not np.array_equal(mine, right):
            raise WrongBytes(f"chunk {index} came back with other bytes than were stored")
