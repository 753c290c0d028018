"""An engine's paged cache in a device's memory, with contents that are known byte by byte."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvtier.bench.gpu.memory import POISON, Window, cut
from kvtier.bench.gpu.scale import BLOCK_TOKENS, Style
from kvtier.bench.payload import Buffer, WrongBytes, filled
from kvtier.kernels.arrays import Array
from kvtier.kernels.device import Device
from kvtier.kernels.paged import PagedCache

Plane = TypeVar("Plane")

Tables = list[list[int]]
"""For each chunk the ids of its blocks."""

# Added to every eight bytes from one plane to the next, so that no two planes are alike.
_STEP = 0x9E37_79B9_7F4A_7C15


class Blocks:
    """`count` blocks of a style on a device. Every block's contents differ in every plane."""

    def __init__(self, device: Device, style: Style, count: int) -> None:
        layout = style.layout
        extents = {
            "block": count,
            "token": BLOCK_TOKENS,
            "head": layout.heads,
            "dim": layout.head_dim,
        }
        self._style = style
        self._count = count
        self._shape = tuple(extents[axis] for axis in style.axes.split(","))
        planes = layout.layers * layout.planes
        plane_bytes = count * BLOCK_TOKENS * layout.heads * layout.head_dim * layout.itemsize
        self.region = device.allocate(planes * plane_bytes)
        self._planes = cut(self.region, plane_bytes)
        arrays = [self._array(plane.address) for plane in self._planes]
        self.cache = PagedCache.of(_by_layer(arrays, layout.planes), style.axes)
        self._window = Window(device, plane_bytes)
        self._base = filled(1, plane_bytes, seed=7)[0].view(np.uint64)

    def tables(self, chunks: int, seed: int) -> Tables:
        """Blocks for that many chunks, anywhere and each once; there must be as many."""
        each = self._style.blocks_per_chunk
        ids = np.random.default_rng(seed).permutation(self._count)[: chunks * each]
        tables: Tables = ids.reshape(chunks, each).tolist()
        return tables

    def fill(self) -> None:
        """Write the contents."""
        for number, plane in enumerate(self._planes):
            self._window.write(plane, self._content(number))

    def wipe(self) -> None:
        """Write poison."""
        for plane in self._planes:
            self._window.wipe(plane)

    def host_arrays(self) -> list[tuple[NDArray[np.generic], ...]]:
        """The contents by layer and plane, as 16-bit words with the style's axes, on the host."""
        numbers = range(len(self._planes))
        arrays = [self._content(n).view(np.uint16).reshape(self._shape) for n in numbers]
        return _by_layer(arrays, self._style.layout.planes)

    def check(self, tables: Tables, origins: Tables) -> None:
        """Raise WrongBytes unless the blocks of `tables` hold the contents of those of `origins`,
        and all others poison."""
        to, out_of = np.ravel(tables), np.ravel(origins)
        others = np.setdiff1d(np.arange(self._count), to)
        for number, plane in enumerate(self._planes):
            found = self._window.read(plane).reshape(self._count, -1)
            right = self._content(number).reshape(self._count, -1)
            if not np.array_equal(found[to], right[out_of]) or np.any(found[others] != POISON):
                raise WrongBytes(f"blocks: plane {number} has other bytes than there should be")

    def _content(self, number: int) -> Buffer:
        step = np.uint64(number * _STEP % 2**64)
        return (self._base + step).view(np.uint8)

    def _array(self, address: int) -> Array:
        itemsize = self._style.layout.itemsize
        steps = np.cumprod((itemsize, *self._shape[:0:-1]))[::-1]
        return Array(address, self._shape, tuple(steps.tolist()), itemsize)


def _by_layer(planes: Sequence[Plane], each: int) -> list[tuple[Plane, ...]]:
    return [tuple(planes[n : n + each]) for n in range(0, len(planes), each)]
