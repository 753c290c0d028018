"""The service's device is at fault: the VRAM tier goes, once and for all; RAM and disk serve."""

import asyncio
import logging
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from kvtier.client.connection import to_message
from kvtier.config import Config
from kvtier.errors import SessionEnded
from kvtier.kernels.device import DeviceError, DeviceFault, Span, Stream, Urgency
from kvtier.kernels.host import HostDevice
from kvtier.kernels.host_streams import Chaos, HostStream
from kvtier.kernels.shared_memory import SharedMemory
from kvtier.proto import cache_pb2 as pb
from kvtier.sections import Gpu
from kvtier.service import build
from kvtier.service.answers import KeyState, LoadStop, ReserveOutcome
from kvtier.service.curves import curves_of
from kvtier.service.explain import Explainer
from kvtier.service.leases import Mode
from kvtier.service.servicer import Context, Servicer
from kvtier.tiers.base import Outcome
from kvtier.tiers.tree import TierId
from tests.core import Harness, harness, space
from tests.fakes import MemoryStore
from tests.service.test_vram import PATIENCE_S, on_disk, raised, tiers_of, until

FAULT = "the device has fallen off the bus"


class Faulty(HostDevice):
    """The bus' copies fail from when it is broken: at once, or where the host waits. The test's own
    still show what is there."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(Chaos(seed) if seed is not None else None, memory_bytes=1 << 20)
        self.broken = ""

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        def fail() -> None:
            raise DeviceFault(FAULT)

        broken = self.broken if threading.current_thread() is not threading.main_thread() else ""
        if broken == "at once":
            fail()
        if broken == "later":
            assert isinstance(stream, HostStream)
            stream.queue(fail)
        super().copy(stream, pairs)


WAYS = [(None, "at once"), (None, "later"), (1, "at once"), (2, "later"), (3, "later")]


async def meets_it(core: Harness, device: Faulty, way: str) -> None:
    """Break the device, and let the bus find out."""
    await until(core.raisings_idle)  # else there may be no room for one more
    device.broken = way
    session = core.session(in_vram=True)
    prefix = core.chain_of(session, 1, seed=99)
    core.put(session, prefix)
    _, _, lease = await core.get(session, prefix)
    core.cache.release(session, lease.id)
    assert core.vram is not None
    await until(lambda: core.vram is not None and core.vram.lost)
    await until(core.raisings_idle)


@pytest.mark.parametrize(("seed", "way"), WAYS)
async def test_what_was_in_vram_is_found_in_ram_and_on_disk(
    tmp_path: Path, seed: int | None, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = Faulty(seed)
    async with harness(tmp_path, device=device) as core:
        session, later = core.session(in_vram=True), core.session()
        prefix, on_disk_only = core.chain_of(session, 3, 1), core.chain_of(session, 3, 2)
        for each in (on_disk_only, prefix):
            core.put(session, each)
            _, _, lease = await core.get(session, each)
            core.cache.release(session, lease.id)
        await raised(core, 6)
        await on_disk(core, 6)
        while core.placement.index.chunks[TierId.CPU] > 3:  # the prompt that was used last stays
            victim = core.next_victim(session.branch.tenant)
            assert victim is not None
            core.placement.evict(victim)
        with caplog.at_level(logging.WARNING):
            await meets_it(core, device, way)
            await meets_nothing_more(core)
        assert core.placement.index.chunks[TierId.GPU] == 0
        core.placement.index.check()
        for each in (prefix, on_disk_only):
            came, stop, lease = await core.get(later, each)  # checks every byte
            assert (came, stop, tiers_of(lease)) == (3, LoadStop.COMPLETE, [TierId.CPU] * 3)
        assert core.vram is not None
        assert core.vram.arena.used_bytes == 0
        again = core.put(later, core.chain_of(later, 2, 7))
        assert len(again) == 2
    said = [record.message for record in caplog.records if "gpu" in record.message]
    assert len(caplog.records) == len(said) == 1
    assert said[0].startswith("gpu: the VRAM tier is given up, 0 chunks are lost")
    assert FAULT in said[0]


async def meets_nothing_more(core: Harness) -> None:
    """Further copies fail without the device being asked."""
    vram = core.vram
    assert vram is not None
    source, target = vram.region.span(0, 4096), vram.ram.span(0, 4096)
    for urgency in Urgency:
        haul = vram.bus.move(target, source, urgency)
        assert await asyncio.wait_for(haul.outcome, PATIENCE_S) is Outcome.FAILED
        vram.bus.hurry(haul)


@pytest.mark.parametrize(("seed", "way"), WAYS)
async def test_who_read_in_vram_is_not_told_that_it_was_held(
    tmp_path: Path, seed: int | None, way: str
) -> None:
    device = Faulty(seed)
    async with harness(tmp_path, device=device) as core:
        session, other = core.session(in_vram=True), core.session()
        prefix = core.chain_of(session, 2)
        core.put(session, prefix)
        _, _, lease = await core.get(session, prefix)
        core.cache.release(session, lease.id)
        await raised(core, 2)
        _, _, lease = await core.get(session, prefix)
        assert tiers_of(lease) == [TierId.GPU] * 2
        _, _, kept = await core.get(other, prefix)
        await meets_it(core, device, way)
        with pytest.raises(SessionEnded):
            core.cache.sessions.get(session.id)
        assert session.closing.is_set()
        assert lease.ended
        assert core.cache.sessions.get(other.id) is other  # who never reached VRAM goes on
        assert other.leases.find(kept.id, Mode.READ) is kept
        core.cache.end_session(session)  # as the stream does when it ends


async def test_sessions_after_the_fault_are_offered_no_vram(tmp_path: Path) -> None:
    """The answer to a client that would take VRAM, before and after."""
    device = Faulty()

    async def path_of(servicer: Servicer) -> int:
        paths = [pb.DATA_PATH_CUDA_IPC, pb.DATA_PATH_SHM]
        request = pb.OpenSessionRequest(client="test", space=to_message(space()), paths=paths)
        events = servicer.OpenSession(request, cast(Context, None))
        opened = (await anext(events)).opened
        await events.aclose()  # type: ignore[attr-defined]
        assert opened.HasField("vram") == (opened.path == pb.DATA_PATH_CUDA_IPC)
        return opened.path

    async with harness(tmp_path, device=device) as core:
        explainer = Explainer(core.placement.index, core.placement.history, Config())
        servicer = Servicer(core.cache, explainer, curves_of(Config()))
        assert await path_of(servicer) == pb.DATA_PATH_CUDA_IPC
        await meets_it(core, device, "later")
        assert await path_of(servicer) == pb.DATA_PATH_SHM


async def test_what_vram_alone_had_is_lost_and_explained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device, store = Faulty(), MemoryStore(capacity_bytes=1)  # nothing fits on disk
    async with harness(tmp_path, device=device, store=store) as core:
        session, other = core.session(in_vram=True), core.session()
        prefix = core.chain_of(session, 3)
        core.put(session, prefix[:2])
        _, _, lease = await core.get(session, prefix[:2])
        core.cache.release(session, lease.id)
        await raised(core, 2)
        core.only_on_disk()
        core.put(session, prefix)  # what continues it is in RAM, and of no use without it
        await meets_it(core, device, "later")
        assert core.cache.lookup(other, prefix.keys) == (0, 0)
        explainer = Explainer(core.placement.index, core.placement.history, Config())
        answers = explainer.explain(other.branch, prefix.keys, b"", [])
        assert [each.state for each in answers] == [KeyState.CORRUPT] * 3
        assert "the tier that had it lost it" in answers[0].detail
        core.put(other, prefix)
        came, _, _ = await core.get(other, prefix)
        assert came == 3
    assert "3 chunks are lost with it" in caplog.text


@pytest.mark.parametrize(("seed", "way"), WAYS)
async def test_loads_that_wait_for_vram_end_short_and_the_next_ask_the_disk(
    tmp_path: Path, seed: int | None, way: str
) -> None:
    device = Faulty(seed)
    async with harness(tmp_path, device=device) as core:
        session, other = core.session(in_vram=True), core.session()
        prefix = core.chain_of(session, 3)
        core.put(session, prefix)
        await on_disk(core, 3)
        _, _, lease = await core.get(session, prefix)
        core.cache.release(session, lease.id)
        await raised(core, 3)
        core.only_on_disk()
        device.broken = way
        came, stop, lease = await core.get(other, prefix)
        assert (came, stop) == (0, LoadStop.FAILED)
        core.cache.release(other, lease.id)
        came, stop, _ = await core.get(other, prefix)
        assert (came, stop) == (3, LoadStop.COMPLETE)
        assert core.placement.counters.promoted_chunks == 3


@pytest.mark.parametrize("seed", range(24))
async def test_whenever_it_comes_every_byte_is_right_before_and_after(
    tmp_path: Path, seed: int
) -> None:
    """Tiers are small, so chunks go up and down all the time. Loads check every byte."""
    rng = random.Random(seed)
    device = Faulty(seed if seed % 2 else None)
    store = MemoryStore(capacity_bytes=1 if seed % 3 else 1 << 20)
    async with harness(tmp_path, 12, device=device, vram_slots=6, store=store) as core:
        vram = core.vram
        assert vram is not None
        sessions = [core.session(in_vram=True), core.session()]
        fails_at = rng.randrange(10, 40)
        for step in range(80):
            if step == fails_at:
                device.broken = rng.choice(["at once", "later"])
            if sessions[0].closing.is_set():  # the client connects again, without VRAM
                core.cache.end_session(sessions[0])
                sessions[0] = core.session()
            session = rng.choice(sessions)
            prefix = core.chain_of(session, rng.randrange(1, 4), rng.randrange(5))
            lease_id, outcomes = core.reserve(session, prefix)
            granted = [n for n, each in enumerate(outcomes) if each is ReserveOutcome.WRITE]
            core.cache.commit(session, lease_id, granted)
            _, _, lease = await core.get(session, prefix)
            core.cache.release(session, lease.id)
            core.placement.index.check()
        if not vram.lost:  # nothing more had to be copied
            await meets_it(core, device, device.broken)
        await until(core.raisings_idle)
        assert core.placement.index.chunks[TierId.GPU] == 0
        assert vram.arena.used_bytes == 0
        assert await core.write_behind.flush(PATIENCE_S)


class Reached(HostDevice):
    """Says when a copy was queued."""

    def __init__(self) -> None:
        super().__init__(memory_bytes=1 << 20)
        self.queued = threading.Event()

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        super().copy(stream, pairs)
        self.queued.set()


async def test_what_arrives_in_vram_after_the_fault_was_told_does_not_count(
    tmp_path: Path,
) -> None:
    device = Reached()
    async with harness(tmp_path, device=device) as core:
        session = core.session(in_vram=True)
        prefix = core.chain_of(session, 1)
        core.put(session, prefix)
        vram, raisings = core.vram, core.raisings
        assert vram is not None
        assert raisings is not None
        raisings.raise_up([session.branch.nodes[prefix[0]]])
        assert device.queued.wait(PATIENCE_S)  # its lane tells of the copy when this lets it
        vram.bus._stop_at(DeviceFault(FAULT))
        await until(core.raisings_idle)
        assert core.placement.counters.raised_chunks == 0
        assert core.placement.index.chunks[TierId.GPU] == 0
        assert vram.arena.used_bytes == 0
        other = core.session()
        came, _, _ = await core.get(other, prefix)
        assert came == 1


# ── At start ─────────────────────────────────────────────────────────────────────────────────


class NoStreams(HostDevice):
    def stream(self, urgency: Urgency) -> Stream:
        raise DeviceError("stream: out of something")


class NoRegister(HostDevice):
    def register(self, memory: memoryview) -> None:  # type: ignore[override]
        raise DeviceError("register: out of something")


@pytest.mark.parametrize("kind", [NoStreams, NoRegister])
def test_a_device_that_refuses_at_start_costs_its_tier_alone(
    tmp_path: Path,
    kind: type[HostDevice],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = kind(memory_bytes=1 << 21)
    monkeypatch.setattr(build, "open_device", lambda name: device)
    region = SharedMemory.create(tmp_path / "arena", 1 << 20)
    assert build._open_vram(Gpu(device="host", capacity=1 << 20), region) is None
    assert "gpu: no VRAM tier" in caplog.text
    assert "out of something" in caplog.text
    with pytest.raises(DeviceError, match="closed"):
        device.allocate(8)  # what it had taken is given back
    region.close(unlink=True)
