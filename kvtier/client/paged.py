"""An engine's paged cache on a device: chunks go straight into its blocks and out of them."""

from contextlib import suppress
from types import TracebackType
from typing import Self

from kvtier.chunks import Prefix
from kvtier.client.client import Client
from kvtier.client.offloading import Offloaded
from kvtier.client.paged_health import Health
from kvtier.client.paged_jobs import fill_chunks
from kvtier.client.paged_loading import LEAST_COPY_BYTES, Loads, PagedLoad, Tables, parts_of
from kvtier.client.paged_offloading import Offloads
from kvtier.errors import InvalidRequest
from kvtier.kernels.device import Device, DeviceError, DeviceFault, Event, Place, Region
from kvtier.kernels.paged import PagedCache, Places
from kvtier.spaces import Layout

AT_FAULT = "the device is at fault"
_ALIGNMENT = 256  # of what is staged, for the kernels' widest accesses
_OFFLOAD_BUFFERS = 2
_LEAST_BUFFERS = 2 + _OFFLOAD_BUFFERS  # one is filled while another is emptied, either way


class PagedEngine:
    """One engine's blocks, and the way between them and the cache. Where the layout of the client's
    space names an encoding, chunks are quantised on the way out and dequantised on the way in:
    blocks must then hold elements of the layout's dtype, which addresses do not tell.

    `client` is connected with `device`. Of `staging_bytes` on the device, room for two chunks
    serves offloads and the rest loads. Parts of chunks in RAM of at least `least_copy_bytes` are
    staged, smaller ones are read from there. Loads begin on one thread at a time, and so do
    offloads, which may be another.

    Raises InvalidRequest when the cache does not fit the client's space or four chunks do not fit
    in staging, DeviceError when the device has no room for it or the cache is not on it.
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
        for base in {base for planes in cache.bases for base in planes}:
            device.adopt(base, cache.row_bytes)  # a kernel that meets other memory ends the engine
        self._client = client
        self._device = device
        self._cache = cache
        self._layout = layout
        self._staging = device.allocate(count * room)
        buffers = [self._staging.span(place * room, layout.nbytes) for place in range(count)]
        self._health = Health()
        self._offloads = Offloads(device, cache, layout, tuple(buffers[:_OFFLOAD_BUFFERS]))
        self._loads = Loads(device, buffers[_OFFLOAD_BUFFERS:], least_copy_bytes, self._health)

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
        places = self._check(prefix, tables, first_token, written=True)
        if self._health.fault is not None:
            return PagedLoad(None, (), (after,), self._health)
        loading = self._client.load(prefix, deadline_s, in_vram=True)
        parts = parts_of(self._cache, self._layout, by_layer=by_layer)
        return self._loads.begin(loading, parts, places, after)

    def offload(
        self, prefix: Prefix, tables: Tables, *, after: Event, deadline_s: float | None = None
    ) -> Offloaded:
        """Store the chunks of a prefix that the service does not hold yet, from the engine's blocks
        as they are once `after` is done; returns what became of each, when no block is read any
        more. Raises InvalidRequest for tables that cannot be right, before anything is read."""
        places = self._check(prefix, tables, 0, written=False)
        if self._health.fault is not None:
            return Offloaded(refused=dict.fromkeys(range(len(prefix)), AT_FAULT))
        offload = self._client.offload(prefix, deadline_s)
        try:
            with offload:
                self._offloads.fill(offload, places, after)
        except DeviceError as error:
            self._offloads.settle()  # chunks behind one that did not arrive may be gathered still
            self._health.note("an offload ends early", error)
        return offload.outcome

    def close(self) -> None:
        """Give staging back. All loads are finished, and no offload is under way."""
        with suppress(DeviceFault):  # its memory goes with the process
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

    def _check(self, prefix: Prefix, tables: Tables, first_token: int, *, written: bool) -> Places:
        if len(tables) != len(prefix):
            raise InvalidRequest(f"tables: {len(tables)} given for {len(prefix)} chunks")
        if not 0 <= first_token < self._layout.tokens:
            raise InvalidRequest(
                f"first_token: {first_token} given, allowed is 0 to {self._layout.tokens - 1}; "
                "leave out chunks that are not wanted"
            )
        first = [first_token, *[0] * len(tables)][: len(tables)]
        return Places.of(self._cache, self._layout, tables, first, written=written)


def _check_fits(cache: PagedCache, layout: Layout) -> None:
    """Raise InvalidRequest unless a chunk of the layout can lie in the cache."""
    anywhere = Region(Place.DEVICE, 0, layout.nbytes).span(0, layout.nbytes)
    blocks = -(-layout.tokens // cache.block_tokens)
    places = Places.of(cache, layout, [[0] * blocks])
    fill_chunks(cache, layout, [anywhere], places)
