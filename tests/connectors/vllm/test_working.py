"""The worker's side with a real cache in this process."""

import time

import pytest

torch = pytest.importorskip("torch")

import kvtier  # noqa: E402
from kvtier.connectors.vllm.lookups import Lookups  # noqa: E402
from kvtier.connectors.vllm.orders import StepReport  # noqa: E402
from kvtier.connectors.vllm.parts import Shard  # noqa: E402
from kvtier.errors import KvtierError  # noqa: E402
from tests.connectors.vllm.conftest import OpenCache  # noqa: E402
from tests.connectors.vllm.making import BLOCK, parts  # noqa: E402
from tests.connectors.vllm.workplace import (  # noqa: E402
    BOTH,
    CHUNK,
    SOURCE,
    TARGET,
    WHOLE,
    Bench,
    BrokenClient,
    BrokenCopies,
    finish,
    load,
    offload,
    place_of,
    run,
    same,
    step,
    step_with,
)
from tests.sidecar import HANG_S  # noqa: E402

# ── there and back ────────────────────────────────────────────────────────────────────────────────


def test_what_one_worker_stores_another_loads_into_other_blocks(bench: Bench) -> None:
    theirs, place = bench.worker(seed=1)
    theirs.offload(step_with(offload(1, 11, WHOLE, SOURCE)))
    finish(theirs, 1)
    report = theirs.report()
    assert report is not None
    assert report.stored == {(1, chunk, WHOLE[0].digest): 1 for chunk in range(4)}
    assert theirs.report() is None
    counted = theirs.tally.take()
    assert (counted["offloaded_chunks"], counted["offloaded_bytes"]) == (4, 4 * 256)

    mine, target = bench.worker(seed=2)
    mine.load(step(1, load(11, WHOLE, TARGET), confirm=True))
    assert same(target.tokens(WHOLE[0], TARGET), place.tokens(WHOLE[0], SOURCE))
    assert mine.bad_blocks() == set()
    assert mine.report() == StepReport(confirmed={1})
    counted = mine.tally.take()
    assert (counted["loaded_chunks"], counted["loaded_bytes"]) == (4, 4 * 256)
    assert counted["load_seconds"] > 0
    assert "failed_loads" not in counted


def test_what_is_held_is_not_stored_again(bench: Bench) -> None:
    bench.stored(12, chunks=2)
    worker, _ = bench.worker()
    worker.offload(step_with(offload(1, 12, WHOLE, SOURCE)))
    finish(worker, 1)
    counted = worker.tally.take()
    assert (counted["existing_chunks"], counted["offloaded_chunks"]) == (2, 2)
    report = worker.report()
    assert report is not None
    assert {place for _, place, _ in report.stored} == {2, 3}


def test_a_load_that_begins_in_the_middle_of_a_chunk_leaves_what_is_there(bench: Bench) -> None:
    source = bench.stored(13)
    worker, place = bench.worker(seed=2)
    before = place.tokens(WHOLE[0], range(64))
    worker.load(step(1, load(13, WHOLE, TARGET, start=CHUNK + BLOCK), confirm=True))
    after = place.tokens(WHOLE[0], range(64))
    filled = TARGET[3:]
    assert same([each[filled] for each in after], source.tokens(WHOLE[0], SOURCE[3:]))
    others = [block for block in range(64) if block not in filled]
    assert same([each[others] for each in after], [each[others] for each in before])
    assert worker.bad_blocks() == set()


@pytest.mark.parametrize(
    ("held", "start", "bad"),
    [
        (2, 0, TARGET[4:]),
        (0, 0, TARGET),
        (2, CHUNK + BLOCK, TARGET[4:]),
        (1, CHUNK + BLOCK, TARGET[3:]),  # of a chunk that is half there, the other half
        (1, 3 * CHUNK, TARGET[6:]),
    ],
)
def test_of_what_does_not_come_the_blocks_are_named(
    bench: Bench, held: int, start: int, bad: list[int]
) -> None:
    prompt = 100 + 10 * held + start
    source = bench.stored(prompt, chunks=held) if held else place_of(WHOLE, 1)
    worker, place = bench.worker(seed=2)
    worker.load(step(7, load(prompt, WHOLE, TARGET, start=start, stop=31), confirm=True))
    assert worker.bad_blocks() == set(bad)
    assert worker.bad_blocks() == set()
    assert worker.report() == StepReport(confirmed={7}, failed={f"r{prompt}"})
    assert worker.tally.take()["failed_loads"] == 1
    came = [n for n, block in enumerate(TARGET) if block not in bad and n * BLOCK >= start]
    mine = place.tokens(WHOLE[0], [TARGET[n] for n in came])
    assert same(mine, source.tokens(WHOLE[0], [SOURCE[n] for n in came]))


def test_the_null_block_is_never_a_bad_one(bench: Bench) -> None:
    worker, _ = bench.worker(parts((12,)), seed=2)
    worker.load(step(1, load(14, parts((12,)), [0, 0, 0, *TARGET[3:]]), confirm=True))
    assert worker.bad_blocks() == set(TARGET[3:])


def test_every_part_counts(bench: Bench, open_cache: OpenCache) -> None:
    """The window's part has three chunks, the other one."""
    full, window = BOTH
    bench.stored(15, [full], chunks=1)
    bench.stored(15, [window], chunks=3)
    worker, place = bench.worker(BOTH, seed=2)
    untouched = place.tokens(full, TARGET[2:])
    worker.load(step(1, load(15, BOTH, TARGET), confirm=True))
    assert worker.bad_blocks() == set(TARGET[2:])
    assert same(place.tokens(full, TARGET[2:]), untouched)


def test_other_workers_shares_are_left_to_them(bench: Bench) -> None:
    mine, theirs = (parts(shard=Shard(rank, 2)) for rank in (0, 1))
    worker, place = bench.worker(mine)
    before = place.tokens(mine[0], range(64))
    worker.load(step(1, load(16, theirs, TARGET), confirm=True))
    worker.offload(step_with(offload(1, 16, theirs, SOURCE)))
    finish(worker, 1)
    assert worker.bad_blocks() == set()
    assert worker.report() == StepReport(confirmed={1})
    assert same(place.tokens(mine[0], range(64)), before)
    assert bench.open_cache(mine[0]).lookup(run(theirs[0], 16, 0, SOURCE).prefix) == 0
    counted = worker.tally.take()
    assert not counted.get("offloaded_chunks")


# ── several workers ───────────────────────────────────────────────────────────────────────────────


def test_a_hit_is_announced_when_all_ranks_have_stored_their_share(
    bench: Bench, open_cache: OpenCache
) -> None:
    by_rank = [parts(shard=Shard(rank, 2)) for rank in (0, 1)]
    flat = [part for each in by_rank for part in each]
    lookups = Lookups({part.digest: open_cache(part) for part in flat})

    def announced() -> int:
        prefixes = {part.digest: run(part, 17, 0, SOURCE).prefix for part in flat}
        question = lookups.ask(prefixes, time.monotonic() + HANG_S)
        assert question.ready.wait(HANG_S)
        return min(held.chunks for held in question.held)

    try:
        order = offload(1, 17, flat, SOURCE)
        sources = []
        for rank, expected in ((0, 0), (1, 4)):
            worker, place = bench.worker(by_rank[rank], seed=rank)
            worker.offload(step_with(order))
            finish(worker, 1)
            sources.append(place)
            assert announced() == expected
    finally:
        lookups.close()
    for rank in (0, 1):
        worker, place = bench.worker(by_rank[rank], seed=7)
        worker.load(step(1, load(17, flat, TARGET), confirm=True))
        part = by_rank[rank][0]
        assert same(place.tokens(part, TARGET), sources[rank].tokens(part, SOURCE))


def test_one_rank_that_fails_is_told_in_the_common_report(bench: Bench) -> None:
    by_rank = [parts(shard=Shard(rank, 2)) for rank in (0, 1)]
    bench.stored(18, by_rank[0])
    order = load(18, [*by_rank[0], *by_rank[1]], TARGET)
    reports, bad = [], []
    for of in by_rank:
        worker, _ = bench.worker(of, seed=3)
        worker.load(step(4, order, confirm=True))
        bad.append(worker.bad_blocks())
        report = worker.report()
        assert report is not None
        reports.append(report)
    assert bad == [set(), set(TARGET)]
    assert reports[0].merged(reports[1]) == StepReport({4}, {"r18"})
    assert reports[1].merged(reports[0]) == StepReport({4}, {"r18"})


def test_of_replicas_one_stores_and_all_load(bench: Bench, open_cache: OpenCache) -> None:
    copy, _ = bench.worker(seed=1, writer=False)
    copy.offload(step_with(offload(1, 19, WHOLE, SOURCE)))
    finish(copy, 1)
    assert copy.report() is None
    assert copy.tally.take() == {}
    assert open_cache(WHOLE[0]).lookup(run(WHOLE[0], 19, 0, SOURCE).prefix) == 0
    source = bench.stored(19)
    loads, place = bench.worker(seed=2, writer=False)
    loads.load(step(1, load(19, WHOLE, TARGET), confirm=True))
    assert same(place.tokens(WHOLE[0], TARGET), source.tokens(WHOLE[0], SOURCE))


# ── what goes wrong is a failed load ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error", [KvtierError("x"), RuntimeError("x"), MemoryError(), OSError(5)])
def test_an_exception_of_the_client_is_a_failed_load(bench: Bench, error: Exception) -> None:
    client = BrokenClient(error)
    worker, place = bench.worker(clients={WHOLE[0].digest: client})
    before = place.tokens(WHOLE[0], range(64))
    worker.load(step(1, load(20, WHOLE, TARGET, start=BLOCK), confirm=True))
    assert worker.bad_blocks() == set(TARGET[1:])
    assert worker.report() == StepReport({1}, {"r20"})
    worker.offload(step_with(offload(1, 20, WHOLE, SOURCE), offload(2, 20, WHOLE, SOURCE)))
    finish(worker, 2)
    assert worker.report() is None
    assert same(place.tokens(WHOLE[0], range(64)), before)
    assert len(client.deadlines) == 3
    assert all(each is not None and 0 < each <= 5.0 for each in client.deadlines)


def test_an_exception_of_the_device_is_a_failed_load_and_stores_nothing(
    bench: Bench, open_cache: OpenCache
) -> None:
    bench.stored(21)
    worker, _ = bench.worker(copies=BrokenCopies())
    worker.load(step(1, load(21, WHOLE, TARGET), confirm=True))
    assert worker.bad_blocks() == set(TARGET)
    worker.offload(step_with(offload(1, 22, WHOLE, SOURCE)))
    finish(worker, 1)
    assert worker.report() == StepReport({1}, {"r21"})
    assert open_cache(WHOLE[0]).lookup(run(WHOLE[0], 22, 0, SOURCE).prefix) == 0


def test_a_cache_that_is_gone_is_a_failed_load(bench: Bench) -> None:
    client = kvtier.open(WHOLE[0].space, cpu="16MiB")
    worker, _ = bench.worker(clients={WHOLE[0].digest: client})
    client.close()
    worker.load(step(1, load(23, WHOLE, TARGET), confirm=True))
    assert worker.bad_blocks() == set(TARGET)
    worker.offload(step_with(offload(1, 23, WHOLE, SOURCE)))
    finish(worker, 1)
    assert worker.tally.take()["refused_chunks"] == 4
