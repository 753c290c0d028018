"""An open session, seen from the client: what every request needs, and when its memory may go."""

import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from kvtier.chunks import KEY_BYTES, ChunkKey
from kvtier.client.transport import Stream, Transport
from kvtier.kernels.device import Device, DeviceError, Region, Span
from kvtier.kernels.shared_memory import SharedMemory
from kvtier.proto import cache_pb2 as pb
from kvtier.spaces import Space
from kvtier.transfer.paths.shm import HeldTether

MAX_ARENA_BYTES = 1 << 46
MAX_KEYS = 1 << 18  # in one request: more may not fit in one message of the answer


@dataclass(frozen=True, slots=True)
class OnDevice:
    """What the client's device reaches: the arena in RAM, registered, and on the path cuda_ipc the
    one in VRAM."""

    device: Device
    ram: Region
    vram: Region | None

    def close(self) -> None:
        """Give both back; a device that is at fault has nothing to give."""
        for region in (self.vram, self.ram):
            if region is not None:
                with suppress(DeviceError):
                    self.device.release(region)


@dataclass(slots=True, eq=False)
class Attached:
    """The arena as this process maps it, and the promise to the service that we may touch it."""

    region: SharedMemory
    tether: HeldTether
    on_device: OnDevice | None

    def span(self, offset: int, nbytes: int, *, in_vram: bool) -> Span | None:
        """A slot as the client's device reaches it; None without a device. Raises ValueError when
        the service named memory outside the arena, or one that there is not."""
        if self.on_device is None and not in_vram:
            return None
        arena = self.on_device and (self.on_device.vram if in_vram else self.on_device.ram)
        if not arena:
            raise ValueError("a slot in VRAM, which this session does not reach")
        return arena.span(offset, nbytes)

    def slot(self, offset: int, nbytes: int) -> memoryview:
        """A slot's bytes. Raises ValueError when the service named memory outside the arena."""
        if offset + nbytes > self.region.nbytes:
            raise ValueError(f"slot at {offset}: outside the arena of {self.region.nbytes} bytes")
        return self.region.view[offset : offset + nbytes]


@dataclass(slots=True, eq=False)
class Session:
    """One open session. `users` counts the loads and offloads that may touch its memory: the arena
    is let go when the session is over and the last of them has left."""

    id: bytes
    transport: Transport
    stream: "Stream[pb.SessionEvent]"
    chunk_bytes: int
    max_keys: int
    max_write_lease_bytes: int
    max_token_bytes: int
    attached: Attached | None
    _users: int = 0
    _over: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _lease_ids: "count[int]" = field(default_factory=lambda: count(1))
    _process: int = field(default_factory=os.getpid)

    @property
    def inherited(self) -> bool:
        """Whether this is the copy of a process that was forked: neither the connection nor the
        slots are its own, so it must not touch the one or give back the other."""
        return self._process != os.getpid()

    @property
    def reaches_vram(self) -> bool:
        """Whether chunks may be answered in VRAM."""
        on_device = self.attached.on_device if self.attached is not None else None
        return on_device is not None and on_device.vram is not None

    def next_lease_id(self) -> int:
        return next(self._lease_ids)

    def enter(self) -> bool:
        """Start using the session's memory; False when the session is over."""
        with self._lock:
            if self._over:
                return False
            self._users += 1
            return True

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            idle = self._over and self._users == 0
        if idle:
            self._let_go()

    def end(self) -> None:
        """The session is over: no new users; its memory goes with the last present one."""
        with self._lock:
            already, self._over = self._over, True
            idle = self._users == 0
        if already:
            return
        self.stream.cancel()
        if idle:
            self._let_go()

    def _let_go(self) -> None:
        if self.attached is not None:
            # Unmapped first: once the tether is loose, the service gives the slots to others.
            if self.attached.on_device is not None:
                self.attached.on_device.close()
            self.attached.region.close(unlink=False)
            self.attached.tether.release()
        self.transport.close()


def attach(
    opened: pb.SessionOpened,
    space: Space,
    transport: Transport,
    stream: "Stream[pb.SessionEvent]",
    device: Device | None,
) -> Session:
    """Check what the service says of a new session and map its arenas, for a device as well.

    Raises ValueError when it is not what was asked for, OSError when the arena cannot be mapped,
    DeviceError when the one in VRAM cannot.
    """
    if opened.space_digest != space.digest or opened.chunk_bytes != space.layout.nbytes:
        raise ValueError("the service opened another space than the one asked for")
    if not opened.session_id or opened.max_keys < 1:
        raise ValueError("the service opened a session without an id or without keys")
    attached = None
    if opened.path != pb.DATA_PATH_INLINE:
        attached = _map_arena(opened.arena)
        if device is not None:
            try:
                attached.on_device = _reach(device, attached.region, opened)
            except BaseException:
                attached.region.close(unlink=False)
                attached.tether.release()
                raise
    return Session(
        id=opened.session_id,
        transport=transport,
        stream=stream,
        chunk_bytes=opened.chunk_bytes,
        max_keys=min(opened.max_keys, MAX_KEYS),
        max_write_lease_bytes=opened.max_write_lease_bytes,
        max_token_bytes=opened.max_token_bytes,
        attached=attached,
    )


def _map_arena(arena: pb.ShmArena) -> Attached:
    if not 0 < arena.nbytes <= MAX_ARENA_BYTES:
        raise ValueError(f"the service names an arena of {arena.nbytes} bytes")
    tether = HeldTether.hold(Path(arena.tether_path))
    try:
        region = SharedMemory.open(Path(arena.path), arena.nbytes)
    except BaseException:
        tether.release()
        raise
    for _ in region.populate():
        pass  # the service has touched the pages; this fills our own page table
    return Attached(region, tether, None)


def _reach(device: Device, arena: SharedMemory, opened: pb.SessionOpened) -> OnDevice:
    """Register the arena in RAM and open the one in VRAM."""
    ram = device.register(arena.view)
    try:
        vram = None
        if opened.path == pb.DATA_PATH_CUDA_IPC:
            if not 0 < opened.vram.nbytes <= MAX_ARENA_BYTES:
                raise ValueError(f"the service names {opened.vram.nbytes} bytes of VRAM")
            vram = device.open(opened.vram.handle, opened.vram.nbytes)
        return OnDevice(device, ram, vram)
    except BaseException:
        device.release(ram)
        raise


def pack_keys(keys: tuple[ChunkKey, ...]) -> bytes:
    """Keys as the wire carries them: packed, 32 bytes each."""
    packed = b"".join(keys)
    assert len(packed) == KEY_BYTES * len(keys)
    return packed
