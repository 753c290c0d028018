"""The engine's paged KV, seen as chunks: views of blocks and of chunks that belong together.

A layer's cache is a tensor [blocks, heads, tokens, content] of whatever strides. Where an attention
back end works on smaller blocks than the block table speaks of, a block of the table is a run of
rows. A chunk is [layers, heads, tokens, content], contiguous.

KV is moved, never computed with, so both are seen as the widest integers they allow. Fewer elements
matter: torch gives a copy of `TORCH_GRAIN` elements or more to its OpenMP threads, and waking them
takes longer than such a copy where they sleep (OMP_WAIT_POLICY=passive).
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvtier.connectors.vllm.parts import Part
from kvtier.errors import InvalidRequest

TORCH_GRAIN = 32_768  # at::internal::GRAIN_SIZE

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)

Views = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Views of the engine's blocks and of a chunk; those at the same place hold the same KV."""


@dataclass(frozen=True, slots=True)
class Band:
    """Layers of a part that are paged alike: their places in it, and their caches as words."""

    group: int
    rows: int  # of each cache, to a block of the table
    places: tuple[int, ...]
    caches: tuple[torch.Tensor, ...]

    def blocks(self, line: int) -> list[torch.Tensor]:
        """One row of each layer's cache."""
        return [cache[line] for cache in self.caches]


class Pages:
    """One part's layers in the engine's cache.

    `block_counts` are the blocks of each cache group; `block_tokens` maps a group to the tokens of
    a block, `shape` is a chunk's [layers, heads, tokens, words]. Raises InvalidRequest, naming the
    layer, when a tensor is not what the part's layout says.
    """

    def __init__(
        self, part: Part, caches: Mapping[str, torch.Tensor], block_counts: Sequence[int]
    ) -> None:
        layout = part.space.layout
        self.nbytes = layout.nbytes
        self._chunk_tokens = layout.tokens
        self.block_tokens = dict(part.groups)
        self.layer_names = tuple(name for name, _ in part.layers)
        dtype = getattr(torch, layout.dtype)
        content = layout.planes * layout.head_dim
        layers: list[tuple[int, int, torch.Tensor]] = []  # group, rows of a block, cache
        for name, group in part.layers:
            cache = caches.get(name)
            if cache is None:
                raise InvalidRequest(f"vllm: there is no KV cache of layer {name}")
            cache = cache if cache.dtype is dtype else cache.view(dtype)
            rows = self._rows(name, cache, group, block_counts[group], (layout.heads, content))
            layers.append((group, rows, cache))
        self.device = layers[0][2].device
        self._word = next(word for word in _WORDS if all(_allows(each[2], word) for each in layers))
        words = content * dtype.itemsize // self._word.itemsize
        self.shape = (layout.layers, layout.heads, layout.tokens, words)
        self.bands = tuple(
            Band(
                *alike,
                tuple(place for place, each in enumerate(layers) if each[:2] == alike),
                tuple(each[2].view(self._word) for each in layers if each[:2] == alike),
            )
            for alike in dict.fromkeys(each[:2] for each in layers)
        )

    def _rows(
        self, name: str, cache: torch.Tensor, group: int, blocks: int, content: tuple[int, int]
    ) -> int:
        """How many rows of a layer's cache are one block of the table, after checking its shape."""
        rows = cache.shape[0] // blocks if blocks else 0
        tokens = self.block_tokens[group] // rows if rows else 0
        heads, width = content
        wanted = (blocks * rows, heads, tokens, width)
        if not rows or tuple(cache.shape) != wanted or tokens * rows != self.block_tokens[group]:
            raise InvalidRequest(
                f"vllm: layer {name} has a KV cache of shape {tuple(cache.shape)}; "
                f"{wanted} is needed"
            )
        return rows

    def chunk(self, data: memoryview) -> torch.Tensor:
        """A chunk's bytes as a tensor of the chunk's shape, without a copy; also over read-only
        memory, which the caller must not write. Valid as long as `data` is."""
        return tensor_over(data).view(self._word).view(self.shape)

    def new_chunk(self) -> torch.Tensor:
        """An uninitialised chunk on the engine's device."""
        return torch.empty(self.shape, dtype=self._word, device=self.device)

    def check(self, blocks: Mapping[int, Sequence[int]]) -> None:
        """Raise ValueError unless these are the block ids of one chunk, for each group."""
        for group, block_tokens in self.block_tokens.items():
            if len(blocks[group]) * block_tokens != self._chunk_tokens:
                raise ValueError(f"{len(blocks[group])} blocks given for a chunk of group {group}")

    def views(
        self, chunk: torch.Tensor, blocks: Mapping[int, Sequence[int]], skip_tokens: int = 0
    ) -> Views:
        """The places of a chunk and of its tokens in the engine's blocks, from the chunk's token
        `skip_tokens` (a multiple of the block) on.

        `blocks` are the block ids of all the chunk's tokens, for each group; tokens in block 0 are
        left out. Raises ValueError when they are fewer or more: a chunk is whole or it is nothing.
        """
        self.check(blocks)
        views: Views = [], []
        for band in self.bands:
            tokens = self.block_tokens[band.group]
            # [layers, heads, rows of all blocks, tokens of a row, words]
            cut = chunk.view(*self.shape[:2], -1, tokens // band.rows, self.shape[3])
            for place in range(skip_tokens // tokens, len(blocks[band.group])):
                block = blocks[band.group][place]
                for row in range(band.rows if block else 0):
                    piece = cut.select(2, place * band.rows + row)
                    self._add(views, band, block * band.rows + row, piece)
        return views

    def _add(self, views: Views, band: Band, line: int, piece: torch.Tensor) -> None:
        """Add one row of each layer of a band and its piece of the chunk, [layers, heads, …]; head
        by head where it is large."""
        paged, flat = views
        pieces = piece.unbind(0)
        if len(self.bands) > 1:
            pieces = tuple(pieces[place] for place in band.places)
        if pieces[0].numel() < TORCH_GRAIN:
            paged += band.blocks(line)
            flat += pieces
        else:
            paged += [head for block in band.blocks(line) for head in block.unbind(0)]
            flat += [head for each in pieces for head in each.unbind(0)]


def _allows(cache: torch.Tensor, word: torch.dtype) -> bool:
    """Whether a cache can be seen as such integers."""
    *strides, last = cache.stride()
    counts = (cache.shape[3], cache.storage_offset(), *strides)
    if last != 1:
        return word.itemsize == cache.itemsize
    return all(count * cache.itemsize % word.itemsize == 0 for count in counts)


def tensor_over(data: memoryview) -> torch.Tensor:
    """The bytes of a memoryview as a uint8 tensor, without a copy. Valid as long as `data` is."""
    if data.readonly:
        # torch warns of read-only memory, whoever asks; ours is only ever read.
        address = np.frombuffer(data, dtype=np.uint8).ctypes.data
        return torch.frombuffer(
            (ctypes.c_uint8 * data.nbytes).from_address(address), dtype=torch.uint8
        )
    return torch.frombuffer(data, dtype=torch.uint8)
