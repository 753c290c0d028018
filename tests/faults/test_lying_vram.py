"""A service that lies about VRAM, and devices that fail: the client goes on with less, and gives
back all that it mapped."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kvtier.client import Client, connect
from kvtier.kernels.device import DeviceError, Place, Region, Urgency
from kvtier.kernels.host import HostDevice
from kvtier.kernels.host_streams import Chaos
from kvtier.proto import cache_pb2 as pb
from tests.contracts.device import buffer, fill
from tests.faults.fake_service import ARENA_BYTES, FakeService
from tests.sidecar import HANG_S, content_of, prompt_of, space_of, until

SPACE = space_of()
NBYTES = SPACE.layout.nbytes
GIANT = 2**64 - 1
HELD = prompt_of(1, 4)


class FakeWithVram(FakeService):
    """Holds every chunk in VRAM as well, at the same offset."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, SPACE)
        self.device = HostDevice()
        self.vram = self.device.allocate(ARENA_BYTES)
        self.handle = self.device.export(self.vram)
        self.edit: Callable[[pb.SessionOpened], object] = lambda opened: None

    def opened(self, path: "pb.DataPath.ValueType") -> pb.SessionOpened:
        opened = super().opened(pb.DATA_PATH_SHM)
        opened.path = path
        if path == pb.DATA_PATH_CUDA_IPC:
            opened.vram.handle, opened.vram.nbytes = self.handle, ARENA_BYTES
        self.edit(opened)
        return opened

    def _load(self, request: pb.LoadRequest, call: Any) -> Iterator[Any]:
        for answer in super()._load(request, call):
            assert isinstance(answer, pb.LoadResponse)
            for chunk in answer.chunks:
                chunk.in_vram = request.in_vram
            yield answer

    def hold_all(self, client: Client) -> None:
        for key in client.prefix(HELD):
            self.hold(key, content_of(key, NBYTES))
        fill(self.device, self.vram, bytes(self.arena))


class Books(HostDevice):
    """A device whose books are open."""

    @property
    def kept(self) -> list[Place]:
        """Where the memory is that it has registered or opened, and not released."""
        return [region.place for region in self._memories]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeWithVram]:
    with FakeWithVram(tmp_path) as service:
        yield service
    service.device.close()


@pytest.fixture
def device() -> Iterator[Books]:
    made = Books()
    yield made
    made.close()


def open_client(fake: FakeService, device: HostDevice | None) -> Client:
    return connect(fake.target, SPACE, deadline_s=2.0, device=device)


def read(client: Client, *, in_vram: bool = True) -> list[Place | None]:
    """Load the held prompt, check every byte, and say where the chunks were."""
    prefix, places = client.prefix(HELD), []
    with client.load(prefix, in_vram=in_vram) as loaded:
        for chunk in loaded:
            if chunk.span is not None and chunk.span.region.place is Place.DEVICE:
                assert in_vram
                content = copied_out(client, chunk.span.offset)
            else:
                content = bytes(chunk.data)
            assert content == content_of(prefix[chunk.index], NBYTES)
            places.append(None if chunk.span is None else chunk.span.region.place)
    return places


def copied_out(client: Client, offset: int) -> bytes:
    session = client._connection.session
    assert session is not None
    assert session.attached is not None
    reached = session.attached.on_device
    assert reached is not None
    assert reached.vram is not None
    memory = buffer(bytes(NBYTES))
    window = reached.device.register(memory)
    stream = reached.device.stream(Urgency.LOADS)
    reached.device.copy(stream, [(window.span(0, NBYTES), reached.vram.span(offset, NBYTES))])
    stream.synchronize()
    reached.device.release(window)
    return bytes(memory)


def test_the_fake_is_honest_until_it_lies(fake: FakeWithVram, device: Books) -> None:
    with open_client(fake, device) as client:
        assert client.wait_ready(HANG_S)
        fake.hold_all(client)
        assert read(client) == [Place.DEVICE] * 4
        assert read(client, in_vram=False) == [Place.HOST] * 4
        assert sorted(each.value for each in device.kept) == ["device", "host"]
    assert device.kept == []


# ── What a session says of VRAM ──


def vram(**fields: Any) -> Callable[[pb.SessionOpened], object]:
    return lambda o: [setattr(o.vram, name, value) for name, value in fields.items()]


WITHOUT: dict[str, Callable[[pb.SessionOpened], object]] = {
    "no handle": vram(handle=b""),
    "a short handle": vram(handle=b"h" * 63),
    "a long handle": vram(handle=b"h" * 65),
    "a giant handle": vram(handle=b"h" * (1 << 20)),
    "garbage": vram(handle=os.urandom(64)),
    "zeros": vram(handle=bytes(64)),
    "more than there is": vram(nbytes=ARENA_BYTES + 1),
    "much more than there is": vram(nbytes=1 << 45),
}
NO_SESSION: dict[str, Callable[[pb.SessionOpened], object]] = {
    "no VRAM": lambda o: o.ClearField("vram"),
    "no bytes": vram(nbytes=0),
    "2^60 bytes": vram(nbytes=1 << 60),
    "2^64 - 1 bytes": vram(nbytes=GIANT),
    "an arena that is not there": lambda o: setattr(o.arena, "path", "/nowhere/arena"),
    "no tether": lambda o: setattr(o.arena, "tether_path", ""),
    "another space": lambda o: setattr(o, "space_digest", bytes(32)),
}


@pytest.mark.parametrize("lie", WITHOUT)
def test_memory_that_cannot_be_opened_is_done_without(
    fake: FakeWithVram, device: Books, lie: str
) -> None:
    def edit(opened: pb.SessionOpened) -> None:
        if opened.path == pb.DATA_PATH_CUDA_IPC:
            WITHOUT[lie](opened)

    fake.edit = edit
    with open_client(fake, device) as client:
        assert client.wait_ready(HANG_S)
        fake.hold_all(client)
        assert read(client) == [None] * 4
        assert device.kept == []


@pytest.mark.parametrize("lie", NO_SESSION)
def test_a_false_session_keeps_nothing(fake: FakeWithVram, device: Books, lie: str) -> None:
    fake.edit = NO_SESSION[lie]
    with open_client(fake, device) as client:
        until(lambda: fake.calls.count("OpenSession") >= 3, "the client tries again")
        assert not client.connected
        assert read(client) == []
        fake.edit = lambda opened: None
        assert client.wait_ready(HANG_S)
        fake.hold_all(client)
        assert read(client) == [Place.DEVICE] * 4
        assert len(device.kept) == 2
    assert device.kept == []


def test_a_client_without_a_device_takes_no_vram(fake: FakeWithVram) -> None:
    fake.edit = lambda opened: setattr(opened, "path", pb.DATA_PATH_CUDA_IPC)
    with open_client(fake, None) as client:
        until(lambda: fake.calls.count("OpenSession") >= 3, "the client tries again")
        assert not client.connected


# ── What a load says of VRAM ──


def chunks(**fields: Any) -> Callable[[Any, Any], Iterator[Any]]:
    """Fields of every chunk that is loaded."""

    def lie(answers: Iterator[Any], call: object) -> Iterator[Any]:
        for answer in answers:
            for chunk in answer.chunks:
                for name, value in fields.items():
                    setattr(chunk, name, value)
            yield answer

    return lie


def loads(fake: FakeWithVram, client: Client) -> list[Place | None]:
    """What a client gets of an honest service."""
    assert client.wait_ready(HANG_S)
    fake.hold_all(client)
    places = read(client)
    assert len(places) == 4
    return places


@pytest.mark.parametrize("offset", [ARENA_BYTES, ARENA_BYTES - NBYTES + 1, 1 << 40, GIANT])
def test_a_chunk_outside_vram_is_a_miss(fake: FakeWithVram, device: Books, offset: int) -> None:
    with open_client(fake, device) as client:
        honest = loads(fake, client)
        fake.lies["Load"] = chunks(offset=offset)
        assert read(client) == []
        del fake.lies["Load"]
        until(lambda: read(client) == honest, "the prompt loads again")


def test_a_chunk_in_vram_that_was_not_asked_for_there_is_a_miss(
    fake: FakeWithVram, device: Books
) -> None:
    with open_client(fake, device) as client:
        loads(fake, client)
        fake.lies["Load"] = chunks(in_vram=True)
        assert read(client, in_vram=False) == []
        assert read(client) == [Place.DEVICE] * 4


@pytest.mark.parametrize("with_device", [True, False])
def test_a_chunk_in_vram_on_the_path_shm_is_a_miss(
    fake: FakeWithVram, device: Books, with_device: bool
) -> None:
    fake.edit = lambda opened: setattr(opened, "path", pb.DATA_PATH_SHM)
    with open_client(fake, device if with_device else None) as client:
        honest = loads(fake, client)
        assert honest == [Place.HOST if with_device else None] * 4
        fake.lies["Load"] = chunks(in_vram=True)
        assert read(client) == []
        del fake.lies["Load"]
        until(lambda: read(client) == honest, "the prompt loads again")


# ── Devices that fail, sessions that end ──


class NoRegister(Books):
    def register(self, memory: memoryview) -> Region:
        raise DeviceError("register: no")


class NoOpen(Books):
    def open(self, handle: bytes, nbytes: int) -> Region:
        raise DeviceError("open: no")


@pytest.mark.parametrize("make", [NoRegister, NoOpen])
def test_a_device_that_refuses_is_done_without(fake: FakeWithVram, make: type[Books]) -> None:
    device = make()
    with open_client(fake, device) as client:
        assert client.wait_ready(HANG_S)
        fake.hold_all(client)
        assert read(client) == [None] * 4
        assert device.kept == []
    device.close()


class Recovers(Books):
    """Refuses to register memory until it is well."""

    well = False

    def register(self, memory: memoryview) -> Region:
        if not self.well:
            raise DeviceError("register: not now")
        return super().register(memory)


def test_a_device_that_refused_is_tried_again_by_the_session_after(
    fake: FakeWithVram, caplog: pytest.LogCaptureFixture
) -> None:
    device = Recovers()

    def next_session() -> None:
        session = client._connection.session
        assert session is not None
        client._connection.drop(session, "for the test")
        until(lambda: client._connection.session not in (None, session), "another session")

    with open_client(fake, device) as client:
        assert client.wait_ready(HANG_S)
        fake.hold_all(client)
        assert read(client) == [None] * 4
        next_session()
        assert read(client) == [None] * 4
        assert caplog.text.count("goes on without its device") == 1
        device.well = True
        next_session()
        assert read(client) == [Place.DEVICE] * 4
        device.well = False
        next_session()
        assert read(client) == [None] * 4
        assert caplog.text.count("goes on without its device") == 2
    assert device.kept == []
    device.close()


def test_memory_stays_while_a_load_may_use_it(fake: FakeWithVram) -> None:
    """The service is gone and the client closed, and a copy that was begun before is still right:
    here it is done only when it is waited for."""
    device = Books(Chaos(1))
    memory = buffer(bytes(NBYTES))
    window = device.register(memory)
    stream = device.stream(Urgency.LOADS)
    client = open_client(fake, device)
    assert client.wait_ready(HANG_S)
    fake.hold_all(client)
    prefix = client.prefix(HELD)
    with client.load(prefix, in_vram=True) as loaded:
        chunk = next(iter(loaded))
        assert chunk.span is not None
        device.copy(stream, [(window.span(0, NBYTES), chunk.span)])
        fake._server.stop(0).wait()
        fake.device.release(fake.vram)
        until(lambda: not client.connected, "the session is over")
        client.close()
        assert len(device.kept) == 3
        stream.synchronize()
        assert memory == content_of(prefix[0], NBYTES)
    assert device.kept == [Place.HOST]  # the window
    device.close()


def mapped(fake: FakeService) -> int:
    """How many files and mappings this process has of the service's memory."""
    files = []
    for each in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one by which the folder itself is read
            files.append(str(each.readlink()))
    lines = (*files, *Path("/proc/self/maps").read_text().splitlines())
    return sum(str(fake.directory) in line or "memfd:kvtier-" in line for line in lines)


def test_a_device_closed_too_early_is_survived(fake: FakeWithVram) -> None:
    before = mapped(fake)
    device = Books()
    client = open_client(fake, device)
    loads(fake, client)
    device.close()
    client.close()
    assert mapped(fake) == before


def test_sessions_that_come_and_go_leave_nothing(fake: FakeWithVram, device: Books) -> None:
    before = mapped(fake)
    with open_client(fake, device) as client:
        honest = loads(fake, client)
        during = mapped(fake)
        for _ in range(10):
            session = client._connection.session
            assert session is not None
            client._connection.drop(session, "for the test")
            until(lambda last=session: client._connection.session not in (None, last), "another")  # type: ignore[misc]
            assert read(client) == honest
            assert mapped(fake) == during
            assert len(device.kept) == 2
    assert mapped(fake) == before
    assert device.kept == []
