"""Offloads beside the engine: what a fence waits for, and what it gives up."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kvtier.client import Offloaded  # noqa: E402
from kvtier.connectors.vllm import offloader as module  # noqa: E402
from kvtier.connectors.vllm.copies import Copies, HostCopies  # noqa: E402
from kvtier.connectors.vllm.offloader import Offloader  # noqa: E402
from kvtier.connectors.vllm.tally import Tally  # noqa: E402
from tests.connectors.vllm.conftest import OpenCache  # noqa: E402
from tests.connectors.vllm.making import parts  # noqa: E402
from tests.connectors.vllm.workplace import (  # noqa: E402
    HeldCopies,
    offload,
    place_of,
    run,
    stored_of,
)
from tests.sidecar import HANG_S, until  # noqa: E402

WHOLE = parts()
DIGEST = WHOLE[0].digest
BLOCKS = [5, 9, 2, 33, 14, 60]  # three chunks
FOR_EVER = 1e6


class Running:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._thread = threading.Thread(target=call)
        self._thread.start()

    @property
    def returned(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(HANG_S)
        assert self.returned


@dataclass
class HungClient:
    """A service that hangs in each offload until it is let go, and then wants nothing."""

    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    may: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    @contextmanager
    def offload(self, prefix: Any, deadline_s: float) -> Iterator[Any]:
        self.entered.release()
        assert self.may.acquire(timeout=HANG_S)
        yield _Nothing()


class _Nothing(list[Any]):
    outcome = Offloaded()


@dataclass
class Made:
    offloader: Offloader
    tally: Tally
    place: Any


Make = Callable[..., Made]


@pytest.fixture
def make(open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes offloaders that wait at fences for ever, or not at all."""
    made: list[tuple[Offloader, Any]] = []

    def of(copies: Copies, *, wait_s: float = FOR_EVER, client: Any = None) -> Made:
        monkeypatch.setattr(module, "FENCE_WAIT_S", wait_s)
        place, tally = place_of(WHOLE, 1), Tally()
        stored = stored_of(WHOLE, place, {DIGEST: client or open_cache(WHOLE[0])})
        found = Offloader(stored, copies, 5.0, tally)
        made.append((found, copies if client is None else client))
        return Made(found, tally, place)

    yield of
    for offloader, held in made:
        for _ in range(100 if hasattr(held, "may") else 0):
            held.may.release()
        offloader.close()
        assert not offloader._thread.is_alive()


def held(open_cache: OpenCache, prompt: int) -> int:
    return open_cache(WHOLE[0]).lookup(run(WHOLE[0], prompt, 0, BLOCKS).prefix)


def until_done(made: Made, number: int) -> None:
    until(lambda: made.offloader._done >= number, f"offload {number} is done")


def test_a_fence_with_nothing_to_wait_for_returns(make: Make) -> None:
    made = make(HostCopies())
    made.offloader.fence(5)
    made.offloader.submit(offload(1, 31, WHOLE, BLOCKS), None)
    until_done(made, 1)
    made.offloader.fence(1)
    made.offloader.fence(9)  # what was never given to this worker is not waited for


def test_a_fence_waits_for_what_is_being_copied(make: Make, open_cache: OpenCache) -> None:
    copies = HeldCopies()
    made = make(copies)
    made.offloader.submit(offload(1, 32, WHOLE, BLOCKS), copies.mark())
    assert copies.begun.acquire(timeout=HANG_S)
    fence = Running(lambda: made.offloader.fence(1))
    for _ in range(3):
        assert not fence.returned
        copies.may.release()
    fence.join()
    assert held(open_cache, 32) == 3
    assert made.tally.take()["offloaded_chunks"] == 3


def test_a_fence_gives_up_but_never_during_a_copy(make: Make, open_cache: OpenCache) -> None:
    """The chunk being copied is stored whole, those after it are not, and their blocks are free."""
    copies = HeldCopies()
    made = make(copies, wait_s=0.0)
    made.offloader.submit(offload(1, 33, WHOLE, BLOCKS), None)
    assert copies.begun.acquire(timeout=HANG_S)
    fence = Running(lambda: made.offloader.fence(1))
    until(lambda: made.offloader._given_up, "it is given up")
    assert not fence.returned
    before = made.place.tokens(WHOLE[0], BLOCKS[:2])
    copies.may.release()
    fence.join()
    for name, _ in WHOLE[0].layers:
        made.place.caches[name].zero_()  # the engine writes
    until_done(made, 1)
    assert not copies.begun.acquire(blocking=False)
    assert held(open_cache, 33) == 1
    with open_cache(WHOLE[0]).load(run(WHOLE[0], 33, 0, BLOCKS).prefix) as loaded:
        (chunk,) = (bytes(each.data) for each in loaded)
    (theirs,) = before
    assert chunk == theirs.transpose(0, 1).contiguous().numpy().tobytes()
    counted = made.tally.take()
    assert (counted["fenced_offloads"], counted["offloaded_chunks"]) == (1, 1)
    assert counted["refused_chunks"] == 2


def test_what_is_given_up_before_it_began_stores_nothing(make: Make, open_cache: OpenCache) -> None:
    copies = HeldCopies()
    made = make(copies, wait_s=0.0)
    for number in (1, 2, 3):
        made.offloader.submit(offload(number, 33 + number, WHOLE, BLOCKS), None)
    assert copies.begun.acquire(timeout=HANG_S)
    fence = Running(lambda: made.offloader.fence(2))
    until(lambda: made.offloader._given_up == 2, "two are given up")
    for _ in range(4):
        copies.may.release()
    fence.join()
    until_done(made, 3)
    assert [held(open_cache, prompt) for prompt in (34, 35, 36)] == [1, 0, 3]
    assert made.tally.take()["fenced_offloads"] == 2


def test_a_service_that_hangs_holds_no_fence(make: Make) -> None:
    client = HungClient()
    made = make(HostCopies(), wait_s=0.0, client=client)
    made.offloader.submit(offload(1, 37, WHOLE, BLOCKS), None)
    assert client.entered.acquire(timeout=HANG_S)
    made.offloader.fence(1)  # returns, though the offload is not done
    assert not made.offloader._done
    client.may.release()
    until_done(made, 1)


def test_what_was_given_up_is_not_waited_for_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = HungClient()
    made = make(HostCopies(), wait_s=0.0, client=client)
    made.offloader.submit(offload(1, 38, WHOLE, BLOCKS), None)
    assert client.entered.acquire(timeout=HANG_S)
    made.offloader.fence(1)
    waits: list[float | None] = []
    wait_for = made.offloader._state.wait_for

    def watched(predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        if not predicate():
            waits.append(timeout)
        return wait_for(predicate, timeout)

    monkeypatch.setattr(made.offloader._state, "wait_for", watched)
    made.offloader.fence(1)
    assert waits == []


def test_what_was_given_up_in_the_queue_is_not_taken_to_the_service(make: Make) -> None:
    client = HungClient()
    made = make(HostCopies(), wait_s=0.0, client=client)
    for number in (1, 2, 3):
        made.offloader.submit(offload(number, 38, WHOLE, BLOCKS), None)
    assert client.entered.acquire(timeout=HANG_S)
    made.offloader.fence(3)
    for _ in range(3):
        client.may.release()
    until_done(made, 3)
    assert not client.entered.acquire(blocking=False)


def test_an_offload_reads_after_its_own_mark(make: Make) -> None:
    seen: list[object] = []

    class Marked(HostCopies):
        def reach(self, mark: object) -> None:
            seen.append(mark)

        def gather(self, pages: Any, data: Any, blocks: Any, span: Any) -> None:
            seen.append("gathers")
            super().gather(pages, data, blocks, span)

    made = make(Marked())
    made.offloader.submit(offload(1, 39, WHOLE, BLOCKS[:2]), "first")
    made.offloader.submit(offload(2, 40, WHOLE, BLOCKS), "second")
    until_done(made, 2)
    assert seen == ["first", "gathers", *["second", "gathers"] * 3]


def test_a_fence_does_not_wait_for_the_engines_own_work(make: Make) -> None:
    """The work that fills the blocks is not done: nothing is read yet, so it can be given up."""
    reached, may = threading.Event(), threading.Event()

    class Late(HostCopies):
        def reach(self, mark: object) -> None:
            reached.set()
            assert may.wait(HANG_S)

    made = make(Late(), wait_s=0.0)
    made.offloader.submit(offload(1, 90, WHOLE, BLOCKS), None)
    assert reached.wait(HANG_S)
    made.offloader.fence(1)  # returns
    may.set()
    until_done(made, 1)
    counted = made.tally.take()
    assert (counted["fenced_offloads"], counted["refused_chunks"]) == (1, 3)


def test_stored_chunks_are_reported_once(make: Make) -> None:
    made = make(HostCopies())
    made.offloader.submit(offload(7, 41, WHOLE, BLOCKS), None)
    until_done(made, 7)
    assert made.offloader.take_stored() == {(7, chunk, DIGEST): 1 for chunk in range(3)}
    assert not made.offloader.take_stored()


def test_closing_finishes_what_is_under_way(make: Make, open_cache: OpenCache) -> None:
    made = make(HostCopies())
    for number in range(1, 21):
        made.offloader.submit(offload(number, 50 + number, WHOLE, BLOCKS), None)
    made.offloader.close()
    assert not made.offloader._thread.is_alive()
    assert all(held(open_cache, 50 + number) == 3 for number in range(1, 21))


def test_closing_gives_up_what_does_not_end(
    make: Make, monkeypatch: pytest.MonkeyPatch, open_cache: OpenCache
) -> None:
    monkeypatch.setattr(module, "_DRAIN_S", 0.0)
    copies = HeldCopies()
    made = make(copies)
    made.offloader.submit(offload(1, 80, WHOLE, BLOCKS), None)
    assert copies.begun.acquire(timeout=HANG_S)
    made.offloader.close()
    monkeypatch.setattr(module, "_DRAIN_S", HANG_S)
    for _ in range(3):
        copies.may.release()
    until_done(made, 1)
    assert held(open_cache, 80) == 1
