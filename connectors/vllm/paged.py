"""The engine's paged KV, seen as chunks: views of blocks and of chunks that belong together.

A layer's cache is a tensor [blocks, heads, tokens, content] of whatever strides. Where an attention
back end works on smaller blocks than the block table speaks of, a block of the table is a run of
rows. A chunk is [layers, heads, tokens, content], contiguous.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from kvtier.connectors.vllm.parts import Part
from kvtier.errors import InvalidRequest

Views = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Views of the engine's blocks and of a chunk; those at the same place hold the same KV."""


class Pages:
    """One part's layers in the engine's cache.

    `block_counts` are the blocks of each cache group. Raises InvalidRequest, naming the layer, when
    a tensor is not what the part's layout says.
    """

    def __init__(
        self, part: Part, caches: Mapping[str, torch.Tensor], block_counts: Sequence[int]
    ) -> None:
        layout = part.space.layout
        self.nbytes = layout.nbytes
        self._chunk_tokens = layout.tokens
        self._dtype = getattr(torch, layout.dtype)
        self._shape = (layout.layers, layout.heads, layout.tokens, layout.planes * layout.head_dim)
        self._block_tokens = dict(part.groups)
        self._layers: list[tuple[torch.Tensor, int, int]] = []  # tensor, group, rows of a block
        for name, group in part.layers:
            cache = caches.get(name)
            if cache is None:
                raise InvalidRequest(f"vllm: there is no KV cache of layer {name}")
            self._layers.append(self._checked(name, cache, group, block_counts[group]))
        self.device = self._layers[0][0].device

    def _checked(
        self, name: str, cache: torch.Tensor, group: int, blocks: int
    ) -> tuple[torch.Tensor, int, int]:
        if cache.dtype is not self._dtype:
            cache = cache.view(self._dtype)
        rows = cache.shape[0] // blocks if blocks else 0
        tokens = self._block_tokens[group] // rows if rows else 0
        wanted = (blocks * rows, self._shape[1], tokens, self._shape[3])
        if not rows or tuple(cache.shape) != wanted or tokens * rows != self._block_tokens[group]:
            raise InvalidRequest(
                f"vllm: layer {name} has a KV cache of shape {tuple(cache.shape)}; "
                f"{wanted} is needed"
            )
        return cache, group, rows

    def chunk(self, data: memoryview) -> torch.Tensor:
        """A chunk's bytes as a tensor of the chunk's shape, without a copy; also over read-only
        memory, which the caller must not write. Valid as long as `data` is."""
        return tensor_over(data).view(self._dtype).view(self._shape)

    def new_chunk(self) -> torch.Tensor:
        """An uninitialised chunk on the engine's device."""
        return torch.empty(self._shape, dtype=self._dtype, device=self.device)

    def views(
        self, chunk: torch.Tensor, blocks: Mapping[int, Sequence[int]], skip_tokens: int = 0
    ) -> Views:
        """The places of a chunk and of its tokens in the engine's blocks, from the chunk's token
        `skip_tokens` (a multiple of the block) on.

        `blocks` are the block ids of all the chunk's tokens, for each group; tokens in block 0 are
        left out. Raises ValueError when they are fewer or more: a chunk is whole or it is nothing.
        """
        for group, block_tokens in self._block_tokens.items():
            if len(blocks[group]) * block_tokens != self._chunk_tokens:
                raise ValueError(f"{len(blocks[group])} blocks given for a chunk of group {group}")
        paged: list[torch.Tensor] = []
        flat: list[torch.Tensor] = []
        rows_of = {group: list(self._rows(group, blocks, skip_tokens)) for group in blocks}
        for (cache, group, rows), layer in zip(self._layers, chunk.unbind(0), strict=True):
            pieces = torch.split(layer, self._block_tokens[group] // rows, dim=1)
            for place, block in rows_of[group]:
                for row in range(rows):
                    paged.append(cache[block * rows + row])
                    flat.append(pieces[place * rows + row])
        return paged, flat

    def _rows(
        self, group: int, blocks: Mapping[int, Sequence[int]], skip_tokens: int
    ) -> Iterator[tuple[int, int]]:
        """(place in the chunk, block id) of each block to be touched."""
        for place in range(skip_tokens // self._block_tokens[group], len(blocks[group])):
            block = blocks[group][place]
            if block:
                yield place, block


def tensor_over(data: memoryview) -> torch.Tensor:
    """The bytes of a memoryview as a uint8 tensor, without a copy. Valid as long as `data` is."""
    if data.readonly:
        # torch warns of read-only memory, whoever asks; ours is only ever read.
        address = np.frombuffer(data, dtype=np.uint8).ctypes.data
        return torch.frombuffer(
            (ctypes.c_uint8 * data.nbytes).from_address(address), dtype=torch.uint8
        )
    return torch.frombuffer(data, dtype=torch.uint8)
