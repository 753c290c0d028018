"""The circuit: opened by failure, closed by itself, and free while it is open."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.protobuf.message import Message

from kvtier.client import Client, connect
from kvtier.client.client import connect_through
from kvtier.client.connection import FAILURES_TO_OPEN
from kvtier.errors import InvalidRequest, SessionEnded
from kvtier.proto import cache_pb2 as pb
from kvtier.spaces import Layout, Space

SPACE = Space("m", Layout("int8", 1, 1, 8, tokens=4, planes=1))
HANG_GUARD_S = 20.0


class ScriptedService:
    """Says what the test tells it to. Each `OpenSession` waits for the test's permission."""

    def __init__(self) -> None:
        self.admit = threading.Semaphore(0)
        self.opened = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self.calls: list[str] = []
        self.posted: list[str] = []
        self.streams: list[ScriptedStream] = []

    def session(self) -> pb.SessionOpened:
        return pb.SessionOpened(
            session_id=bytes(16),
            space_digest=SPACE.digest,
            chunk_bytes=SPACE.layout.nbytes,
            path=pb.DATA_PATH_INLINE,
            max_keys=100,
            max_write_lease_bytes=1 << 20,
        )


class ScriptedStream:
    """An OpenSession stream that ends when it is cancelled or the service says so."""

    def __init__(self, service: ScriptedService) -> None:
        self._service = service
        self._events: queue.SimpleQueue[pb.SessionEvent | None] = queue.SimpleQueue()
        service.streams.append(self)

    def __iter__(self) -> "ScriptedStream":
        return self

    def __next__(self) -> pb.SessionEvent:
        if not self._service.calls or self._service.calls[-1] != f"opened {id(self)}":
            assert self._service.admit.acquire(timeout=HANG_GUARD_S)
            self._service.calls.append(f"opened {id(self)}")
            self._service.opened.release()
            return pb.SessionEvent(opened=self._service.session())
        event = self._events.get()
        if event is None:
            raise StopIteration
        return event

    def cancel(self) -> None:
        self._events.put(None)
        self._service.admit.release()  # wakes one that waits to open


class ScriptedTransport:
    """A Transport to a ScriptedService."""

    def __init__(self, service: ScriptedService) -> None:
        self._service = service

    def call(self, method: str, request: Message, timeout_s: float) -> Any:
        if self._service.failure is not None:
            raise self._service.failure
        return pb.LookupResponse(held=1)

    def post(self, method: str, request: Message, on_failure: Callable[[], None]) -> None:
        self._service.posted.append(method)

    def stream(self, method: str, request: Message, timeout_s: float | None) -> Any:
        return ScriptedStream(self._service)

    def upload(self, method: str, requests: Iterator[Message]) -> Any:
        raise TimeoutError

    def close(self) -> None:
        pass


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
def client(service: ScriptedService) -> Iterator[Client]:
    made = connect_through(lambda: ScriptedTransport(service), SPACE, path=pb.DATA_PATH_INLINE)
    yield made
    made.close()


def held(client: Client) -> int:
    return client.lookup(client.prefix(range(8)))


def open_session(service: ScriptedService, client: Client) -> None:
    service.admit.release()
    assert service.opened.acquire(timeout=HANG_GUARD_S)
    assert client.wait_ready(HANG_GUARD_S)


def test_without_a_session_everything_is_a_miss(client: Client) -> None:
    assert not client.connected
    assert held(client) == 0
    with client.load(client.prefix(range(8))) as loaded:
        assert list(loaded) == []
    with client.offload(client.prefix(range(8))) as offload:
        assert list(offload) == []
    assert set(offload.outcome.refused) == {0, 1}
    assert client.explain(client.prefix(range(8))) == []
    assert client.stats() is None


def test_three_failures_open_the_circuit_and_an_answer_closes_it(
    service: ScriptedService, client: Client
) -> None:
    open_session(service, client)
    assert held(client) == 1
    service.failure = TimeoutError()
    for _ in range(FAILURES_TO_OPEN):
        assert client.connected
        assert held(client) == 0
    assert not client.connected
    service.failure = None
    open_session(service, client)
    assert held(client) == 1


def test_a_success_in_between_starts_the_count_again(
    service: ScriptedService, client: Client
) -> None:
    open_session(service, client)
    for _ in range(5):
        service.failure = TimeoutError()
        for _ in range(FAILURES_TO_OPEN - 1):
            assert held(client) == 0
        service.failure = None
        assert held(client) == 1
    assert client.connected


def test_a_session_that_is_over_is_given_up_at_once(
    service: ScriptedService, client: Client
) -> None:
    open_session(service, client)
    service.failure = SessionEnded("restarted")
    assert held(client) == 0
    assert not client.connected


def test_a_lost_answer_to_reserve_is_followed_by_an_abort(
    service: ScriptedService, client: Client
) -> None:
    open_session(service, client)
    service.failure = TimeoutError()
    with client.offload(client.prefix(range(8))) as offload:
        assert list(offload) == []
    assert service.posted == ["Abort"]
    assert set(offload.outcome.refused.values()) == {"the service could not be reached"}


def test_close_ends_the_background_thread(service: ScriptedService) -> None:
    client = connect_through(lambda: ScriptedTransport(service), SPACE, path=pb.DATA_PATH_INLINE)
    open_session(service, client)
    client.close()
    client.close()
    names = [thread.name for thread in threading.enumerate()]
    assert "kvtier-session" not in names
    assert held(client) == 0


@pytest.mark.parametrize("target", ["", "host", "unix:relative", "http://host:1", "host:port"])
def test_a_malformed_target_is_the_callers_mistake(target: str) -> None:
    with pytest.raises(InvalidRequest, match="target"):
        connect(target, SPACE)


def test_malformed_options_are_the_callers_mistake() -> None:
    with pytest.raises(InvalidRequest, match="path"):
        connect("unix:///x", SPACE, path="rdma")
    with pytest.raises(InvalidRequest, match="deadline_s"):
        connect("unix:///x", SPACE, deadline_s=0)
