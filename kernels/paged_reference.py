"""What gathering and scattering mean, in NumPy, one token after the other.

The cache is given as arrays, as `PagedCache.of` takes them, but in NumPy's own; a chunk is an array
of `layout.shape` with elements of the same size. Nothing is checked.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvtier.spaces import Layout

Elements = NDArray[np.generic]
_ORDER = ("layer", "plane", "head", "token", "dim")


def planes_of(layers: Sequence[Elements | tuple[Elements, ...]], axes: str) -> list[list[Elements]]:
    """Views of shape [blocks, heads, tokens, dim] by layer and plane."""
    every: list[list[Elements]] = []
    for item in layers:
        arrays = item if isinstance(item, tuple) else (item,)
        views = [_canonical(array, axes.split(",")) for array in arrays]
        every += [
            [view[layer, plane] for view in views for plane in range(view.shape[1])]
            for layer in range(views[0].shape[0])
        ]
    return every


def gather(
    planes: list[list[Elements]],
    layout: Layout,
    chunk: Elements,
    table: Sequence[int],
    layers: range,
    first_token: int = 0,
) -> None:
    """Copy the tokens of one chunk out of the blocks of `planes_of`."""
    for inside, outside in _tokens(planes, layout, chunk, table, layers, first_token):
        inside[...] = outside


def scatter(
    planes: list[list[Elements]],
    layout: Layout,
    chunk: Elements,
    table: Sequence[int],
    layers: range,
    first_token: int = 0,
) -> None:
    """Copy the tokens of one chunk into the blocks of `planes_of`."""
    for inside, outside in _tokens(planes, layout, chunk, table, layers, first_token):
        outside[...] = inside


def _canonical(array: Elements, names: list[str]) -> Elements:
    """The array with axes layer, plane, block, head, token, dim."""
    order = ("layer", "plane", "block", "head", "token", "dim")
    missing = [name for name in order if name not in names]
    view = array[(None,) * len(missing)]
    present = [*missing, *names]
    return view.transpose([present.index(name) for name in order])


def _tokens(
    planes: list[list[Elements]],
    layout: Layout,
    chunk: Elements,
    table: Sequence[int],
    layers: range,
    first_token: int,
) -> Iterator[tuple[Elements, Elements]]:
    """Views of shape [heads, dim] of each token, in the chunk and in the cache."""
    names = layout.axes.split(",")
    canonical = chunk.transpose([names.index(name) for name in _ORDER])
    for layer in layers:
        for plane, cache in enumerate(planes[layer]):
            block_tokens = cache.shape[2]
            for token in range(first_token, layout.tokens):
                block, within = table[token // block_tokens], token % block_tokens
                yield canonical[layer, plane, :, token], cache[block, :, within]
