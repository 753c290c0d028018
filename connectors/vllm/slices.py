"""The engine's paged KV as kvtier's kernels see it: what of every chunk is moved by one job.

A kernel takes layers that share a block table and lie alike. A part may have several such sets of
layers (cache groups, blocks that are split in rows), in any order along a chunk's layer axis.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from kvtier.connectors.vllm.copies import Landed
from kvtier.connectors.vllm.paged import Pages
from kvtier.connectors.vllm.parts import AXES
from kvtier.kernels.device import Span
from kvtier.kernels.paged import Job, PagedCache, Places, gather, scatter_at
from kvtier.spaces import Layout

_Kind: TypeAlias = tuple[int, ...]
"""What decides where a chunk's tokens are in a layer, besides the layer's address: group, rows to a
block of the table, blocks of the cache, tokens of one, bytes from one to the next."""


@dataclass(frozen=True, slots=True)
class Alike:
    """Layers of a slice that one job moves: `layers` of the cache and the layout, None for all. A
    block of the group's table, of `block_tokens`, is `rows` blocks of the cache."""

    group: int
    rows: int
    block_tokens: int
    cache: PagedCache
    layout: Layout
    layers: range | None

    @property
    def kind(self) -> _Kind:
        cache = self.cache
        return self.group, self.rows, cache.blocks, cache.block_tokens, cache.block_stride

    def table(self, blocks: Mapping[int, Sequence[int]]) -> list[int]:
        """The cache's blocks of one chunk, of the ids for each group."""
        return [id_ * self.rows + row for id_ in blocks[self.group] for row in range(self.rows)]

    def first_token(self, chunk: Landed) -> int:
        """The first token of a chunk that is wanted: past those to skip and those of block 0, which
        the engine does not keep. Raises ValueError where that block comes later, as it never does:
        a window ends with the last token."""
        blocks = chunk.blocks[self.group]
        first = chunk.skip_tokens // self.block_tokens
        while first < len(blocks) and not blocks[first]:
            first += 1
        if 0 in blocks[first:]:
            raise ValueError(
                f"block 0 after block {blocks[first]} in a chunk of group {self.group}"
            )
        return first * self.block_tokens


class Tables:
    """Where chunks go in each kind of layers: checked once for all layers, as making a job takes
    the engine's time."""

    def __init__(self, chunks: Sequence[Landed]) -> None:
        self._chunks = chunks
        self._placed: dict[_Kind, tuple[Places, dict[int, int]]] = {}

    def of(self, alike: Alike) -> tuple[Places, dict[int, int]]:
        """The places of those chunks of which these layers want anything, and which of the places
        a chunk's are. Raises InvalidRequest and ValueError for blocks that cannot be right."""
        placed = self._placed.get(alike.kind)
        if placed is None:
            firsts = [alike.first_token(chunk) for chunk in self._chunks]
            wanted = [n for n, first in enumerate(firsts) if first < alike.layout.tokens]
            tables = [alike.table(self._chunks[n].blocks) for n in wanted]
            first = [firsts[n] for n in wanted]
            places = Places.of(alike.cache, alike.layout, tables, first, written=True)
            placed = self._placed[alike.kind] = places, {n: at for at, n in enumerate(wanted)}
        return placed


@dataclass(frozen=True, slots=True)
class Slice:
    """All layers of a part, or one of them: `nbytes` consecutive bytes of each chunk, at
    `offset`."""

    offset: int
    nbytes: int
    bands: tuple[Alike, ...]

    def of(self, chunk: Span) -> Span:
        """Where a chunk has it."""
        return chunk.region.span(chunk.offset + self.offset, self.nbytes)

    def scatter(
        self, sources: Sequence[Span], chunks: Sequence[int], tables: Tables
    ) -> Iterator[Job]:
        """The jobs that fill blocks from this slice of some of the tables' chunks, which is at
        `sources`. Raises as `Tables.of`."""
        for band in self.bands:
            places, places_of = tables.of(band)
            wanted = [n for n, chunk in enumerate(chunks) if chunk in places_of]
            if wanted:
                yield scatter_at(
                    band.cache,
                    band.layout,
                    [sources[n] for n in wanted],
                    places[[places_of[chunks[n]] for n in wanted]],
                    band.layers,
                )

    def gather(self, target: Span, blocks: Mapping[int, Sequence[int]]) -> Iterator[Job]:
        """The jobs that fill this slice of a chunk, at `target`, from blocks. Raises InvalidRequest
        for blocks that the cache has not."""
        for band in self.bands:
            yield gather(band.cache, band.layout, [target], [band.table(blocks)], band.layers)


def whole(pages: Pages) -> Slice:
    """All layers of a part. Raises InvalidRequest where the inside of a head is not contiguous."""
    layout, caches = _layout_of(pages), _caches_of(pages)
    bases = tuple(caches[place].cache.bases[0] for place in range(layout.layers))
    alike: dict[tuple[object, ...], list[int]] = {}
    for place in range(layout.layers):
        one = caches[place]
        alike.setdefault((one.group, one.rows, replace(one.cache, bases=bases)), []).append(place)
    bands = [
        replace(caches[places[0]], cache=replace(caches[places[0]].cache, bases=bases),
                layout=layout, layers=each)
        for places in alike.values()
        for each in ranges_of(places)
    ]  # fmt: skip
    return Slice(0, layout.nbytes, tuple(bands))


def each_layer(pages: Pages) -> list[Slice]:
    """The layers of a part one by one, in the order of `pages.layer_names`. Raises as `whole`."""
    caches, nbytes = _caches_of(pages), pages.nbytes // pages.shape[0]
    return [Slice(place * nbytes, nbytes, (caches[place],)) for place in range(pages.shape[0])]


def _layout_of(pages: Pages) -> Layout:
    """A chunk as bytes: what one head of one token holds is never looked into."""
    layers, heads, tokens, _ = pages.shape
    width = pages.nbytes // (layers * heads * tokens)
    return Layout("uint8", layers, heads, width, tokens, planes=1, axes=AXES)


def _caches_of(pages: Pages) -> dict[int, Alike]:
    """Each layer by itself, by its place in a chunk."""
    one = replace(_layout_of(pages), layers=1)
    return {
        place: Alike(
            band.group,
            band.rows,
            pages.block_tokens[band.group],
            PagedCache.of([cache], "block,head,token,dim"),
            one,
            None,
        )
        for band in pages.bands
        for place, cache in zip(band.places, band.caches, strict=True)
    }


def ranges_of(places: Sequence[int]) -> Iterator[range]:
    """Ascending numbers as ranges, each as long as it can be."""
    start = 0
    while start < len(places):
        step = places[start + 1] - places[start] if start + 1 < len(places) else 1
        found = range(places[start], places[-1] + 1, step)
        count = next(
            (n for n, place in enumerate(found) if places[start + n : start + n + 1] != [place]),
            len(found),
        )
        yield found[:count]
        start += count
