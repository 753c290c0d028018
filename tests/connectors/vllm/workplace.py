"""Workers on small tensors: their blocks, orders for them, and copies that can be held."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvtier.chunks import chain, pack_tokens
from kvtier.client import Client
from kvtier.connectors.vllm.copies import Copies, HostCopies, Landed
from kvtier.connectors.vllm.loader import Stored
from kvtier.connectors.vllm.orders import LoadOrder, OffloadOrder, Run, StepOrders
from kvtier.connectors.vllm.paged import Pages
from kvtier.connectors.vllm.parts import Part
from kvtier.connectors.vllm.working import Working
from kvtier.kernels.device import Span
from tests.connectors.vllm.making import BLOCK, parts
from tests.sidecar import HANG_S, until

BLOCKS = 64
CHUNK = 2 * BLOCK
WHOLE = parts()
BOTH = parts((None, 12))
SOURCE = [5, 9, 2, 33, 14, 60, 1, 7]  # four chunks
TARGET = [50, 3, 41, 8, 22, 6, 19, 30]


@dataclass
class Place:
    """One worker's memory of some parts."""

    caches: dict[str, torch.Tensor]

    def tokens(self, part: Part, blocks: Sequence[int]) -> list[torch.Tensor]:
        """What each layer of a part holds in some blocks."""
        return [self.caches[name][list(blocks)].clone() for name, _ in part.layers]


def place_of(parts: Sequence[Part], seed: int) -> Place:
    """Blocks full of noise."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for part in parts for name, _ in part.layers]
    return Place({name: torch.rand(BLOCKS, 2, BLOCK, 4, generator=generator) for name in names})


def stored_of(
    parts: Sequence[Part], place: Place, clients: Mapping[bytes, Any], *, writer: bool = True
) -> list[Stored]:
    """The parts as a worker has them; the clients by their spaces' digests."""
    groups = 1 + max(group for part in parts for group, _ in part.groups)
    return [
        Stored(part, Pages(part, place.caches, [BLOCKS] * groups), clients[part.digest], writer)
        for part in parts
    ]


def run(part: Part, prompt: int, first: int, blocks: Sequence[int]) -> Run:
    """Chunks of a prompt (two prompts share none), from the `first` on, in those blocks."""
    chunks = len(blocks) * BLOCK // CHUNK
    tokens = range(prompt * 10_000, prompt * 10_000 + (first + chunks) * CHUNK)
    keys = chain(part.digest, pack_tokens(tokens), CHUNK)[first:]
    return Run(keys, first, {group: tuple(blocks) for group, _ in part.groups})


def offload(number: int, prompt: int, parts: Sequence[Part], blocks: Sequence[int]) -> OffloadOrder:
    """Store a prompt's first chunks."""
    return OffloadOrder(
        number, f"r{prompt}", {part.digest: run(part, prompt, 0, blocks) for part in parts}
    )


def load(
    prompt: int, parts: Sequence[Part], blocks: Sequence[int], *,
    start: int = 0, stop: int | None = None, background: bool = False,
) -> LoadOrder:  # fmt: skip
    """Load the tokens `start` to `stop` of a prompt; `blocks` are those of all its chunks."""
    first = start // CHUNK
    ends = stop if stop is not None else len(blocks) * BLOCK
    runs = {
        part.digest: run(part, prompt, first, blocks[first * CHUNK // BLOCK :]) for part in parts
    }
    return LoadOrder(f"r{prompt}", start, ends, runs, background)


def step(number: int, *loads: LoadOrder, confirm: bool = False, fence: int = 0) -> StepOrders:
    return StepOrders(number, fence, confirm, loads)


def finish(worker: Working, number: int) -> None:
    """Wait until an offload is done."""
    until(lambda: worker._offloader._done >= number, f"offload {number} is done")


class HeldCopies(HostCopies):
    """Copies out of blocks that wait, each, until they are let go."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.may = threading.Semaphore(0)
        self.marks = 0

    def mark(self) -> object:
        self.marks += 1
        return self.marks

    def gather(
        self,
        pages: Pages,
        data: memoryview,
        blocks: Mapping[int, Sequence[int]],
        span: Span | None,
    ) -> None:
        self.begun.release()
        assert self.may.acquire(timeout=HANG_S)
        super().gather(pages, data, blocks, span)


class BrokenClient:
    """Every call fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.connected = True
        self.deadlines: list[float | None] = []

    @contextmanager
    def load(self, prefix: Any, deadline_s: float | None = None) -> Iterator[Any]:
        self.deadlines.append(deadline_s)
        raise self.error
        yield

    offload = load


class BrokenCopies(HostCopies):
    """Copies that fail."""

    def scatter(self, pages: Pages, chunks: Sequence[Landed], after: object) -> None:
        raise RuntimeError("the device is gone")

    def gather(
        self,
        pages: Pages,
        data: memoryview,
        blocks: Mapping[int, Sequence[int]],
        span: Span | None,
    ) -> None:
        raise RuntimeError("the device is gone")


class Bench:
    """Makes workers that are closed in the end, but for their clients: these are shared."""

    def __init__(self, open_cache: Callable[[Part], Client]) -> None:
        self.open_cache = open_cache
        self.workers: list[Working] = []

    def worker(
        self, of: Sequence[Part] = WHOLE, seed: int = 1, *, writer: bool = True,
        clients: dict[bytes, Any] | None = None, copies: Copies | None = None,
        idle_wait_s: float = 0.0,
    ) -> tuple[Working, Place]:  # fmt: skip
        place = place_of(of, seed)
        made = clients or {part.digest: self.open_cache(part) for part in of}
        stored = stored_of(of, place, made, writer=writer)
        self.workers.append(Working(stored, copies or HostCopies(), 5.0, BLOCK, idle_wait_s))
        return self.workers[-1], place

    def stored(self, prompt: int, of: Sequence[Part] = WHOLE, chunks: int = 4) -> Place:
        """Have the first chunks of a prompt stored; returns where they came from."""
        worker, place = self.worker(of, seed=prompt)
        worker.offload(step_with(offload(1, prompt, of, SOURCE[: 2 * chunks])))
        finish(worker, 1)
        return place


def alive(thread: threading.Thread | None) -> bool:
    return thread is not None and thread.is_alive()


def step_with(*offloads: OffloadOrder, number: int = 1) -> StepOrders:
    return StepOrders(number, offloads=offloads)


def same(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
