"""Jobs between an engine's blocks and chunks, exact or quantised as their layout says."""

from collections.abc import Sequence

from kvtier.kernels.device import Span
from kvtier.kernels.paged import Job, PagedCache, Places, gather_at, scatter_at
from kvtier.kernels.quantised import dequantise_at, quantise_at
from kvtier.spaces import Layout


def fill_chunks(cache: PagedCache, layout: Layout, chunks: Sequence[Span], places: Places) -> Job:
    """Fill whole chunks from blocks; arguments and errors are `gather_at`'s or `quantise_at`'s."""
    fill = gather_at if layout.scheme is None else quantise_at
    return fill(cache, layout, chunks, places)


def fill_blocks(
    cache: PagedCache,
    layout: Layout,
    chunks: Sequence[Span],
    places: Places,
    layers: range | None,
) -> Job:
    """Fill blocks from chunks; arguments and errors are `scatter_at`'s or `dequantise_at`'s.

    `layers` is None for a quantised layout: a part of such a chunk is a chunk of its own.
    """
    if layout.scheme is None:
        return scatter_at(cache, layout, chunks, places, layers)
    assert layers is None
    return dequantise_at(cache, layout, chunks, places)
