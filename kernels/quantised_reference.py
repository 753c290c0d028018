"""Quantising and its inverse in NumPy, to the bit what the kernels do.

For an engine without a device: `encode` what is offloaded, `decode` what is loaded. The format is
in `kvtier/encodings.py`; its bounds and its source are in `quantised.py`. Every step is one float32
operation, in the kernels' order. A chunk's elements are of shape [layers, 2, heads, tokens,
head_dim]: float32, float16, or for bfloat16 its bits as uint16.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtier.encodings import Scheme
from kvtier.errors import InvalidRequest
from kvtier.kernels.quantised import scheme_and_record
from kvtier.spaces import Layout

Floats = NDArray[np.float32]
Words = NDArray[np.uint16]
Codes = NDArray[np.uint8]
Elements = NDArray[Any]

_HALF = np.float32(0.5)
_LEAST_SCALE = np.float32(2.0**-125)
_LARGEST = {
    "float32": np.float32(np.finfo(np.float32).max),
    "float16": np.float32(65504),
    "bfloat16": np.array([0x7F7F0000], np.uint32).view(np.float32)[0],
}


def encode(elements: Elements, layout: Layout) -> NDArray[np.uint8]:
    """The `layout.nbytes` bytes of a quantised chunk; those that mean nothing are 0.

    Raises InvalidRequest when the layout is exact or the elements are not a chunk's.
    """
    scheme, record = scheme_and_record(layout)
    shape, stored = layout.shape, _stored(layout.dtype)
    if elements.shape != shape or elements.dtype != stored:
        raise InvalidRequest(
            f"elements: {elements.dtype} of shape {elements.shape} given, a chunk of "
            f"{layout.dtype} is {stored} of shape {shape}"
        )
    chunk = np.zeros((layout.layers, layout.heads, record.nbytes), np.uint8)
    wide = widen(elements, layout.dtype)
    size = scheme.group_tokens(layout.tokens)
    starts = range(0, layout.tokens, size)
    for layer, head in np.ndindex(layout.layers, layout.heads):
        keys, values = wide[layer, :, head]
        groups = [_quantised(keys[start : start + size], 0, scheme) for start in starts]
        key_codes = np.concatenate([codes for codes, _, _ in groups])
        codes, minima, scales = _quantised(values, 1, scheme)
        for at, part in (
            (record.key_codes, _packed(key_codes, scheme)),
            (record.value_codes, _packed(codes, scheme)),
            (record.key_minima, narrow(np.stack([m for _, m, _ in groups]), layout.dtype)),
            (record.value_minima, narrow(minima, layout.dtype)),
            (record.key_scales, np.stack([s for _, _, s in groups])),
            (record.value_scales, scales),
        ):
            raw = np.frombuffer(part.tobytes(), np.uint8)
            chunk[layer, head, at : at + len(raw)] = raw
    return chunk.ravel()


def decode(chunk: NDArray[np.uint8] | memoryview, layout: Layout) -> Elements:
    """The elements that come back of a quantised chunk.

    Raises InvalidRequest when the layout is exact or the chunk is not of `layout.nbytes` bytes.
    """
    scheme, record = scheme_and_record(layout)
    chunk = np.frombuffer(chunk, np.uint8)
    if chunk.size != layout.nbytes:
        raise InvalidRequest(
            f"chunk: {chunk.size} bytes given, one of this layout has {layout.nbytes}"
        )
    records = chunk.reshape(layout.layers, layout.heads, record.nbytes)
    tokens, dim = layout.tokens, layout.head_dim
    groups, group = scheme.groups(tokens), np.arange(tokens) // scheme.group_tokens(tokens)
    wide = np.empty((layout.layers, 2, layout.heads, tokens, dim), np.float32)
    for layer, head in np.ndindex(layout.layers, layout.heads):
        one = records[layer, head]
        key_minima = _numbers(one, record.key_minima, groups * dim, layout.dtype)
        key_scales = _numbers(one, record.key_scales, groups * dim, "bfloat16")
        wide[layer, 0, head] = _dequantised(
            _unpacked(one, record.key_codes, layout, scheme),
            key_minima.reshape(groups, dim)[group],
            key_scales.reshape(groups, dim)[group],
            layout.dtype,
        )
        wide[layer, 1, head] = _dequantised(
            _unpacked(one, record.value_codes, layout, scheme),
            _numbers(one, record.value_minima, tokens, layout.dtype)[:, None],
            _numbers(one, record.value_scales, tokens, "bfloat16")[:, None],
            layout.dtype,
        )
    return narrow(wide, layout.dtype)


def widen(elements: Elements, dtype: str) -> Floats:
    """Elements of a dtype as float32, exactly."""
    if dtype == "bfloat16":
        return (elements.astype(np.uint32) << 16).view(np.float32)
    return elements.astype(np.float32)


def narrow(values: Floats, dtype: str) -> Elements:
    """Finite float32 as elements of a dtype that can hold them, to nearest even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(dtype)


def _quantised(values: Floats, axis: int, scheme: Scheme) -> tuple[Codes, Floats, Words]:
    """Codes, and minima and scales (bfloat16) over an axis of [tokens, head_dim]."""
    levels = np.float32(2**scheme.bits - 1)
    finite = np.isfinite(values)
    with np.errstate(all="ignore"):
        least = np.where(finite, values, np.float32(np.inf)).min(axis=axis)
        most = np.where(finite, values, np.float32(-np.inf)).max(axis=axis)
        minimum = np.where(least <= most, least, np.float32(0)) + np.float32(0)
        exact = (most * _HALF - minimum * _HALF) / (levels * _HALF)
        scale = np.maximum(exact, _LEAST_SCALE)
        bits = np.where(least < most, (scale.view(np.uint32) + 0xFFFF) >> 16, 0).astype(np.uint16)
        inverse = np.float32(1) / (widen(bits, "bfloat16") * _HALF)
        inverse = np.where(bits > 0, inverse, np.float32(0))
        halves = values * _HALF - np.expand_dims(minimum * _HALF, axis)
        steps = halves * np.expand_dims(inverse, axis)
        codes = np.rint(np.where(steps > 0, np.minimum(steps, levels), np.float32(0)))
    return codes.astype(np.uint8), minimum, bits


def _dequantised(codes: Codes, minima: Floats, scales: Floats, dtype: str) -> Floats:
    halves = minima * _HALF + codes.astype(np.float32) * (scales * _HALF)
    doubled: Floats = np.minimum(halves, _LARGEST[dtype] * _HALF) * np.float32(2)
    return doubled


def _packed(codes: Codes, scheme: Scheme) -> Codes:
    """[tokens, head_dim] as the bytes of a record."""
    if scheme is Scheme.INT8:
        return codes
    even, odd = codes[:, ::2], np.zeros_like(codes[:, ::2])
    odd[:, : codes.shape[1] // 2] = codes[:, 1::2]
    return even | odd << np.uint8(4)


def _unpacked(record: Codes, at: int, layout: Layout, scheme: Scheme) -> Codes:
    """The codes that `_packed` packed, [tokens, head_dim]."""
    row = scheme.row_bytes(layout.head_dim)
    codes = record[at : at + layout.tokens * row].reshape(layout.tokens, row)
    if scheme is Scheme.INT8:
        return codes
    halves = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1)
    return halves.reshape(layout.tokens, 2 * row)[:, : layout.head_dim]


def _numbers(record: Codes, at: int, count: int, dtype: str) -> Floats:
    stored = _stored(dtype)
    return widen(record[at : at + count * stored.itemsize].view(stored), dtype)


def _stored(dtype: str) -> np.dtype[Any]:
    """What NumPy holds elements of a dtype in."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
