"""What goes wrong on the device, at the service or at the caller costs chunks, and nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from kvtier.client import Client, LoadedChunk, PagedEngine
from kvtier.errors import InvalidRequest
from kvtier.kernels.compiled import HostKernels
from kvtier.kernels.device import (
    DeviceError,
    DeviceFault,
    OutOfDeviceMemory,
    Place,
    Region,
    Span,
    Stream,
)
from kvtier.kernels.host import Chaos, HostDevice
from kvtier.kernels.host_streams import HostStream
from tests.client.paged_world import (
    LAYERS,
    MIXED,
    Case,
    CountedKernels,
    Lent,
    World,
    bytes_of,
    device_of,
    nothing_comes_later,
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize(
    ("places", "right"),
    [(MIXED, 2), ((Place.DEVICE,) * 3, 0), ((Place.HOST,) * 3, 3)],
    ids=["mixed", "VRAM", "RAM"],
)
def test_chunks_in_vram_count_only_if_the_service_still_held_them(
    kernels: HostKernels, places: tuple[Place, ...], right: int
) -> None:
    with device_of(kernels, 1) as device:
        world = World(Case(places=places), device)
        load = world.load()
        world.shelf.alive = False
        assert load.finish() == right
        assert load.finish() == right
        world.stream.synchronize()


def test_the_lease_ends_once_and_after_the_copies(kernels: HostKernels) -> None:
    counted = CountedKernels(kernels)
    with device_of(counted, None) as device:
        world = World(Case(places=MIXED), device)
        with world.load() as load:
            held = [world.shelf.content(index).tobytes() for index in range(len(MIXED))]
        assert load.finish() == len(MIXED)
        after = [world.shelf.content(index).tobytes() for index in range(len(MIXED))]
        assert all(one != other for one, other in zip(held, after, strict=True))


def test_without_a_device_of_the_session_everything_is_a_miss(kernels: HostKernels) -> None:
    with device_of(kernels, 1) as device:
        world = World(Case(), device)
        world.shelf.reaches_device = False
        with world.load() as load:
            assert load.chunks == 0
            world.stream.wait(load.ready(0))
        assert load.finish() == 0
        assert world.offload().stored == []


class Refusing(HostDevice):
    """Refuses the launch or copy of a number, counted together from 0 once it is armed."""

    def __init__(self, kernels: HostKernels, seed: int) -> None:
        super().__init__(Chaos(seed), kernels)
        self.left = -1

    def _count(self) -> None:
        self.left -= 1
        if self.left == -1:
            raise DeviceError("refused")

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        self._count()
        super().copy(stream, pairs)

    def launch(self, stream: Stream, kernel: str, threads: int, job: bytes) -> None:
        self._count()
        super().launch(stream, kernel, threads, job)


@pytest.mark.parametrize("refused", range(1, 6))
def test_what_the_device_refuses_is_not_loaded_and_the_next_load_is(
    kernels: HostKernels, refused: int, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(4):
        device = Refusing(kernels, seed)
        world = World(Case(places=MIXED, by_layer=bool(seed % 2)), device)
        device.left = refused
        with world.load() as load:
            assert load.chunks == 0
            load.ready(LAYERS - 1).synchronize()
        assert load.finish() == 0
        assert "nothing is loaded: refused" in caplog.text
        assert nothing_comes_later(world)
        for index, chunk in enumerate(world.chunks):
            world.shelf.content(index)[:] = chunk
        with world.load() as load:
            assert load.finish() == len(MIXED)
        world.stream.synchronize()
        assert bytes_of(world.blocks).tobytes() == world.expected(len(MIXED)).tobytes()
        device.close()


@pytest.mark.parametrize("refused", range(1, 9))
def test_what_the_device_refuses_is_not_stored(
    kernels: HostKernels, refused: int, caplog: pytest.LogCaptureFixture
) -> None:
    device = Refusing(kernels, refused)
    world = World(Case(places=(Place.HOST,) * 4), device)
    device.left = refused  # gather 0, copy 0, gather 1, copy 1, ...; the engine's copy was before
    stored = world.offload().stored
    assert len(stored) < 4
    assert nothing_comes_later(world)
    assert "an offload ends early: refused" in caplog.text
    assert world.shelf.stored == {index: world.gathered(index) for index in stored}
    assert world.offload().stored == [0, 1, 2, 3]
    device.close()


@pytest.mark.parametrize("chaos", [None, 1, 2])
@pytest.mark.parametrize("first", ["load", "offload"])
def test_after_a_fault_loads_are_misses_and_nothing_is_offloaded(
    kernels: HostKernels, chaos: int | None, first: str, caplog: pytest.LogCaptureFixture
) -> None:
    """For good, said once, and without asking the service or the device."""
    counted = CountedKernels(kernels)
    with device_of(counted, chaos) as device:
        world = World(Case(places=MIXED), device)
        counted.fail = True
        if first == "load":
            assert world.load().finish() == 0
        else:
            assert world.offload().stored == []
        assert nothing_comes_later(world)
        counted.fail, counted.runs, world.shelf.asked = False, 0, 0
        for _ in range(2):
            with world.load() as load:
                assert load.chunks == 0
                world.stream.wait(load.ready(LAYERS - 1))  # the engine goes on by itself
            assert load.finish() == 0
            outcome = world.offload()
            assert (outcome.stored, outcome.existing) == ([], [])
            assert set(outcome.refused.values()) == {"the device is at fault"}
            assert list(outcome.refused) == list(range(len(MIXED)))
        world.stream.synchronize()
        assert bytes_of(world.blocks).tobytes() == world.before.tobytes()
        assert (counted.runs, world.shelf.asked) == (0, 0)
        assert caplog.text.count("the device is at fault: work on stream") == 1
        assert len(caplog.records) == 1
        with pytest.raises(InvalidRequest):  # a caller's mistake stays one
            world.paged.load(world.prefix, [], after=world.stream.record())
        world.paged.close()


def test_a_fault_that_several_loads_meet_is_said_once(
    kernels: HostKernels, caplog: pytest.LogCaptureFixture
) -> None:
    counted = CountedKernels(kernels)
    with device_of(counted, 1) as device:
        world = World(Case(places=(Place.HOST,) * 4), device)
        loads = [world.load(0, 2), world.load(2)]
        counted.fail = True
        assert [load.finish() for load in loads] == [0, 0]
        assert [record.levelname for record in caplog.records] == ["ERROR"]


class NoKernels(HostDevice):
    """Copies and launches nothing, as a GPU without NVRTC."""

    def launch(self, stream: Stream, kernel: str, threads: int, job: bytes) -> None:
        raise DeviceError("launch: no libnvrtc; install cupy")


def test_without_kernels_everything_is_a_miss_and_said_once(
    kernels: HostKernels, caplog: pytest.LogCaptureFixture
) -> None:
    device = NoKernels(Chaos(1), kernels)
    world = World(Case(places=(Place.HOST,) * 3), device)
    for _ in range(3):
        assert world.load().finish() == 0
    for _ in range(3):
        assert world.offload().stored == []
    assert world.shelf.asked == 6  # it may be another kernel's lack
    assert [record.message for record in caplog.records] == [
        "kvtier: nothing is loaded: launch: no libnvrtc; install cupy",
        "kvtier: an offload ends early: launch: no libnvrtc; install cupy",
    ]
    device.close()


class FallsOff(HostDevice):
    """As a GPU does after a fault, it refuses everything from when it is broken."""

    broken = False

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        if self.broken:
            raise DeviceFault("fallen off the bus")
        super().copy(stream, pairs)

    def release(self, region: Region) -> None:
        if self.broken:
            raise DeviceFault("fallen off the bus")
        super().release(region)


def test_an_engine_of_a_dead_device_closes(
    kernels: HostKernels, caplog: pytest.LogCaptureFixture
) -> None:
    device = FallsOff(Chaos(1), kernels)
    world = World(Case(places=MIXED), device)
    after = world.stream.record()
    device.broken = True
    with world.paged:
        for _ in range(2):
            assert world.paged.load(world.prefix, world.tables, after=after).finish() == 0
            assert world.paged.offload(world.prefix, world.tables, after=after).stored == []
    assert world.shelf.asked == 1
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    device.broken = False
    device.close()


@pytest.mark.parametrize("seed", range(6))
def test_what_arrived_before_a_fault_is_stored_and_nothing_after(
    kernels: HostKernels, seed: int
) -> None:
    device = FailsLater(kernels, seed)
    world = World(Case(places=(Place.HOST,) * 6), device)
    device.left = 1 + seed  # the first copy is the engine's own
    stored = world.offload().stored
    assert stored == list(range(seed))
    assert world.shelf.stored == {index: world.gathered(index) for index in stored}
    assert nothing_comes_later(world)
    device.close()


class FailsLater(HostDevice):
    """The copy of a number, counted from 0 once it is armed, fails where the host waits."""

    def __init__(self, kernels: HostKernels, seed: int) -> None:
        super().__init__(Chaos(seed), kernels)
        self.left = -1

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        def fail() -> None:
            raise DeviceError("the copy engine is on fire")

        self.left -= 1
        if self.left == -1:
            assert isinstance(stream, HostStream)
            stream.queue(fail)
        super().copy(stream, pairs)


class Interrupted(Lent):
    """A load that somebody interrupts after some chunks have landed."""

    def __iter__(self) -> Iterator[LoadedChunk]:
        chunks = super().__iter__()
        for _ in range(3):
            yield next(chunks)
        raise KeyboardInterrupt


def test_an_interrupted_load_lets_go_only_when_nothing_is_read(
    kernels: HostKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.client.paged_world.Lent", Interrupted)
    for seed in range(8):
        with device_of(kernels, seed) as device:
            world = World(Case(places=(Place.HOST,) * 4), device)
            with pytest.raises(KeyboardInterrupt):
                world.load()
            now = bytes_of(world.blocks).tobytes()
            assert now == world.expected(3).tobytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tables": [[0, 1]] * 4}, "tables: 4 given for 5 chunks"),
        ({"tables": [[0, 1]] * 5}, "a block is named twice"),
        ({"tables": [[0]] * 5}, r"tables\[0\]: 1 blocks given"),
        ({"tables": [[n, 99] for n in range(5)]}, r"tables\[0\]\[1\]: block 99 given"),
        (
            {"tables": [[0, 1], [99, 2], [3, 4], [5, 6], [7, 8]], "first_token": 4},
            r"tables\[1\]\[0\]: block 99 given",
        ),
        ({"first_token": 8}, "first_token: 8 given, allowed is 0 to 7"),
        ({"first_token": -1}, "first_token: -1 given"),
    ],
)
def test_a_bad_request_is_refused_before_the_service_is_asked(
    kernels: HostKernels, given: dict[str, Any], message: str
) -> None:
    with device_of(kernels, 1) as device:
        world = World(Case(), device)
        request = {"tables": world.tables, "after": world.stream.record(), **given}
        with pytest.raises(InvalidRequest, match=message):
            world.paged.load(world.prefix, **request)
        if "first_token" not in given and "twice" not in message:
            with pytest.raises(InvalidRequest, match=message):
                world.paged.offload(world.prefix, **request)
        assert not world.shelf.asked


def test_blocks_that_are_left_alone_may_be_any(kernels: HostKernels) -> None:
    with device_of(kernels, 1) as device:
        world = World(Case(first_token=4), device)
        world.tables[0][0] = 99
        assert world.load().finish() == 5
        assert bytes_of(world.blocks).tobytes() == world.expected(5).tobytes()


def test_an_engine_that_cannot_be_right_is_refused(kernels: HostKernels) -> None:
    with device_of(kernels, 1) as device:
        world = World(Case(), device)
        client = cast(Client, world.shelf)
        with pytest.raises(InvalidRequest, match="staging_bytes: 1000 given, least is 5120"):
            PagedEngine(client, device, world.cache, staging_bytes=1000)
        other = replace(world.cache, bases=world.cache.bases[:2])
        with pytest.raises(InvalidRequest, match=r"layout\.layers: 3 given, the cache has 2"):
            PagedEngine(client, device, other, staging_bytes=1 << 20)


def test_a_device_without_room_for_staging_says_so_and_stays_usable(kernels: HostKernels) -> None:
    device = HostDevice(None, kernels, memory_bytes=1 << 20)
    world = World(Case(), device)
    client = cast(Client, world.shelf)
    with pytest.raises(OutOfDeviceMemory, match=r"allocate: \d+ bytes wanted, \d+ free"):
        PagedEngine(client, device, world.cache, staging_bytes=1 << 20)
    assert world.load().finish() == 5
    device.close()


def test_closing_gives_staging_back(kernels: HostKernels) -> None:
    device = HostDevice(None, kernels, memory_bytes=1 << 20)
    world = World(Case(), device)
    client = cast(Client, world.shelf)
    for _ in range(2):  # the device has not room for two
        with PagedEngine(client, device, world.cache, staging_bytes=600 << 10):
            pass
    device.close()
