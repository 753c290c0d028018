"""A service that lies when a session opens: the client maps nothing it should not, and recovers."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from kvtier.client import connect, connection
from kvtier.client.client import connect_through
from kvtier.client.transport import GrpcTransport
from kvtier.proto import cache_pb2 as pb
from tests.faults.fake_service import ARENA_BYTES, FakeService, Lie, wait_for_end
from tests.sidecar import HANG_S, content_of, load, offload, prompt_of, space_of, until

SPACE = space_of()
GIANT = 2**64 - 1


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeService]:
    with FakeService(tmp_path, SPACE) as service:
        yield service


def opened(edit: Callable[[pb.SessionOpened], object]) -> Lie:
    """The session's first event, edited."""

    def lie(answers: Iterator[pb.SessionEvent], call: grpc.ServicerContext) -> Iterator[Message]:
        for answer in answers:
            edit(answer.opened)
            yield answer

    return lie


def arena(**fields: object) -> Lie:
    """What the first event says of the arena."""
    return opened(lambda o: [setattr(o.arena, name, value) for name, value in fields.items()])


def events(*messages: Message | bytes, ends: bool = True) -> Lie:
    """These events instead of the honest ones; then the end, or nothing more."""

    def lie(answers: object, call: grpc.ServicerContext) -> Iterator[Message | bytes]:
        yield from messages
        if not ends:
            wait_for_end(call)

    return lie


def refuses(code: grpc.StatusCode) -> Lie:
    return lambda answers, call: call.abort(code, "no session")


LIES: dict[str, Lie] = {
    "garbage": events(b"\x0a\xff\xff\xff\xff\x0f"),
    "an event of nothing": events(b"", ends=False),
    "closing first": events(pb.SessionEvent(closing=pb.SessionClosing(reason="no"))),
    "no event": events(),
    "another space": opened(lambda o: setattr(o, "space_digest", bytes(32))),
    "a short digest": opened(lambda o: setattr(o, "space_digest", o.space_digest[:31])),
    "no chunk": opened(lambda o: setattr(o, "chunk_bytes", 0)),
    "larger chunks": opened(lambda o: setattr(o, "chunk_bytes", o.chunk_bytes + 1)),
    "giant chunks": opened(lambda o: setattr(o, "chunk_bytes", GIANT)),
    "no session id": opened(lambda o: setattr(o, "session_id", b"")),
    "no keys": opened(lambda o: setattr(o, "max_keys", 0)),
    "no arena": opened(lambda o: o.ClearField("arena")),
    "an arena of no bytes": arena(nbytes=0),
    "an arena of giant size": arena(nbytes=GIANT),
    "an arena larger than its file": arena(nbytes=ARENA_BYTES + 1),
    "an arena that is not there": arena(path="/nowhere/arena"),
    "an arena without a path": arena(path=""),
    "an arena that is a directory": arena(path="/tmp"),
    "an arena that is a device": arena(path="/dev/zero", nbytes=4096),
    "an arena with a zero in its path": arena(path="/tmp/a\0b"),
    "an arena with a long path": arena(path="/" + "a" * 5000),
    "an arena that may not be written": arena(path="/proc/self/maps", nbytes=1),
    "a tether that is not there": arena(tether_path="/nowhere/tether"),
    "a tether without a path": arena(tether_path=""),
    "a tether that is a directory": arena(tether_path="/tmp"),
    "UNAVAILABLE": refuses(grpc.StatusCode.UNAVAILABLE),
    "RESOURCE_EXHAUSTED": refuses(grpc.StatusCode.RESOURCE_EXHAUSTED),
    "INTERNAL": refuses(grpc.StatusCode.INTERNAL),
}


def stays_apart(fake: FakeService, lie: Lie, path: str = "shm") -> None:
    """With the lie there is no session, and without it there is one that works."""
    fake.lies["OpenSession"] = lie
    with connect(fake.target, SPACE, path=path) as client:
        prefix = client.prefix(prompt_of(1, 4))
        until(lambda: fake.calls.count("OpenSession") >= 2, "the client tries again")
        assert not client.connected
        assert client.lookup(prefix) == load(client, prefix) == client.prefetch(prefix) == 0
        assert set(offload(client, prefix).refused) == set(range(4))
        assert fake.calls == ["OpenSession"] * len(fake.calls), "it touched nothing"
        del fake.lies["OpenSession"]
        assert client.wait_ready(HANG_S)
        assert offload(client, prefix).stored == [0, 1, 2, 3]
        assert load(client, prefix) == 4


@pytest.mark.parametrize("lie", LIES)
def test_a_false_session_is_none(fake: FakeService, lie: str) -> None:
    stays_apart(fake, LIES[lie])


@pytest.mark.parametrize("path", ["arena", "tether_path"])
def test_links_are_not_followed(fake: FakeService, path: str) -> None:
    link = fake.directory / "link"
    link.symlink_to(fake.arena_path if path == "arena" else fake.tether_path)
    stays_apart(fake, arena(**{"path" if path == "arena" else path: str(link)}))


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


def test_a_tether_that_another_process_holds_is_not_ours(fake: FakeService) -> None:
    held = fake.directory / "held"
    held.touch()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        stays_apart(fake, arena(tether_path=str(held)))
        holder.communicate()


def test_a_client_on_another_host_maps_no_file_that_a_service_names(fake: FakeService) -> None:
    """It asked for inline: else whoever answers could have it write into any file of its user."""
    precious = fake.directory / "precious"
    precious.write_bytes(b"p" * ARENA_BYTES)
    tether = fake.directory / "another"
    tether.touch()

    def lie(session: pb.SessionOpened) -> None:
        session.path = pb.DATA_PATH_SHM
        session.arena.path = str(precious)
        session.arena.tether_path = str(tether)
        session.arena.nbytes = ARENA_BYTES

    stays_apart(fake, opened(lie), path="inline")
    assert precious.read_bytes() == b"p" * ARENA_BYTES


@pytest.mark.parametrize("path", [pb.DATA_PATH_UNSPECIFIED, pb.DATA_PATH_INLINE, 77])
def test_a_path_that_nobody_asked_for(fake: FakeService, path: int) -> None:
    stays_apart(fake, opened(lambda o: setattr(o, "path", path)))


def test_a_session_that_never_opens_is_given_up(
    fake: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_OPEN_TIMEOUT_S", 0.2)
    stays_apart(fake, events(ends=False))


def test_what_a_session_allows_may_be_giant(fake: FakeService) -> None:
    def lie(session: pb.SessionOpened) -> None:
        session.max_keys = 2**32 - 1
        session.max_write_lease_bytes = GIANT
        session.session_id = b"i" * 100_000

    fake.lies["OpenSession"] = opened(lie)
    with connect(fake.target, SPACE) as client:
        assert client.wait_ready(HANG_S)
        assert offload(client, client.prefix(prompt_of(1, 4))).stored == [0, 1, 2, 3]
        assert load(client, client.prefix(prompt_of(1, 4))) == 4


def test_a_session_that_is_closed_again_and_again(fake: FakeService) -> None:
    """The client tries again, and every operation meanwhile is a miss or right."""
    closing = pb.SessionEvent(closing=pb.SessionClosing())

    def lie(answers: Iterator[pb.SessionEvent], call: grpc.ServicerContext) -> Iterator[Message]:
        yield next(answers)
        yield closing

    fake.lies["OpenSession"] = lie
    with connect(fake.target, SPACE, deadline_s=2) as client:
        prefix = client.prefix(prompt_of(1, 4))
        for key in prefix:
            fake.hold(key, content_of(key, SPACE.layout.nbytes))
        while fake.calls.count("OpenSession") < 4:
            assert load(client, prefix) in (0, 1, 2, 3, 4)
        del fake.lies["OpenSession"]
        until(lambda: load(client, prefix) == 4, "the prompt loads")


class LateTransport(GrpcTransport):
    """Opens streams only once `may_open` is set."""

    def __init__(self, target: str, entered: threading.Event, may_open: threading.Event) -> None:
        super().__init__(target)
        self._entered = entered
        self._may_open = may_open

    def stream(self, method: str, request: Message, timeout_s: float | None) -> Any:
        self._entered.set()
        assert self._may_open.wait(HANG_S)
        return super().stream(method, request, timeout_s)


def test_closing_while_a_session_opens_leaves_no_session(fake: FakeService) -> None:
    entered, closing = threading.Event(), threading.Event()
    client = connect_through(lambda: LateTransport(fake.target, entered, closing), SPACE)
    assert entered.wait(HANG_S)
    client._connection._opening = closing.set  # the last thing `close` does before it waits
    client.close()
    assert not client._connection._thread.is_alive()
    assert not client.connected
