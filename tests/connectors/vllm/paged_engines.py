"""Engines' paged caches full of noise, in every layout of memory that vLLM has."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch

from kvtier.connectors.vllm.paged import Pages
from kvtier.connectors.vllm.parts import Shard, parts_of
from tests.connectors.vllm.making import MODEL, layer

# The physical order of layers, blocks, heads, tokens and content, as vLLM names its layouts.
LAYOUTS = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]
DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "uint8", "float64"]


@dataclass(frozen=True)
class Case:
    """A cache of one or two groups, and the sizes of everything in it."""

    layout: str
    dtype: str
    blocks: int
    heads: int
    dim: int
    block_tokens: tuple[int, ...]  # of each group
    kernel_blocks: tuple[int, ...]  # in a block, of each group
    layers: tuple[int, ...]  # each layer's group
    chunk: int
    latent: bool = False  # one plane, as MLA has it


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.integers(1, 2))
    kernel_blocks = tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(groups))
    block_tokens = tuple(rows * draw(st.integers(1, 3)) for rows in kernel_blocks)
    several = block_tokens[0] * block_tokens[-1]
    layers = draw(st.lists(st.integers(0, groups - 1), min_size=1, max_size=4))
    layout = draw(st.sampled_from(LAYOUTS))
    if max(kernel_blocks) > 1 and not layout.startswith("LB"):
        layout = "LBHNC"  # vLLM splits blocks of dense pages only
    return Case(
        layout, draw(st.sampled_from(DTYPES)), draw(st.integers(3 * several + 2, 3 * several + 9)),
        draw(st.integers(1, 3)), draw(st.integers(1, 3)), block_tokens, kernel_blocks,
        (*layers, *range(groups)), several * draw(st.integers(1, 2)),
    )  # fmt: skip


def noise(nbytes: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


class Engine:
    """A paged cache full of noise, laid out as a case says, and its part."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        key_dim, value_dim = (2 * case.dim, 0) if case.latent else (case.dim, case.dim)
        names = [f"model.layers.{index}.attn" for index in range(len(case.layers))]
        (self.part,) = parts_of(
            [
                layer(
                    name, group, block_tokens=case.block_tokens[group], dtype=case.dtype,
                    heads=case.heads, key_dim=key_dim, value_dim=value_dim,
                    content_bytes=2 * case.dim,
                    kind="mla_attention" if case.latent else "full_attention",
                )
                for name, group in zip(names, case.layers, strict=True)
            ],
            MODEL, Shard(), case.chunk,
        )  # fmt: skip
        self.caches: dict[str, Any] = {}
        self.memory: list[Any] = []  # of the layers of each group
        for group in set(case.layers):
            mine = [name for name, of in zip(names, case.layers, strict=True) if of == group]
            self.caches.update(zip(mine, self._views(group, len(mine), seed), strict=True))
        self.pages = Pages(self.part, self.caches, [case.blocks] * len(case.block_tokens))

    def _views(self, group: int, layers: int, seed: int) -> list[Any]:
        case = self.case
        rows = case.kernel_blocks[group]
        extents = {
            "L": layers,
            "B": case.blocks * rows,
            "H": case.heads,
            "N": case.block_tokens[group] // rows,
            "C": 2 * case.dim,
        }
        dtype = getattr(torch, case.dtype)
        shape = [extents[axis] for axis in case.layout]
        count = math.prod(shape)
        # The layers of a group share one allocation.
        self.memory.append(noise(count * dtype.itemsize, seed + group))
        raw = self.memory[-1].view(dtype).view(shape)
        ordered = raw.permute([case.layout.index(axis) for axis in "LBHNC"])
        return list(ordered.unbind(0))

    def tokens(self, name: str, group: int, blocks: Sequence[int]) -> Any:
        """What a layer holds in some blocks: bytes of [tokens, heads, content]."""
        rows = self.case.kernel_blocks[group]
        cache = self.caches[name]
        pieces = [
            cache[block * rows + row].transpose(0, 1) for block in blocks for row in range(rows)
        ]
        return torch.cat([piece.contiguous().view(torch.uint8) for piece in pieces])

    def everything(self) -> dict[tuple[str, int], Any]:
        return {
            (name, block): self.tokens(name, group, [block]).clone()
            for name, group in self.part.layers
            for block in range(self.case.blocks)
        }

    def some_blocks(self, data: st.DataObject) -> dict[int, list[int]]:
        """Block ids for one chunk, for each group; no two alike."""
        return {
            group: data.draw(
                st.lists(
                    st.integers(1, self.case.blocks - 1), unique=True,
                    min_size=self.case.chunk // tokens, max_size=self.case.chunk // tokens,
                )
            )
            for group, tokens in self.part.groups
        }  # fmt: skip
