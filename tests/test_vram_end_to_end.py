"""Clients with a device beside a real service: chunks in VRAM, and what happens when it goes.

The device is the simulated one, in both processes: its memory crosses them as a GPU's would.
"""

import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.chunks import Prefix
from kvtier.client import Client, KeyState, connect
from kvtier.kernels.device import Device, DeviceError, Place, Region, Span, Urgency
from kvtier.kernels.host import HostDevice
from kvtier.kernels.host_streams import Chaos
from tests.sidecar import HANG_S, Sidecar, content_of, load, offload, prompt_of, space_of, until

NBYTES = space_of().layout.nbytes
GPU = ("gpu.device=host", "gpu.capacity=1MiB")


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    with Sidecar(tmp_path, *GPU) as running:
        yield running


@pytest.fixture(params=[None, 1, 2], ids=["threads", "chaos 1", "chaos 2"])
def device(request: pytest.FixtureRequest) -> Iterator[HostDevice]:
    made = HostDevice(Chaos(request.param) if request.param else None)
    yield made
    made.close()


def connected(sidecar: Sidecar, device: Device | None) -> Client:
    client = connect(sidecar.target, space_of(), deadline_s=HANG_S, device=device)
    assert client.wait_ready(HANG_S)
    return client


class Engine:
    """An engine's own memory on a device: room for one chunk, and a way to see it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.stream = device.stream(Urgency.LOADS)
        self.memory = device.allocate(NBYTES)
        self.seen = memoryview(mmap.mmap(-1, NBYTES))
        self.window: Region = device.register(self.seen)

    def take(self, span: Span) -> bytes:
        """Copy a chunk into the engine's memory, and say what is there."""
        whole = self.memory.span(0, NBYTES)
        self.device.copy(self.stream, [(whole, span)])
        self.device.copy(self.stream, [(self.window.span(0, NBYTES), whole)])
        self.stream.synchronize()
        return bytes(self.seen)

    def give(self, span: Span, content: bytes) -> None:
        """Have a chunk in the engine's memory, and copy it out."""
        self.seen[:] = content
        whole = self.memory.span(0, NBYTES)
        self.device.copy(self.stream, [(whole, self.window.span(0, NBYTES))])
        self.device.copy(self.stream, [(span, whole)])
        self.stream.synchronize()


def store(client: Client, engine: Engine, prefix: Prefix) -> None:
    with client.offload(prefix) as wanted:
        for slot in wanted:
            assert slot.span is not None
            engine.give(slot.span, content_of(prefix[slot.index], NBYTES))
    assert len(wanted.outcome.stored) == len(prefix)


def places(client: Client, engine: Engine, prefix: Prefix) -> list[Place]:
    """Load a prefix through the device, check every byte, and say where each chunk was."""
    found = []
    with client.load(prefix, in_vram=True) as loaded:
        for chunk in loaded:
            assert chunk.span is not None
            assert engine.take(chunk.span) == content_of(prefix[chunk.index], NBYTES)
            assert len(chunk.data) == (NBYTES if chunk.span.region.place is Place.HOST else 0)
            found.append(chunk.span.region.place)
    return found


def raised(sidecar: Sidecar, chunks: int) -> None:
    until(lambda: sidecar.stats().counters["raised_chunks"] >= chunks, "chunks are raised")


def test_a_chunk_found_in_ram_is_found_in_vram_next(sidecar: Sidecar, device: HostDevice) -> None:
    engine = Engine(device)
    with connected(sidecar, device) as client:
        prefix = client.prefix(prompt_of(1, 6))
        store(client, engine, prefix)
        assert places(client, engine, prefix) == [Place.HOST] * 6
        raised(sidecar, 6)
        assert places(client, engine, prefix) == [Place.DEVICE] * 6
        assert load(client, prefix) == 6  # whoever does not ask for VRAM gets RAM
        gpu = sidecar.stats().tiers[0]
        assert (gpu.name, gpu.chunks) == ("gpu", 6)


def test_two_engines_share_the_tier(sidecar: Sidecar) -> None:
    devices = [HostDevice(), HostDevice()]
    engines = [Engine(each) for each in devices]
    clients = [connected(sidecar, each) for each in devices]
    prefix = clients[0].prefix(prompt_of(1, 3))
    store(clients[0], engines[0], prefix)
    assert places(clients[1], engines[1], prefix) == [Place.HOST] * 3
    raised(sidecar, 3)
    for client, engine in zip(clients, engines, strict=True):
        assert places(client, engine, prefix) == [Place.DEVICE] * 3
        client.close()
        engine.device.close()


def test_without_a_vram_tier_a_device_still_reaches_ram(tmp_path: Path, device: HostDevice) -> None:
    engine = Engine(device)
    with Sidecar(tmp_path) as sidecar, connected(sidecar, device) as client:
        prefix = client.prefix(prompt_of(1, 2))
        store(client, engine, prefix)
        for _ in range(2):
            assert places(client, engine, prefix) == [Place.HOST] * 2


def test_without_a_device_nothing_is_different(sidecar: Sidecar) -> None:
    with connected(sidecar, None) as client:
        prefix = client.prefix(prompt_of(1, 3))
        assert len(offload(client, prefix).stored) == 3
        with client.load(prefix, in_vram=True) as loaded:
            chunks = [(bytes(chunk.data), chunk.span) for chunk in loaded]
        assert chunks == [(content_of(key, NBYTES), None) for key in prefix]
        assert sidecar.stats().counters["raised_chunks"] == 0


class Elsewhere(HostDevice):
    """Another GPU than the service's: it cannot open what that exports."""

    def open(self, handle: bytes, nbytes: int) -> Region:
        raise DeviceError("open: the handle is of another device")


def test_an_engine_on_another_device_goes_on_without(
    sidecar: Sidecar, caplog: pytest.LogCaptureFixture
) -> None:
    device = Elsewhere()
    with connected(sidecar, device) as client:
        prefix = client.prefix(prompt_of(1, 2))
        assert len(offload(client, prefix).stored) == 2
        with client.load(prefix, in_vram=True) as loaded:
            assert [bytes(chunk.data) for chunk in loaded] == [
                content_of(key, NBYTES) for key in prefix
            ]
    assert "another device" in caplog.text
    device.close()


def test_a_dead_service_is_a_miss_and_its_memory_is_let_go(
    sidecar: Sidecar, device: HostDevice
) -> None:
    engine = Engine(device)
    with connected(sidecar, device) as client:
        prefix = client.prefix(prompt_of(1, 4))
        store(client, engine, prefix)
        places(client, engine, prefix)
        raised(sidecar, 4)
        with client.load(prefix, in_vram=True) as loaded:
            first = next(iter(loaded))
            assert first.span is not None
            sidecar.kill()
            engine.take(first.span)  # no fault, whatever it reads
        until(lambda: not client.connected, "the session is over")
        assert places(client, engine, prefix) == []
        sidecar.start()
        assert client.wait_ready(HANG_S)
        store_again = len(prefix) - client.lookup(prefix)
        assert 0 <= store_again <= 4
        assert places(client, engine, prefix) == [Place.HOST] * (4 - store_again)


def test_a_dead_engine_gives_its_leases_back(sidecar: Sidecar) -> None:
    device = HostDevice()
    engine = Engine(device)
    with connected(sidecar, device) as client:
        prefix = client.prefix(prompt_of(1, 2))
        store(client, engine, prefix)
        places(client, engine, prefix)
        raised(sidecar, 2)
        with client.load(prefix, in_vram=True) as loaded:
            assert len(list(loaded)) == 2
            assert sidecar.stats().leases >= 1
    until(lambda: sidecar.stats().leases == 0, "the leases ended")
    device.close()


def test_explain_and_lookup_know_vram(sidecar: Sidecar, device: HostDevice) -> None:
    engine = Engine(device)
    with connected(sidecar, device) as client:
        prefix = client.prefix(prompt_of(1, 2))
        store(client, engine, prefix)
        places(client, engine, prefix)
        raised(sidecar, 2)
        assert client.locate(prefix) is not None
        assert [each.state for each in client.explain(prefix)] == [KeyState.RAM] * 2


def test_a_gpu_that_cannot_be_had_costs_its_tier_alone(tmp_path: Path) -> None:
    with Sidecar(tmp_path, "gpu.device=cuda:7") as sidecar:
        assert any("gpu: no VRAM tier" in line for line in sidecar.log)
        sidecar.log.clear()  # it is meant to complain
        with connected(sidecar, None) as client:
            prefix = client.prefix(prompt_of(1, 2))
            offload(client, prefix)
            assert load(client, prefix) == 2
        assert [tier.name for tier in sidecar.stats().tiers] == ["cpu", "disk"]


def test_too_much_vram_costs_its_tier_alone(tmp_path: Path) -> None:
    with Sidecar(tmp_path, "gpu.device=host", "gpu.capacity=4TiB") as sidecar:
        assert any("gpu: no VRAM tier" in line for line in sidecar.log)
        sidecar.log.clear()
        assert [tier.name for tier in sidecar.stats().tiers] == ["cpu", "disk"]


def test_without_the_setting_no_device_is_imported() -> None:
    script = (
        "import sys; import kvtier.service.build, kvtier.client; "
        "print({'cupy', 'torch', 'kvtier.kernels.cuda', 'kvtier.kernels.host'} & {*sys.modules})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=HANG_S
    )
    assert ran.stdout.strip() == "set()"
