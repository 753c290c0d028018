"""An engine's paged cache on a device: chunks go straight into its blocks and out of them."""

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np

from kvtier.chunks import Prefix
from kvtier.client.client import Client
from kvtier.client.offloading import Offloaded
from kvtier.client.paged_loading import LEAST_COPY_BYTES, Loads, PagedLoad, Tables, parts_of
from kvtier.client.paged_offloading import Offloads
from kvtier.errors import InvalidRequest
from kvtier.kernels.device import Device, DeviceError, Event, Place, Region
from kvtier.kernels.paged import PagedCache, block_offsets, check_blocks_differ, gather
from kvtier.spaces import Layout

logger = logging.getLogger(__name__)

_ALIGNMENT = 256  # of what is staged, for the kernels' widest accesses
_OFFLOAD_BUFFERS = 2
_LEAST_BUFFERS = 2 + _OFFLOAD_BUFFERS  # one is filled while another is emptied, either way


class PagedEngine:
    """One engine's blocks, and the way between them and the cache.

    `client` is connected with `device`. Of `staging_bytes` on the device, room for two chunks
    serves offloads and the rest loads. Parts of chunks in RAM of at least `least_copy_bytes` are
    staged, smaller ones are read from there. Loads begin on one thread at a time, and so do
    offloads, which may be another.

    Raises InvalidRequest when the cache does not fit the client's space or four chunks do not fit
    in staging, DeviceError when the device has no room for it.
    """

    def __init__(
        self,
        client: Client,
        device: Device,
        cache: PagedCache,
        *,
        staging_bytes: int,
        least_copy_bytes: int = LEAST_COPY_BYTES,
    ) -> None:
        layout = client.space.layout
        _check_fits(cache, layout)
        room = -(-layout.nbytes // _ALIGNMENT) * _ALIGNMENT
        count = staging_bytes // room
        if count < _LEAST_BUFFERS:
            raise InvalidRequest(
                f"staging_bytes: {staging_bytes} given, least is {_LEAST_BUFFERS * room}: "
                f"{_LEAST_BUFFERS} chunks"
            )
        self._client = client
        self._device = device
        self._cache = cache
        self._layout = layout
        self._staging = device.allocate(count * room)
        buffers = [self._staging.span(place * room, layout.nbytes) for place in range(count)]
        self._offloads = Offloads(device, cache, layout, (buffers[0], buffers[1]))
        self._loads = Loads(device, buffers[_OFFLOAD_BUFFERS:], least_copy_bytes)

    def load(
        self,
        prefix: Prefix,
        tables: Tables,
        *,
        after: Event,
        first_token: int = 0,
        by_layer: bool = False,
        deadline_s: float | None = None,
    ) -> PagedLoad:
        """Bring the longest leading run of chunks that is held into the engine's blocks.

        `tables` has for each chunk of the prefix the ids of its blocks, in order. They are written
        once `after`, a point in the engine's own work, is done. The first `first_token` tokens of
        the prefix, all in its first chunk, are left alone. `by_layer` brings the first layer of all
        chunks, then the second and so on.

        Waits for the service until the last chunk has landed or the deadline has passed, never for
        the device. Raises InvalidRequest for tables and tokens that cannot be right, before
        anything is written.
        """
        self._check_tables(prefix, tables, first_token, written=True)
        loading = self._client.load(prefix, deadline_s, in_vram=True)
        parts = parts_of(self._cache, self._layout, by_layer=by_layer)
        return self._loads.begin(loading, parts, tables, first_token, after)

    def offload(
        self, prefix: Prefix, tables: Tables, *, after: Event, deadline_s: float | None = None
    ) -> Offloaded:
        """Store the chunks of a prefix that the service does not hold yet, from the engine's blocks
        as they are once `after` is done; returns what became of each, when no block is read any
        more. Raises InvalidRequest for tables that cannot be right, before anything is read."""
        self._check_tables(prefix, tables, 0, written=False)
        with self._client.offload(prefix, deadline_s) as offload:
            try:
                self._offloads.fill(offload, tables, after)
            except DeviceError as error:
                logger.warning("kvtier: an offload ends early: %s", error)
        return offload.outcome

    def close(self) -> None:
        """Give staging back. All loads are finished, and no offload is under way."""
        self._device.release(self._staging)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_tables(
        self, prefix: Prefix, tables: Sequence[Sequence[int]], first_token: int, *, written: bool
    ) -> None:
        if len(tables) != len(prefix):
            raise InvalidRequest(f"tables: {len(tables)} given for {len(prefix)} chunks")
        if not 0 <= first_token < self._layout.tokens:
            raise InvalidRequest(
                f"first_token: {first_token} given, allowed is 0 to {self._layout.tokens - 1}; "
                "leave out chunks that are not wanted"
            )
        skipped = np.zeros(len(tables), np.int64)
        skipped[:1] = first_token // self._cache.block_tokens
        offsets = block_offsets(self._cache, self._layout, tables, skipped)
        if written:
            check_blocks_differ(offsets[np.arange(offsets.shape[1]) >= skipped[:, None]])


def _check_fits(cache: PagedCache, layout: Layout) -> None:
    """Raise InvalidRequest unless a chunk of the layout can lie in the cache."""
    anywhere = Region(Place.DEVICE, 0, layout.nbytes).span(0, layout.nbytes)
    blocks = -(-layout.tokens // cache.block_tokens)
    gather(cache, layout, [anywhere], [[0] * blocks])
