"""Copies between the engine's blocks and chunks in host memory, on the engine's device.

On the CPU straight between the two, in native calls without the GIL. On another device by way
of one chunk on the device, so that each chunk crosses in one transfer, ordered by streams.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvtier.connectors.vllm.paged import Pages
from kvtier.kernels.copying import SHARED_COPY_BYTES, Copier


@dataclass(frozen=True, slots=True)
class Landed:
    """A chunk to be copied into the engine's blocks, from its token `skip_tokens` on."""

    data: memoryview
    blocks: Mapping[int, Sequence[int]]
    skip_tokens: int


class Copies(Protocol):
    """How bytes get in and out of one device. For any thread."""

    def mark(self) -> object:
        """A point in the engine's own work: what it has begun so far."""
        ...

    def scatter(self, pages: Pages, chunks: Sequence[Landed]) -> None:
        """Copy chunks into blocks. When this returns, the chunks' memory is no longer read, and
        what the engine begins next sees them."""
        ...

    def gather(
        self, pages: Pages, data: memoryview, blocks: Mapping[int, Sequence[int]], after: object
    ) -> None:
        """Copy one chunk out of blocks, as they are once the work up to the mark `after` is done.
        When this returns, `data` is complete and the blocks are no longer read."""
        ...

    def close(self) -> None:
        """End what it runs; no copy may be under way."""
        ...


def copies_for(device: torch.device) -> Copies:
    """The copies of an engine's device."""
    return HostCopies() if device.type == "cpu" else StreamCopies(device)


class HostCopies:
    """The engine's blocks are in host memory, and its work is done when its call returns."""

    def __init__(self) -> None:
        self._copier = Copier()

    def mark(self) -> object:
        return None

    def scatter(self, pages: Pages, chunks: Sequence[Landed]) -> None:
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

    def gather(
        self, pages: Pages, data: memoryview, blocks: Mapping[int, Sequence[int]], after: object
    ) -> None:
        paged, flat = pages.views(pages.chunk(data), blocks)
        _copy(flat, paged)

    def close(self) -> None:
        self._copier.close()


class StreamCopies:
    """The engine's blocks are on an accelerator whose work is ordered by streams.

    Copies run on a stream of their own. Their order is made by events, never by chance: into blocks
    after what the engine has begun (it may still read their former content) and before what it
    begins next; out of blocks after the mark.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in = torch.Stream(device)
        self._out = torch.Stream(device)

    def mark(self) -> object:
        return torch.accelerator.current_stream(self._device).record_event()

    def scatter(self, pages: Pages, chunks: Sequence[Landed]) -> None:
        engine = torch.accelerator.current_stream(self._device)
        self._in.wait_event(engine.record_event())
        with self._in:
            for chunk in chunks:
                remote = pages.new_chunk()
                remote.copy_(pages.chunk(chunk.data), non_blocking=True)
                _copy(*pages.views(remote, chunk.blocks, chunk.skip_tokens))
        done = self._in.record_event()
        engine.wait_event(done)
        done.synchronize()

    def gather(
        self, pages: Pages, data: memoryview, blocks: Mapping[int, Sequence[int]], after: object
    ) -> None:
        assert isinstance(after, torch.Event)
        self._out.wait_event(after)
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
