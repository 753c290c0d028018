"""Loads of what was secured before, and loads beside the engine's steps."""

import queue
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import kvtier  # noqa: E402
from kvtier.connectors.vllm.copies import HostCopies  # noqa: E402
from kvtier.connectors.vllm.lookups import Secured  # noqa: E402
from kvtier.connectors.vllm.orders import StepOrders, StepReport  # noqa: E402
from kvtier.connectors.vllm.working import Working  # noqa: E402
from tests.connectors.vllm.conftest import OpenCache  # noqa: E402
from tests.connectors.vllm.making import BLOCK  # noqa: E402
from tests.connectors.vllm.workplace import (  # noqa: E402
    CHUNK,
    SOURCE,
    TARGET,
    WHOLE,
    Bench,
    BrokenClient,
    BrokenCopies,
    alive,
    load,
    offload,
    place_of,
    run,
    same,
    step,
    step_with,
    stored_of,
)
from tests.sidecar import HANG_S, until  # noqa: E402

# ── what was secured ──────────────────────────────────────────────────────────────────────────────


def secured_of(bench: Bench, prompt: int, first: int) -> Secured:
    secured = Secured(first)
    client, keys = bench.open_cache(WHOLE[0]), run(WHOLE[0], prompt, 0, SOURCE).prefix
    secured.secure(client, WHOLE[0].digest, keys[first:], HANG_S)
    return secured


@pytest.mark.parametrize("start", [0, CHUNK, CHUNK + BLOCK, 3 * CHUNK])
@pytest.mark.parametrize("first", [0, 1])
def test_what_was_secured_is_loaded_though_the_service_no_longer_has_it(
    bench: Bench, first: int, start: int
) -> None:
    if start < first * CHUNK:
        return  # it was secured from where the engine's own ended
    prompt = 200 + 40 * first + start
    source = bench.stored(prompt)
    secured = secured_of(bench, prompt, first)
    assert secured.reach == 4
    bench.open_cache(WHOLE[0]).evict(None)
    worker, place = bench.worker(
        seed=2, clients={WHOLE[0].digest: BrokenClient(RuntimeError("it is asked"))}
    )
    worker.prepare(f"r{prompt}", secured)
    worker.load(step(1, load(prompt, WHOLE, TARGET, start=start), confirm=True))
    skipped = start // BLOCK
    mine = place.tokens(WHOLE[0], TARGET[skipped:])
    assert same(mine, source.tokens(WHOLE[0], SOURCE[skipped:]))
    assert worker.bad_blocks() == set()
    assert secured.chunks == {}


def test_what_was_secured_is_let_go_of_when_the_copy_fails(bench: Bench) -> None:
    bench.stored(190)
    secured = secured_of(bench, 190, 0)
    worker, _ = bench.worker(copies=BrokenCopies())
    worker.prepare("r190", secured)
    worker.load(step(1, load(190, WHOLE, TARGET), confirm=True))
    assert worker.bad_blocks() == set(TARGET)
    assert secured.chunks == {}
    stats = bench.open_cache(WHOLE[0]).stats()
    assert stats is not None
    until(lambda: not leases(bench), "its lease has ended")


def leases(bench: Bench) -> int:
    stats = bench.open_cache(WHOLE[0]).stats()
    assert stats is not None
    return stats.leases


def test_as_much_is_secured_as_is_held(bench: Bench) -> None:
    bench.stored(191, chunks=2)
    secured = secured_of(bench, 191, 1)
    assert (secured.first, secured.reach) == (1, 2)
    assert leases(bench) == 1
    secured.release()
    until(lambda: not leases(bench), "its lease has ended")
    secured.release()  # twice does nothing


# ── beside the steps ──────────────────────────────────────────────────────────────────────────────


def test_loads_in_the_background_are_reported_when_they_end(bench: Bench) -> None:
    source = bench.stored(24)
    worker, place = bench.worker(seed=2)
    assert worker._background._thread is None  # there is none as long as nothing needs it
    orders = [
        load(24, WHOLE, TARGET, background=True),
        load(25, WHOLE, [40, 44, 45, 46], background=True),
    ]
    worker.load(step(1, *orders))
    finished: set[str] = set()
    failed: set[str] = set()

    def ended() -> bool:
        arrivals = worker.arrivals()
        finished.update(arrivals.finished)
        failed.update(arrivals.failed)
        return len(finished) == 2

    until(ended, "both loads have ended")
    assert (finished, failed) == ({"r24", "r25"}, {"r25"})
    assert same(place.tokens(WHOLE[0], TARGET), source.tokens(WHOLE[0], SOURCE))
    assert worker.bad_blocks() == set()  # of a request, not of blocks
    assert worker.report() == StepReport(failed={"r25"})
    assert not worker.arrivals().finished


def test_an_idle_step_waits_for_a_load_to_end(bench: Bench) -> None:
    bench.stored(29)
    worker, _ = bench.worker(idle_wait_s=HANG_S)
    worker.load(step(1, load(29, WHOLE, TARGET, background=True)))
    worker.load(StepOrders(2, idle=True))
    assert worker.arrivals().finished == {"r29"}
    assert worker.arrivals().finished == set()  # nothing is under way: there is no wait


def test_a_load_in_the_background_that_raises_ends_as_failed(bench: Bench) -> None:
    worker, _ = bench.worker(clients={WHOLE[0].digest: BrokenClient(RuntimeError("x"))})
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for number in (26, 27):
        worker.load(step(1, load(number, WHOLE, TARGET, background=True)))
        until(lambda: taken(worker, ended), "it has ended")
        assert ended.get() == ({f"r{number}"}, {f"r{number}"})


def taken(worker: Working, ended: queue.SimpleQueue[Any]) -> bool:
    arrivals = worker.arrivals()
    if arrivals.finished:
        ended.put((arrivals.finished, arrivals.failed))
    return bool(arrivals.finished)


def test_closing_ends_everything(open_cache: OpenCache) -> None:
    client = kvtier.open(WHOLE[0].space, cpu="16MiB")
    place = place_of(WHOLE, 1)
    stored = stored_of(WHOLE, place, {WHOLE[0].digest: client})
    worker = Working(stored, HostCopies(), 5.0, BLOCK)
    worker.load(step(1, load(28, WHOLE, TARGET, background=True)))
    worker.offload(step_with(offload(1, 28, WHOLE, SOURCE)))
    worker.close()
    assert not worker._offloader._thread.is_alive()
    assert not alive(worker._background._thread)
    assert not client.connected
