"""Whatever a service answers, the client raises nothing, hands out no wrong chunk, and recovers."""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from kvtier.client import Client, connect
from kvtier.proto import cache_pb2 as pb
from kvtier.transfer.paths import inline
from tests.faults.fake_service import ARENA_BYTES, METHODS, STREAMS, FakeService, Lie, wait_for_end
from tests.sidecar import HANG_S, content_of, load, offload, prompt_of, space_of, until

SPACE = space_of()
NBYTES = SPACE.layout.nbytes
GIANT = 2**64 - 1
HELD, FRESH, LATER = (prompt_of(seed, 4) for seed in (1, 2, 3))


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeService]:
    with FakeService(tmp_path, SPACE) as service:
        yield service


@pytest.fixture(params=["shm", "inline"])
def client(request: pytest.FixtureRequest, fake: FakeService) -> Iterator[Client]:
    """A client of the fake service, which holds one prompt. Connected when the lie begins."""
    with connect(fake.target, SPACE, deadline_s=0.3, path=request.param) as connected:
        for key in connected.prefix(HELD):
            fake.hold(key, content_of(key, NBYTES))
        assert connected.wait_ready(HANG_S)
        yield connected


def use_all(client: Client, fresh: list[int]) -> None:
    """Every operation, with what it may return at most."""
    held, wanted = client.prefix(HELD), client.prefix(fresh)
    assert 0 <= client.lookup(held) <= 4
    assert 0 <= load(client, held) <= 4
    outcome = offload(client, wanted)
    each = [*outcome.stored, *outcome.existing, *outcome.refused]
    assert sorted(each) == list(range(4)), "a chunk has one fate, and no other has any"
    assert 0 <= client.prefetch(held) <= 4
    assert client.evict(wanted) >= 0
    assert len(client.explain(held, HELD)) <= 4
    client.stats()


def survives(fake: FakeService, client: Client) -> None:
    """The client lives through the lie, and works again once the service is honest."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(use_all, client, FRESH).result(HANG_S)
        pool.submit(use_all, client, FRESH).result(HANG_S)
    fake.lies.clear()
    until(lambda: load(client, client.prefix(HELD)) == 4, "the held prompt loads again")
    until(lambda: not offload(client, client.prefix(LATER)).refused, "a prompt is stored")
    until(lambda: load(client, client.prefix(LATER)) == 4, "it loads")


# ── What a lie does to the honest answer ──


def change(edit: Callable[[Any], object]) -> Lie:
    """Edit the one answer of a call."""

    def lie(answer: Message, call: grpc.ServicerContext) -> Message:
        edit(answer)
        return answer

    return lie


def change_each(edit: Callable[[Any], object]) -> Lie:
    """Edit every message of a stream."""

    def lie(answers: Iterator[Message], call: grpc.ServicerContext) -> Iterator[Message]:
        for answer in answers:
            edit(answer)
            yield answer

    return lie


def again(answers: Iterator[Message]) -> Iterator[Message]:
    """The honest chunks that are left, then one chunk more than was asked for."""
    yield from itertools.takewhile(lambda answer: answer.HasField("piece"), answers)
    yield piece(4, CHUNK, RIGHT)


def always(*messages: Message | bytes) -> Lie:
    """These messages instead of the honest ones."""
    return lambda answers, call: iter(messages)


def cut(after: int) -> Lie:
    """A stream that ends, well as it seems, after so many messages."""
    return lambda answers, call: itertools.islice(answers, after)


def die(after: int, code: grpc.StatusCode) -> Lie:
    """A stream that breaks after so many messages."""

    def lie(answers: Iterator[Message], call: grpc.ServicerContext) -> Iterator[Message]:
        yield from itertools.islice(answers, after)
        call.abort(code, "the fake service fails")

    return lie


def hang(after: int) -> Lie:
    """A stream that stands still after so many messages."""

    def lie(answers: Iterator[Message], call: grpc.ServicerContext) -> Iterator[Message]:
        yield from itertools.islice(answers, after)
        wait_for_end(call)

    return lie


def hang_once(answer: Message, call: grpc.ServicerContext) -> Message:
    """An answer that does not come."""
    wait_for_end(call)
    return answer


def refuse(code: grpc.StatusCode) -> Lie:
    """A status instead of an answer."""
    return lambda answer, call: call.abort(code, "the fake service refuses")


def instead(answer: Message | bytes) -> Lie:
    """This answer instead of the honest one."""
    return lambda honest, call: answer


def endless(message: Message) -> Lie:
    """One message again and again."""
    return lambda answers, call: itertools.repeat(message)


def loaded(index: int, offset: int) -> pb.LoadResponse:
    return pb.LoadResponse(chunks=[pb.LoadedChunk(index=index, offset=offset)])


def piece(index: int, data: bytes, digest: int = 0) -> pb.GetResponse:
    return pb.GetResponse(piece=pb.ChunkPiece(index=index, data=data, checksum=digest))


def set_all(field: str, value: Any) -> Lie:
    """A field of every chunk in the answer."""
    return change(lambda answer: [setattr(chunk, field, value) for chunk in answer.chunks])


def set_some(field: str, value: Any) -> Lie:
    """A field of the second chunk in the answer."""
    return change(lambda answer: setattr(answer.chunks[1], field, value))


CHUNK = content_of(b"of no key", NBYTES)
RIGHT = inline.checksum(memoryview(CHUNK))
GARBAGE = b"\x0a\xff\xff\xff\xff\x0f" + bytes(range(200, 256))

STREAM_LIES: dict[str, tuple[str, Lie]] = {
    "Load of another chunk first": ("Load", always(loaded(1, 0), loaded(0, NBYTES))),
    "Load with a gap": ("Load", always(loaded(0, 0), loaded(2, 2 * NBYTES))),
    "Load of one chunk twice": ("Load", always(loaded(0, 0), loaded(0, 0))),
    "Load of more than asked": ("Load", always(*(loaded(i, i * NBYTES) for i in range(9)))),
    "Load of a giant index": ("Load", always(loaded(2**32 - 1, 0))),
    "Load beyond the arena": ("Load", always(loaded(0, 0), loaded(1, ARENA_BYTES))),
    "Load across the arena's end": ("Load", always(loaded(0, ARENA_BYTES - NBYTES + 1))),
    "Load at a giant offset": ("Load", always(loaded(0, GIANT), loaded(1, GIANT - NBYTES + 1))),
    "Load of garbage": ("Load", always(GARBAGE)),
    "Load of an empty message": ("Load", always(b"")),
    "Load without an end": ("Load", cut(2)),
    "Load without anything": ("Load", cut(0)),
    "Load of nothing for ever": ("Load", endless(pb.LoadResponse())),
    "Load with a giant end": ("Load", always(pb.LoadResponse(end=pb.LoadEnd(chunks=2**32 - 1)))),
    "Get of another chunk first": ("Get", change_each(lambda m: setattr(m.piece, "index", 1))),
    "Get of a giant index": ("Get", change_each(lambda m: setattr(m.piece, "index", 2**32 - 1))),
    "Get with a wrong checksum": ("Get", change_each(lambda m: setattr(m.piece, "checksum", 7))),
    "Get without a checksum": ("Get", change_each(lambda m: setattr(m.piece, "checksum", 0))),
    "Get of other bytes": ("Get", always(piece(0, CHUNK, 1))),
    "Get of a short chunk": ("Get", always(piece(0, CHUNK[:-1], RIGHT))),
    "Get of a long chunk": ("Get", always(piece(0, CHUNK + b"x", RIGHT))),
    "Get of empty pieces": ("Get", endless(piece(0, b""))),
    "Get of more than asked": ("Get", lambda answers, call: again(answers)),
    "Get of garbage": ("Get", always(GARBAGE)),
    "Get without an end": ("Get", cut(3)),
    "Get without anything": ("Get", cut(0)),
}  # fmt: skip


UNARY_LIES: dict[str, tuple[str, Lie]] = {
    "Lookup of more than asked": ("Lookup", instead(pb.LookupResponse(held=2**32 - 1))),
    "Lookup without an answer": ("Lookup", instead(b"")),
    "Reserve of too few": ("Reserve", change(lambda m: m.chunks.pop())),
    "Reserve of none": ("Reserve", instead(b"")),
    "Reserve of too many": ("Reserve", change(lambda m: m.chunks.add(status=1))),
    "Reserve of an unknown kind": ("Reserve", set_all("status", 77)),
    "Reserve of no kind": ("Reserve", set_all("status", 0)),
    "Reserve beyond the arena": ("Reserve", set_some("offset", ARENA_BYTES)),
    "Reserve across the arena's end": ("Reserve", set_some("offset", ARENA_BYTES - NBYTES + 1)),
    "Reserve at a giant offset": ("Reserve", set_all("offset", GIANT)),
    "Commit of others": ("Commit", set_all("index", 7)),
    "Commit of giants": ("Commit", set_all("index", 2**32 - 1)),
    "Commit of one many times": ("Commit", set_all("index", 0)),
    "Commit of too few": ("Commit", change(lambda m: m.chunks.pop())),
    "Commit of none": ("Commit", instead(b"")),
    "Commit of an unknown kind": ("Commit", set_all("status", 77)),
    "Put of others": ("Put", set_all("index", 7)),
    "Put of giants": ("Put", set_all("index", 2**32 - 1)),
    "Put of one many times": ("Put", set_all("index", 0)),
    "Put of too few": ("Put", change(lambda m: m.chunks.pop())),
    "Put of an unknown kind": ("Put", set_all("status", 77)),
    "Put answered at once": ("Put", instead(pb.PutResponse())),
    "Prefetch of giants": (
        "Prefetch", instead(pb.PrefetchResponse(in_ram=2**32 - 1, promoting=2**32 - 1)),
    ),
    "Evict of giants": ("Evict", instead(pb.EvictResponse(chunks=2**32 - 1))),
    "Explain of too few": ("Explain", change(lambda m: m.keys.pop())),
    "Explain of too many": ("Explain", change(lambda m: m.keys.add())),
    "Explain of an unknown kind": (
        "Explain", change(lambda m: [setattr(key, "state", 99) for key in m.keys]),
    ),
    "Stats of a giant": ("Stats", instead(pb.StatsResponse(version="v" * 100_000, sessions=9))),
}  # fmt: skip


@pytest.mark.parametrize("lie", [*STREAM_LIES, *UNARY_LIES])
def test_a_false_answer(fake: FakeService, client: Client, lie: str) -> None:
    method, false = {**STREAM_LIES, **UNARY_LIES}[lie]
    fake.lies[method] = false
    survives(fake, client)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "OpenSession"])
def test_garbage_from_every_method(fake: FakeService, client: Client, method: str) -> None:
    fake.lies[method] = always(GARBAGE) if method in STREAMS else instead(GARBAGE)
    survives(fake, client)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "OpenSession"])
def test_a_hang_in_every_method(fake: FakeService, client: Client, method: str) -> None:
    fake.lies[method] = hang(1) if method in STREAMS else hang_once
    survives(fake, client)


def test_a_hang_everywhere_opens_the_circuit(fake: FakeService, client: Client) -> None:
    for method in METHODS:
        if method != "OpenSession":
            fake.lies[method] = hang(0) if method in STREAMS else hang_once
    calls = len(fake.calls)
    survives_hang = [client.lookup(client.prefix(HELD)) for _ in range(3)]
    assert survives_hang == [0, 0, 0]
    assert len(fake.calls) - calls >= 3
    survives(fake, client)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.value[0]])
def test_every_status(fake: FakeService, client: Client, code: grpc.StatusCode) -> None:
    for method in METHODS:
        if method != "OpenSession":
            fake.lies[method] = die(1, code) if method in STREAMS else refuse(code)
    survives(fake, client)


def channel_threads() -> list[threading.Thread]:
    """The threads with which gRPC serves the channels of this process."""
    return [thread for thread in threading.enumerate() if thread.name.endswith("(_run)")]


@pytest.mark.parametrize(
    "false", [refuse(grpc.StatusCode.INTERNAL), instead(GARBAGE)], ids=["refused", "garbage"]
)
def test_a_lease_that_cannot_be_given_back_costs_the_session_and_no_thread(
    fake: FakeService, false: Lie
) -> None:
    """gRPC tells of the failure on the thread that serves the channel, which must not be closed
    from there: it would wait for itself for ever."""
    others = set(channel_threads())  # of services that outlive a test
    with connect(fake.target, SPACE, deadline_s=HANG_S) as client:
        prefix = client.prefix(HELD)
        for key in prefix:
            fake.hold(key, content_of(key, NBYTES))
        fake.lies["Release"] = false
        for sessions in range(1, 4):
            until(lambda: client.connected, "a session")
            assert set(channel_threads()) - others
            assert load(client, prefix) == 4
            until(lambda n=sessions: fake.calls.count("OpenSession") > n, "another session")
    until(lambda: others.issuperset(channel_threads()), "the channels' threads have ended")


@pytest.mark.parametrize("after", range(4))
def test_a_stream_that_breaks_in_the_middle(fake: FakeService, client: Client, after: int) -> None:
    for method in ("Load", "Get"):
        fake.lies[method] = die(after, grpc.StatusCode.UNAVAILABLE)
    survives(fake, client)
