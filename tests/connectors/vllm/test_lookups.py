"""Asking the service in the background, with clients that answer as they are told."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from kvtier.chunks import ChunkKey, Prefix
from kvtier.client import Held, Loaded
from kvtier.connectors.vllm.lookups import Lookups, Question, Secured
from kvtier.errors import KvtierError
from tests.sidecar import HANG_S, until

LATER = math.inf  # nobody is late
MINE, THEIRS = b"m" * 32, b"t" * 32


def prefix(chunks: int = 5) -> Prefix:
    keys = tuple(ChunkKey(bytes([place]) * 32) for place in range(chunks))
    return Prefix(keys, ChunkKey(bytes(32)), 8)


@dataclass
class FakeClient:
    """Holds the first `chunks` keys, `in_ram` of them in RAM. `gate` closed: it hangs."""

    chunks: int = 0
    in_ram: int = 0
    come: int = 1 << 30  # chunks that a load brings at most
    connected: bool = True
    raises: BaseException | None = None
    silent: bool = False
    asked: list[tuple[Prefix, float | None]] = field(default_factory=list)
    loaded: list[tuple[Prefix, float | None]] = field(default_factory=list)
    leases: int = 0
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def locate(self, prefix: Prefix, deadline_s: float | None = None) -> Held | None:
        self.asked.append((prefix, deadline_s))
        assert self.gate.wait(HANG_S)
        if self.raises is not None:
            raise self.raises
        return None if self.silent else Held(self.chunks, self.in_ram)

    def load(
        self, prefix: Prefix, deadline_s: float | None = None
    ) -> AbstractContextManager[Loaded]:
        return cast("AbstractContextManager[Loaded]", self._load(prefix, deadline_s))

    @contextmanager
    def _load(self, prefix: Prefix, deadline_s: float | None) -> Iterator[list[int]]:
        self.loaded.append((prefix, deadline_s))
        self.leases += 1
        try:
            assert self.gate.wait(HANG_S)
            if self.raises is not None:
                raise self.raises
            held = [key[0] for key in prefix if key[0] < self.chunks]
            yield held[: self.come]
        finally:
            self.leases -= 1


Start = Callable[..., Lookups]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts lookups of one client or two; their threads must end when they are closed."""
    started: list[tuple[Lookups, tuple[FakeClient, ...]]] = []

    def begin(*clients: FakeClient) -> Lookups:
        by_space = dict(zip((MINE, THEIRS), clients, strict=False))
        started.append((Lookups(by_space), clients))
        return started[-1][0]

    yield begin
    for lookups, clients in started:
        for client in clients:
            client.gate.set()
        lookups.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("kvtier-lookup")]


def ask(lookups: Lookups, *prefixes: Prefix, until_s: float = LATER) -> Question:
    return lookups.ask(dict(zip((MINE, THEIRS), prefixes or (prefix(),), strict=False)), until_s)


def answer(question: Question) -> tuple[Held, ...]:
    assert question.ready.wait(HANG_S), "it was never answered"
    return question.held


def secured(question: Question) -> Secured:
    answer(question)
    assert question.secured is not None
    return question.secured


# ── asking ────────────────────────────────────────────────────────────────────────────────────────


def test_every_client_is_asked_about_its_own_prefix(start: Start) -> None:
    mine, theirs = FakeClient(4, 3), FakeClient(2, 2)
    question = ask(start(mine, theirs), prefix(5), prefix(4))
    assert answer(question) == (Held(4, 3), Held(2, 2))
    assert [prefix for prefix, _ in mine.asked + theirs.asked] == [prefix(5), prefix(4)]
    assert question.answered_s > 0
    assert not question.late


def test_asking_never_waits(start: Start) -> None:
    client = FakeClient(1, 1)
    client.gate.clear()
    lookups = start(client)
    questions = [ask(lookups) for _ in range(20)]
    assert not any(question.ready.is_set() for question in questions)
    client.gate.set()
    assert [answer(question) for question in questions] == [(Held(1, 1),)] * 20


def test_no_answer_is_nothing_held(start: Start) -> None:
    assert answer(ask(start(FakeClient(silent=True)))) == (Held(0, 0),)


@pytest.mark.parametrize("error", [KvtierError("broken"), AttributeError("a mistake of ours")])
def test_an_error_is_nothing_held_in_any_space_and_the_next_question_is_answered(
    start: Start, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    good, bad = FakeClient(3, 3), FakeClient(3, 3, raises=error)
    lookups = start(good, bad)
    for _ in range(10):  # more than there are threads
        assert answer(ask(lookups, prefix(), prefix())) == (Held(0, 0), Held(0, 0))
    assert str(error) in caplog.text
    bad.raises = None
    assert answer(ask(lookups, prefix(), prefix())) == (Held(3, 3), Held(3, 3))


def test_it_is_connected_when_every_client_is(start: Start) -> None:
    mine, theirs = FakeClient(), FakeClient()
    lookups = start(mine, theirs)
    assert lookups.connected
    theirs.connected = False
    assert not lookups.connected


def test_no_call_may_take_longer_than_the_request_waits(start: Start) -> None:
    client = FakeClient(3, 3)
    lookups = start(client)
    question = ask(lookups, until_s=time.monotonic() + 50)
    answer(question)
    lookups.secure(question, 0)
    secured(question)
    for _, deadline_s in client.asked + client.loaded:
        assert deadline_s is not None
        assert 0 < deadline_s <= 50


def test_a_question_that_is_late_already_is_not_asked(start: Start) -> None:
    client = FakeClient(3, 3)
    question = ask(start(client), until_s=time.monotonic() - 1)
    assert answer(question) == (Held(0, 0),)
    assert not client.asked


def test_requests_whose_chunks_come_slowly_do_not_keep_others_waiting(start: Start) -> None:
    slow, fast = FakeClient(3, 0), FakeClient(3, 3)
    lookups = start(slow, fast)
    questions = [lookups.ask({MINE: prefix()}, LATER) for _ in range(8)]
    for question in questions:
        answer(question)
    slow.gate.clear()
    for question in questions:
        lookups.secure(question, 0)
    until(lambda: slow.leases >= 4, "they are being loaded")
    other = lookups.ask({THEIRS: prefix()}, LATER)
    assert other.ready.wait(1.0)


# ── securing ──────────────────────────────────────────────────────────────────────────────────────


def test_what_is_held_beyond_the_engines_own_is_secured(start: Start) -> None:
    mine, theirs = FakeClient(4, 1), FakeClient(3, 3)
    lookups = start(mine, theirs)
    question = ask(lookups, prefix(), prefix())
    answer(question)
    lookups.secure(question, 2)
    found = secured(question)
    assert (found.first, found.reach) == (2, 3)
    assert {digest: len(chunks) for digest, chunks in found.chunks.items()} == {MINE: 2, THEIRS: 1}
    assert [prefix for prefix, _ in mine.loaded + theirs.loaded] == [prefix()[2:4], prefix()[2:3]]
    assert (mine.leases, theirs.leases) == (1, 1)
    lookups.release(question.take())
    until(lambda: not mine.leases + theirs.leases, "all is let go of")
    assert question.take() is None


def test_what_comes_in_time_is_secured(start: Start) -> None:
    client = FakeClient(4, 1, come=2)
    lookups = start(client)
    question = ask(lookups)
    answer(question)
    lookups.secure(question, 1)
    assert secured(question).reach == 3


def test_what_is_secured_for_nobody_is_let_go_of(start: Start) -> None:
    client = FakeClient(4, 4)
    lookups = start(client)
    question = ask(lookups)
    answer(question)
    client.gate.clear()
    lookups.secure(question, 0)
    until(lambda: client.leases, "it is being loaded")
    assert question.drop() is None
    client.gate.set()
    until(lambda: not client.leases, "it is let go of")
    assert question.secured is None


def test_what_was_secured_before_its_question_is_dropped_is_given_to_who_drops_it(
    start: Start,
) -> None:
    client = FakeClient(4, 4)
    lookups = start(client)
    question = ask(lookups)
    answer(question)
    lookups.secure(question, 0)
    found = secured(question)
    assert question.drop() is found
    assert client.leases == 1
    lookups.release(found)
    lookups.release(None)
    until(lambda: not client.leases, "it is let go of")


@pytest.mark.parametrize("bad", [0, 1])
def test_when_one_space_fails_nothing_stays_leased(start: Start, bad: int) -> None:
    clients = [FakeClient(4, 4), FakeClient(4, 4)]
    lookups = start(*clients)
    question = ask(lookups, prefix(), prefix())
    answer(question)
    clients[bad].raises = KvtierError("broken")
    lookups.secure(question, 0)
    assert answer(question) == (Held(0, 0), Held(0, 0))
    assert question.secured is None
    assert not any(client.leases for client in clients)


def test_a_race_between_securing_and_dropping_leaves_nothing_leased(start: Start) -> None:
    client = FakeClient(4, 4)
    lookups = start(client)
    questions = [ask(lookups) for _ in range(200)]
    for question in questions:
        answer(question)
        lookups.secure(question, 0)
        lookups.release(question.drop())
    until(lambda: len(client.loaded) == 200 and not client.leases, "all are let go of")


def test_secured_chunks_are_let_go_of_once() -> None:
    client = FakeClient(4, 4)
    found = Secured(0)
    found.secure(cast("Any", client), MINE, prefix(), 1.0)
    assert client.leases == 1
    found.release()
    found.release()
    assert (client.leases, found.chunks) == (0, {})


def test_idle_threads_wait_for_work(start: Start) -> None:
    """No thread of ours wakes up by itself: nothing but the queue of the pool holds them."""
    lookups = start(FakeClient(1, 1))
    answer(ask(lookups))
    for pool in (lookups._asking, lookups._securing):
        assert pool._work_queue.empty()
        assert len(pool._threads) <= 4
