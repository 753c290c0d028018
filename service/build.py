"""The composition root: every class is chosen and joined here, from the configuration."""

import gc
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvtier.chunks import ChunkKey
from kvtier.config import Config
from kvtier.errors import AlreadyRunning, ConfigError
from kvtier.kernels.codecs import codec_by_name
from kvtier.kernels.device import DeviceError
from kvtier.kernels.devices import open_device
from kvtier.kernels.shared_memory import SharedMemory, remove_stale
from kvtier.metrics import Counters
from kvtier.sections import Cpu, Disk, Gpu, Tenants
from kvtier.service.cache import Cache, Retained
from kvtier.service.curves import curves_of
from kvtier.service.demotion import Demotion, When, Writing
from kvtier.service.explain import Explainer
from kvtier.service.history import History
from kvtier.service.journal import FILE_BYTES, Journal, recall
from kvtier.service.learning import MOST_BYTES as MOST_LEARNED_BYTES
from kvtier.service.learning import Learning
from kvtier.service.pins import Pins
from kvtier.service.placement import Memory, Placement, Rules, Tiers
from kvtier.service.promotion import Promotions
from kvtier.service.raising import Raisings
from kvtier.service.sessions import Sessions
from kvtier.service.vram import Vram
from kvtier.service.vram_loss import watch
from kvtier.service.write_behind import WriteBehind
from kvtier.tiers.base import Store
from kvtier.tiers.curve_tenants import Curves
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.policies.registry import Family, make_family
from kvtier.tiers.rebuild import rebuild
from kvtier.tiers.tree import Branch, TierId
from kvtier.transfer.bus import Bus, Pacing
from kvtier.transfer.mover import Mover

logger = logging.getLogger(__name__)

# One part in so many of the disk's capacity for each of the journal's files.
_JOURNAL_SHARE = 128

Progress = Callable[[str, int, int], None]
"""Told of long work: what it is, how much is done, of how much."""


@dataclass(slots=True)
class DiskSide:
    """The parts that exist only with a disk tier."""

    store: Store
    mover: Mover
    write_behind: WriteBehind
    demotion: Demotion
    journal: Journal


@dataclass(slots=True)
class Core:
    """The service without its wire."""

    cache: Cache
    explainer: Explainer
    memory: Memory
    disk: DiskSide | None
    vram: Vram | None
    learning: Learning
    curves: Curves
    flush_s: float

    def start(self) -> None:
        """Start the lanes of the bus and of the disk; needs the running loop."""
        self.cache.pins.start()
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
        await self.cache.pins.close()
        await self.cache.removals.close()
        await self.learning.close()
        if self.disk is not None:
            self.disk.demotion.stopping()
            flushed = await self.disk.write_behind.flush(self.flush_s)
            await self.disk.write_behind.close()
            await self.disk.mover.close()
            await self.disk.journal.close(keep=not self.disk.demotion.all_saved)
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
    families = {tier: make_family(config.eviction.policy) for tier in TierId}
    rules = Rules(lambda tier: families[tier].policy(), _quotas(config.tenants))
    placement = Placement(Tiers(memory, store, vram), history, counters, rules)
    learning = _learn(placement, families, config)
    disk = _join_disk(placement, config.disk)
    sessions = Sessions(
        placement.index, config.limits.sessions, memory.region.path, counters.add_aborted
    )
    promotions = Promotions(placement, disk.mover if disk is not None else None)
    raisings = Raisings(placement, vram) if vram is not None else None
    if vram is not None:
        watch(vram, placement, sessions)
    retained = Retained(
        config.retention.ttl_s,
        config.limits,
        config.disk.read_ahead_percent,
    )
    pins = Pins(placement, config.tenants.pin_percent)
    cache = Cache(placement, promotions, sessions, retained, pins, raisings)
    explainer = Explainer(placement.index, history, config)
    curves = _draw_curves(cache, config)
    flush_s = config.server.shutdown_flush_s
    return Core(cache, explainer, memory, disk, vram, learning, curves, flush_s)


def _draw_curves(cache: Cache, config: Config) -> Curves:
    """What the hit ratio would be with other capacities, from the prompts that come."""
    curves, clock = curves_of(config), cache.placement.clock

    def seen(branch: Branch, keys: Sequence[ChunkKey], used: bool) -> None:
        curves.asked(branch.tenant.name, branch.nbytes, keys, clock(), reads=used)

    cache.uses.on_prompt = seen
    return curves


def _learn(placement: Placement, families: dict[TierId, Family], config: Config) -> Learning:
    """What the policies learn, and did in an earlier run."""
    name = config.eviction.policy
    learners = {f"{tier.name}.{name}": family.learner for tier, family in families.items()}
    learning = Learning(learners, config.disk.directory)
    learning.restore()
    placement.on_asked = learning.asked
    return learning


def _quotas(tenants: Tenants) -> dict[TierId, int]:
    return {
        TierId.GPU: tenants.gpu_percent,
        TierId.CPU: tenants.cpu_percent,
        TierId.DISK: tenants.disk_percent,
    }


def _join_disk(placement: Placement, disk: Disk) -> DiskSide | None:
    """Bring the index back from the store, and set up what writes to it."""
    store = placement.store
    if store is None or disk.directory is None:
        return None
    for unreachable in rebuild(placement.index, store.spaces(), store.records()):
        store.delete(unreachable)
    mover = Mover(store, disk.read_threads)
    interval_s = disk.commit_interval_ms / 1000
    write_behind = WriteBehind(placement, mover, disk.commit_bytes, interval_s)
    writing = Writing(When(disk.write), disk.write_reuse_percent / 100)
    demotion = Demotion(placement, writing, write_behind)
    placement.on_commit, placement.on_hit = demotion.committed, demotion.asked
    placement.is_unsaved, placement.passes = demotion.is_unsaved, demotion.passes
    journal = Journal(disk.directory, placement.clock, _journal_file_bytes(disk))
    recall(journal, placement.history, placement.index)
    placement.on_stored, placement.on_gone = journal.stored, journal.gone
    return DiskSide(store, mover, write_behind, demotion, journal)


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
    capacity = disk.capacity - 2 * _journal_file_bytes(disk) - 2 * MOST_LEARNED_BYTES
    return DiskTier.open(disk.directory, capacity, codec, disk.read_threads)


def _journal_file_bytes(disk: Disk) -> int:
    return min(FILE_BYTES, disk.capacity // _JOURNAL_SHARE)


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
