"""Small traces, made of prompts."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from kvtier.bench.trace.requests import Trace

Prompt = tuple[int, ...]

PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
TRACES = st.lists(PROMPTS, min_size=1, max_size=25)


def trace_of(prompts: Sequence[Prompt], partly: Sequence[Prompt] = ()) -> Trace:
    """A request a second; a chunk is what a prompt has up to there. `partly` are unfilled ends."""
    numbers: dict[Prompt, int] = {}
    chunks: list[int] = []
    starts = [0]
    for prompt in prompts:
        ends = range(1, len(prompt) + 1)
        chunks += [numbers.setdefault(prompt[:end], len(numbers)) for end in ends]
        starts.append(len(chunks))
    return Trace(
        "made",
        np.arange(len(prompts), dtype=np.float64),
        np.array(starts, np.int64),
        np.array(chunks, np.int64),
        np.array([prompt in partly for prompt in numbers], np.bool_),
    )
