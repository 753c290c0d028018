"""The composition root: every class is chosen and joined here, from the configuration."""

import gc
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvtier.config import Config, Cpu, Disk, Gpu
from kvtier.errors import AlreadyRunning, ConfigError
from kvtier.kernels.codecs import codec_by_name
from kvtier.kernels.device import DeviceError
from kvtier.kernels.devices import open_device
from kvtier.kernels.shared_memory import SharedMemory, remove_stale
from kvtier.metrics import Counters
from kvtier.service.cache import Cache, Rules
from kvtier.service.explain import Explainer
from kvtier.service.history import History
from kvtier.service.placement import Memory, Placement
from kvtier.service.promotion import Promotions
from kvtier.service.raising import Raisings
from kvtier.service.sessions import Sessions
from kvtier.service.vram import Vram
from kvtier.service.write_behind import WriteBehind
from kvtier.tiers.base import Store
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.rebuild import rebuild
from kvtier.transfer.bus import Bus, Pacing
from kvtier.transfer.mover import Mover, Priority

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told of long work: what it is, how much is done, of how much."""


@dataclass(slots=True)
class DiskSide:
    """The parts that exist only with a disk tier."""

    store: Store
    mover: Mover
    write_behind: WriteBehind


@dataclass(slots=True)
class Core:
    """The service without its wire."""

    cache: Cache
    explainer: Explainer
    memory: Memory
    disk: DiskSide | None
    vram: Vram | None
    flush_s: float

    def start(self) -> None:
        """Start the lanes of the bus and of the disk; needs the running loop."""
        if self.vram is not None:
            self.vram.bus.start()
        if self.disk is not None:
            self.disk.mover.start()
            self.disk.write_behind.start()

    async def stop(self) -> bool:
        """End all sessions, write what RAM still holds, free everything. False when
        server.shutdown_flush_s was too short to write it all."""
        flushed = True
        await self.cache.sessions.close()
        if self.disk is not None:
            flushed = await self.disk.write_behind.flush(self.flush_s)
            await self.disk.write_behind.close()
            await self.disk.mover.close()
            await self.disk.store.flush()
            await self.disk.store.close()
        if self.vram is not None:
            await self.vram.close()
        self.memory.region.close(unlink=True)
        return flushed


def build(config: Config, progress: Progress) -> Core:
    """Open the tiers, bring the index back and join the parts. Must run in an event loop.

    Raises AlreadyRunning when another service owns the disk directory, ConfigError when a tier does
    not fit where it is told to be.
    """
    with _no_collection():
        return _build(config, progress)


def _build(config: Config, progress: Progress) -> Core:
    region = _create_arena(config.cpu)
    try:
        store = _open_store(config.disk)
    except BaseException:
        region.close(unlink=True)
        raise
    for done in region.populate():  # the slow part comes when nothing can be refused any more
        progress("arena", done, region.nbytes)
    if not region.lock():
        logger.warning(
            "cpu: the arena may be paged out: raise the limit of locked memory (memlock)"
        )
    memory = Memory(region)
    counters = Counters()
    history = History(config.limits.history)
    vram = _open_vram(config.gpu, region)
    placement = Placement(memory, store, history, counters, vram=vram)
    disk, mover = None, None
    if store is not None:
        for unreachable in rebuild(placement.index, store.spaces(), store.records()):
            store.delete(unreachable)
        mover = Mover(store, config.disk.read_threads)
        interval_s = config.disk.commit_interval_ms / 1000
        write_behind = WriteBehind(placement, mover, config.disk.commit_bytes, interval_s)
        placement.on_commit = write_behind.add
        disk = DiskSide(store, mover, write_behind)
    sessions = Sessions(
        placement.index, config.limits.sessions, memory.region.path, counters.add_aborted
    )
    promotions = Promotions(placement, mover)
    placement.on_lonely = lambda node: promotions.join(node, Priority.PREFETCH)
    raisings = Raisings(placement, vram) if vram is not None else None
    rules = Rules(config.retention.ttl_s, config.limits)
    cache = Cache(placement, promotions, sessions, rules, raisings)
    explainer = Explainer(placement.index, history)
    return Core(cache, explainer, memory, disk, vram, config.server.shutdown_flush_s)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector off while many objects are made to stay: it would look at all of
    them again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _open_store(disk: Disk) -> Store | None:
    if disk.directory is None:
        return None
    codec = codec_by_name(disk.compression)
    return DiskTier.open(disk.directory, disk.capacity, codec, disk.read_threads)


def _open_vram(gpu: Gpu, arena: SharedMemory) -> Vram | None:
    """The VRAM tier; None where there is none, or where it cannot be had: the others serve."""
    if not gpu.device:
        return None
    try:
        device = open_device(gpu.device)
        try:
            region = device.allocate(gpu.capacity)
            ram = device.register(arena.view)
            bus = Bus(device, Pacing(gpu.in_flight, gpu.bus_share_percent / 100))
            return Vram(device, region, ram, bus)
        except BaseException:
            device.close()
            raise
    except DeviceError as error:
        logger.error("gpu: no VRAM tier: %s", error)
        return None


def _create_arena(cpu: Cpu) -> SharedMemory:
    for arena in remove_stale(cpu.directory, "kvtier-*.arena"):
        for tether in arena.parent.glob(f"{arena.name}.*"):
            tether.unlink(missing_ok=True)
    while True:
        path = cpu.directory / f"kvtier-{secrets.token_hex(8)}.arena"
        try:
            region = SharedMemory.create(path, cpu.capacity)
        except AlreadyRunning:
            continue  # another service that starts now is looking whether it is stale
        except OSError as error:
            raise ConfigError(f"cpu.directory: no arena in {cpu.directory}: {error}") from None
        if path.exists():
            return region
        region.close(unlink=False)  # it took it for stale, just before we locked it
