"""What the replays say: one row for each capacity."""

from dataclasses import dataclass

import numpy as np

from kvtier.bench.trace.replay import Replayed
from kvtier.bench.trace.requests import Ints, Trace

# Llama 3.1 8B: weights without the embeddings, and layers x width of its attention.
_WEIGHTS = 7.5e9
_ATTENTION = 32 * 4096
_LEAST_GAP = 0.005  # points between LRU and MIN of which a share makes sense


@dataclass(frozen=True, slots=True)
class Result:
    """One policy at one capacity. `gap_closed_percent` is the share of the way from LRU to MIN,
    None where there is none."""

    policy: str
    capacity_chunks: int
    capacity_percent: float
    hit_percent: float
    min_percent: float
    lru_percent: float
    gap_closed_percent: float | None
    flops_saved_percent: float
    us_per_request: float
    index_bytes_per_chunk: float


@dataclass(frozen=True, slots=True)
class Bounds:
    """What LRU and the optimum serve at one capacity, in percent."""

    lru: float
    optimum: float


def result(
    trace: Trace, policy: str, capacity: int, replayed: Replayed, bounds: Bounds, chunk_tokens: int
) -> Result:
    """The row of a replay."""
    hit_percent = percent_of(trace, replayed.hits)
    gap = bounds.optimum - bounds.lru
    return Result(
        policy=policy,
        capacity_chunks=capacity,
        capacity_percent=100 * capacity / trace.unique,
        hit_percent=hit_percent,
        min_percent=bounds.optimum,
        lru_percent=bounds.lru,
        gap_closed_percent=100 * (hit_percent - bounds.lru) / gap if gap > _LEAST_GAP else None,
        flops_saved_percent=flops_saved_percent(trace, replayed.hits, chunk_tokens),
        us_per_request=replayed.us_per_request,
        index_bytes_per_chunk=replayed.index_bytes_per_chunk,
    )


def percent_of(trace: Trace, hits: Ints) -> float:
    """Of all chunks that were asked for."""
    return 100 * float(hits.sum()) / trace.references


def flops_saved_percent(trace: Trace, hits: Ints, chunk_tokens: int) -> float:
    """Of the work of all prefills: 2 FLOPs a token for each weight, and for attention 4 for each
    token before it, layer and component (keys and values). For a model like Llama 3.1 8B."""
    saved = _prefill_flops(hits * chunk_tokens).sum()
    return 100 * float(saved) / float(_prefill_flops(trace.lengths * chunk_tokens).sum())


def _prefill_flops(tokens: Ints) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Of the first so many tokens of a prompt."""
    first = tokens.astype(np.float64)
    return 2 * _WEIGHTS * first + 2 * _ATTENTION * first**2
