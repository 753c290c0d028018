"""Offload as an engine does it: gathered out of its blocks and copied to a service's RAM, by a
thread of its own, prompt after prompt."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from time import perf_counter

from kvtier.bench.gpu.blocks import Blocks
from kvtier.bench.gpu.scale import Style
from kvtier.bench.gpu.served import Served
from kvtier.bench.payload import token_ids
from kvtier.bench.sidecar import SidecarFailed
from kvtier.chunks import Prefix
from kvtier.client import PagedEngine
from kvtier.kernels.device import Urgency

ROOM = 3  # of a service beside it, in prompts: a session may reserve half
_STAGED_CHUNKS = 4


class EngineOffload:
    """One engine with blocks for a prompt of that many chunks. Use its `engine` as a context."""

    def __init__(self, there: Served, style: Style, chunks: int) -> None:
        nbytes = style.layout.nbytes
        self._client = there.client
        self._tokens = chunks * style.layout.tokens
        self._stream = there.device.stream(Urgency.OFFLOADS)
        self._blocks = Blocks(there.device, style, chunks * style.blocks_per_chunk)
        self._blocks.fill()
        self._tables = self._blocks.tables(chunks, seed=1)
        self.engine = PagedEngine(
            there.client, there.device, self._blocks.cache, staging_bytes=_STAGED_CHUNKS * nbytes
        )
        self._prompt_bytes = chunks * nbytes
        self._prompts = 0
        self._last: Prefix | None = None

    def beside(self, work: Callable[[], None]) -> tuple[float, float]:
        """Seconds of some work while prompts are offloaded, and GB/s of those.

        The work begins once the first prompt has left its blocks. Raises SidecarFailed.
        """
        stop, flowing = Event(), Event()
        with ThreadPoolExecutor(1) as thread:
            offloads = thread.submit(self._offload_until, stop, flowing)
            flowing.wait()
            start_s, before = perf_counter(), self._prompts
            try:
                work()
            finally:
                spent_s, prompts = perf_counter() - start_s, self._prompts - before
                stop.set()
            offloads.result()
        return spent_s, prompts * self._prompt_bytes / 1e9 / spent_s

    def check(self) -> None:
        """Raise WrongBytes unless the last prompt is loaded as it was, into other blocks."""
        assert self._last is not None
        tables = self._blocks.tables(len(self._tables), seed=2)
        self._blocks.wipe()
        self.engine.load(self._last, tables, after=self._stream.record()).finish()
        self._blocks.check(tables, self._tables)

    def _offload_until(self, stop: Event, flowing: Event) -> None:
        try:
            while not stop.is_set():
                self._offload()
                flowing.set()
        finally:
            flowing.set()  # its failure is the caller's, who may be waiting

    def _offload(self) -> None:
        if self._last is not None:
            self._client.evict(self._last)  # there is room for the next
        prefix = self._client.prefix(token_ids(self._tokens, seed=self._prompts))
        outcome = self.engine.offload(prefix, self._tables, after=self._stream.record())
        if len(outcome.stored) != len(prefix):
            raise SidecarFailed(f"not all was stored: {outcome.refused}")
        self._last = prefix
        self._prompts += 1
