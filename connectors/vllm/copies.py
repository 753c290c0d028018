"""Copies between the engine's blocks and chunks in host memory, on the engine's device.

On the CPU straight between the two, in native calls without the GIL. On a GPU through kvtier's own
device (`device_copies.py`) or, where that cannot be had, with torch: by way of one chunk on the
device, so that each chunk crosses in one transfer, ordered by streams.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvtier.connectors.vllm.paged import Pages
from kvtier.kernels.copying import SHARED_COPY_BYTES, Copier
from kvtier.kernels.device import Span


@dataclass(frozen=True, slots=True)
class Landed:
    """A chunk to be copied into the engine's blocks, from its token `skip_tokens` on. `span` is
    where a device reaches it; with one that is in VRAM, `data` is empty."""

    data: memoryview
    blocks: Mapping[int, Sequence[int]]
    skip_tokens: int
    span: Span | None = None


class Filling(Protocol):
    """Chunks on their way into blocks, ahead of the engine's work."""

    def before(self, layer: str) -> None:
        """What the engine begins next sees that layer, where `begin` was told `by_layer`."""
        ...

    def finish(self) -> None:
        """Return once the chunks' memory is no longer read. Raises DeviceError where not all of
        them came."""
        ...


class Copies(Protocol):
    """How bytes get in and out of one device. For any thread, but for `mark` and `begin`, which are
    for the engine's own. `takes_vram`: chunks may be there."""

    takes_vram: bool

    def mark(self) -> object:
        """A point in the engine's own work: what it has begun so far."""
        ...

    def reach(self, mark: object) -> None:
        """Return once the engine's work up to a mark is done."""
        ...

    def scatter(self, pages: Pages, chunks: Sequence[Landed], after: object) -> None:
        """Copy chunks into blocks, which the engine's work up to the mark `after` may still use.
        When this returns, the chunks' memory is no longer read, and what the engine begins next
        sees them."""
        ...

    def begin(
        self, pages: Pages, chunks: Sequence[Landed], after: object, *, by_layer: bool
    ) -> Filling | None:
        """As `scatter`, but it may return as soon as what the engine begins next is ordered behind
        the copies, or behind those of each layer; None when all is done."""
        ...

    def gather(
        self,
        pages: Pages,
        data: memoryview,
        blocks: Mapping[int, Sequence[int]],
        span: Span | None,
    ) -> None:
        """Copy one chunk out of blocks, whose marks are reached, to `data`, which a device reaches
        as `span`. When this returns, it is complete and the blocks are no longer read."""
        ...

    def close(self) -> None:
        """End what it runs; no copy may be under way."""
        ...


def copies_for(device: torch.device) -> Copies:
    """The copies of an engine's device, with torch."""
    return HostCopies() if device.type == "cpu" else StreamCopies(device)


class HostCopies:
    """The engine's blocks are in host memory, and its work is done when its call returns."""

    takes_vram = False

    def __init__(self) -> None:
        self._copier = Copier()

    def mark(self) -> object:
        return None

    def reach(self, mark: object) -> None:
        pass

    def scatter(self, pages: Pages, chunks: Sequence[Landed], after: object) -> None:
        paged: list[torch.Tensor] = []
        flat: list[torch.Tensor] = []
        for chunk in chunks:
            views = pages.views(pages.chunk(chunk.data), chunk.blocks, chunk.skip_tokens)
            paged += views[0]
            flat += views[1]
        if len(chunks) * pages.nbytes < SHARED_COPY_BYTES:
            _copy(paged, flat)
            return
        half = len(paged) // 2
        self._copier.share(
            lambda: _copy(paged[:half], flat[:half]), lambda: _copy(paged[half:], flat[half:])
        )

    def begin(
        self, pages: Pages, chunks: Sequence[Landed], after: object, *, by_layer: bool
    ) -> Filling | None:
        self.scatter(pages, chunks, after)
        return None

    def gather(
        self,
        pages: Pages,
        data: memoryview,
        blocks: Mapping[int, Sequence[int]],
        span: Span | None,
    ) -> None:
        paged, flat = pages.views(pages.chunk(data), blocks)
        _copy(flat, paged)

    def close(self) -> None:
        self._copier.close()


class StreamCopies:
    """The engine's blocks are on an accelerator whose work is ordered by streams.

    Copies run on a stream of their own. Their order is made by events, never by chance: into blocks
    after what the engine had begun (it may still read their former content) and, as the host waits
    for them, before what it begins next.
    """

    takes_vram = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in = torch.Stream(device)
        self._out = torch.Stream(device)

    def mark(self) -> object:
        # The current stream is each thread's own: this is called on the engine's.
        return torch.accelerator.current_stream(self._device).record_event()

    def reach(self, mark: object) -> None:
        assert isinstance(mark, torch.Event)
        mark.synchronize()

    def scatter(self, pages: Pages, chunks: Sequence[Landed], after: object) -> None:
        assert isinstance(after, torch.Event)
        self._in.wait_event(after)
        with self._in:
            for chunk in chunks:
                remote = pages.new_chunk()
                remote.copy_(pages.chunk(chunk.data), non_blocking=True)
                _copy(*pages.views(remote, chunk.blocks, chunk.skip_tokens))
        self._in.record_event().synchronize()

    def begin(
        self, pages: Pages, chunks: Sequence[Landed], after: object, *, by_layer: bool
    ) -> Filling | None:
        self.scatter(pages, chunks, after)
        return None

    def gather(
        self,
        pages: Pages,
        data: memoryview,
        blocks: Mapping[int, Sequence[int]],
        span: Span | None,
    ) -> None:
        with self._out:
            remote = pages.new_chunk()
            paged, flat = pages.views(remote, blocks)
            _copy(flat, paged)
            pages.chunk(data).copy_(remote, non_blocking=True)
        self._out.record_event().synchronize()

    def close(self) -> None:
        pass  # streams belong to torch


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """One native call for all, without the GIL: the engine's loop holds it most of the time, and
    each call from another thread would have to win it back."""
    if targets:
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
