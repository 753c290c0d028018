"""Hits in VRAM and in RAM, from a real service into an engine's blocks, against bare copies."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from kvtier.bench.gpu.blocks import Blocks
from kvtier.bench.gpu.memory import Window, cut
from kvtier.bench.gpu.scale import Scale, Style
from kvtier.bench.gpu.served import Served, served
from kvtier.bench.payload import filled, token_ids
from kvtier.bench.sidecar import SidecarFailed
from kvtier.bench.timing import ratio, seconds
from kvtier.chunks import Prefix
from kvtier.client import PagedEngine
from kvtier.kernels.device import Span, Urgency

_RAISE_S = 120.0
_POLL_S = 0.01
_STAGED_CHUNKS = 8


def measure(name: str, scale: Scale) -> dict[str, Any]:
    """Ratios of whole hits to bare copies of the same bytes, by the chunks of the prompt.

    A hit is `PagedEngine.load` until its chunks are right in the blocks, with all that the service
    is asked. `vram_hit_ratio` (to one copy within the device) is that of the longest prompt,
    `ram_hit_ratio` (to copies out of the same pinned memory) of the shortest. `answer_ms` is what a
    load takes that moves nothing. Raises DeviceError, SidecarFailed, WrongBytes.
    """
    style = scale.styles["nhd"]
    shortest = scale.hit_chunks[0]
    with _trial(name, style, shortest, in_vram=False) as trial, trial.bare_up() as bare:
        in_ram = trial.figures(bare, scale.rounds)
    in_vram = {}
    for chunks in scale.hit_chunks:
        with _trial(name, style, chunks, in_vram=True) as trial:
            trial.raise_all()
            in_vram[str(chunks)] = trial.figures(trial.bare_within(), scale.rounds)
            trial.check_place()
    return {
        "vram_hit_ratio": in_vram[str(scale.hit_chunks[-1])]["ratio"],
        "ram_hit_ratio": in_ram["ratio"],
        "hits": {"ram": {str(shortest): in_ram}, "vram": in_vram},
    }


@contextmanager
def _trial(name: str, style: Style, chunks: int, *, in_vram: bool) -> Iterator["_Trial"]:
    """A service, an engine beside it, and the chunks of one prompt in the service's RAM."""
    with served(name, style.layout, chunks, in_vram=in_vram) as there:
        trial = _Trial(there, style, chunks)
        with trial.engine:
            trial.store()
            yield trial


class _Trial:
    """One prompt, its blocks when it was offloaded, and others that it is loaded into."""

    def __init__(self, there: Served, style: Style, chunks: int) -> None:
        self._service, self._client, self._device = there.service, there.client, there.device
        self._style = style
        self._chunks = chunks
        self._stream = self._device.stream(Urgency.LOADS)
        self._blocks = Blocks(self._device, style, chunks * style.blocks_per_chunk)
        self._origins = self._blocks.tables(chunks, seed=1)
        self._tables = self._blocks.tables(chunks, seed=2)
        self.engine = PagedEngine(
            self._client,
            self._device,
            self._blocks.cache,
            staging_bytes=_STAGED_CHUNKS * style.layout.nbytes,
        )
        ids = token_ids(chunks * style.layout.tokens, seed=chunks)
        self._prefix: Prefix = self._client.prefix(ids)
        self._loads = self._hits_before = 0

    def store(self) -> None:
        """Offload the prompt. Raises SidecarFailed when not all of it was stored."""
        self._blocks.fill()
        outcome = self.engine.offload(self._prefix, self._origins, after=self._stream.record())
        if len(outcome.stored) != self._chunks:
            raise SidecarFailed(f"not all was stored: {outcome.refused}")

    def raise_all(self) -> None:
        """Load until the service has all chunks in VRAM. Raises SidecarFailed."""
        until_s = time.monotonic() + _RAISE_S
        while (held := self._held_in_vram()) < self._chunks:
            if time.monotonic() > until_s:
                raise SidecarFailed(f"{held} of {self._chunks} chunks were raised to VRAM")
            self._load()
            time.sleep(_POLL_S)
        self._hits_before, self._loads = self._counted_hits(), 0

    def check_place(self) -> None:
        """Raise SidecarFailed unless all loads since found all chunks in VRAM."""
        hits, due = self._counted_hits() - self._hits_before, self._loads * self._chunks
        if hits != due:
            raise SidecarFailed(f"{hits} of {due} chunks were loaded from VRAM")

    def figures(self, bare: Callable[[], None], rounds: int) -> dict[str, float]:
        """The bare copy, over the blocks, and a load into them, in turn, after one round that does
        not count; then every byte is checked."""
        works = (bare, self._load, self._ask)
        measured = [tuple(seconds(work) for work in works) for _ in range(rounds + 1)][1:]
        self._blocks.check(self._tables, self._origins)
        bare_s, load_s, answer_s = (list(column) for column in zip(*measured, strict=True))
        moved_gb = self._blocks.region.nbytes / 1e9
        return {
            "ratio": ratio(bare_s, load_s),
            "load_gb_s": moved_gb / median(load_s),
            "bare_gb_s": moved_gb / median(bare_s),
            "load_ms": 1000 * median(load_s),
            "answer_ms": 1000 * median(answer_s),
        }

    def bare_within(self) -> Callable[[], None]:
        """One copy within the device."""
        nbytes, chunk_bytes = self._blocks.region.nbytes, self._style.layout.nbytes
        source = self._device.allocate(nbytes)
        window, noise = Window(self._device, chunk_bytes), filled(1, chunk_bytes, seed=4)[0]
        for span in cut(source, chunk_bytes):
            window.write(span, noise)
        pairs = [(self._blocks.region.span(0, nbytes), source.span(0, nbytes))]
        return lambda: self._copy(pairs)

    @contextmanager
    def bare_up(self) -> Iterator[Callable[[], None]]:
        """A copy of each chunk from where the service holds it, one after the other."""
        targets = cut(self._blocks.region, self._style.layout.nbytes)
        with self._client.load(self._prefix) as loaded:
            sources = [chunk.span for chunk in loaded if chunk.span is not None]
            if len(sources) != len(targets):
                raise SidecarFailed(f"{len(sources)} of {len(targets)} chunks can be reached")
            yield lambda: self._copy(list(zip(targets, sources, strict=True)))

    def _copy(self, pairs: list[tuple[Span, Span]]) -> None:
        for pair in pairs:
            self._device.copy(self._stream, [pair])
        self._stream.synchronize()

    def _load(self) -> None:
        self._loads += 1
        under_way = self.engine.load(self._prefix, self._tables, after=self._stream.record())
        if (right := under_way.finish()) != self._chunks:
            raise SidecarFailed(f"{right} of {self._chunks} chunks were loaded")

    def _ask(self) -> None:
        self._loads += 1
        with self._client.load(self._prefix, in_vram=True) as loaded:
            for _ in loaded:
                pass

    def _held_in_vram(self) -> int:
        for tier in self._service.stats().tiers:
            if tier.name == "gpu":
                return tier.chunks
        raise SidecarFailed("the service has no VRAM tier; is there enough memory on the device?")

    def _counted_hits(self) -> int:
        return self._service.stats().counters["load_vram_hits"]
