"""What is told of stored chunks, and what is counted."""

from collections import Counter
from types import SimpleNamespace

import pytest

from kvtier.connectors.vllm.events import StoredChunks
from kvtier.connectors.vllm.orders import OffloadOrder, Run, StepReport
from kvtier.connectors.vllm.scheduling import Scheduling
from kvtier.connectors.vllm.tally import COUNTS, Tally
from tests.connectors.vllm.making import parts, request, tracked
from tests.connectors.vllm.simulated_planning import Shape
from tests.connectors.vllm.simulation import Simulation

BOTH = parts((None, 12))
FULL, WINDOW = BOTH
TOKENS = list(range(1000, 1040))


def order(
    number: int, first: int = 0, stop: int = 3, of: tuple[object, ...] = BOTH
) -> OffloadOrder:
    chains = tracked(request(40), BOTH)
    chains.key(5)
    runs = {
        part.digest: Run(chains.chains.run(part.digest, first, stop), first, {})
        for part in BOTH
        if part in of
    }
    return OffloadOrder(number, "r", runs)


def watched() -> StoredChunks:
    made = StoredChunks()
    made.watched = True
    return made


def stored(number: int, chunk: int, *of: object) -> "Counter[tuple[int, int, bytes]]":
    return Counter({(number, chunk, part.digest): 1 for part in BOTH if part in of})


def test_a_chunk_is_announced_once_when_all_its_parts_are_stored() -> None:
    made = watched()
    made.offered(order(1), TOKENS, 8, "adapter")
    made.count(stored(1, 0, FULL) + stored(1, 1, FULL, WINDOW))
    (chunk,) = made.take()
    keys = order(1).runs[FULL.digest].prefix
    assert (chunk.key, chunk.parent, chunk.lora_name) == (keys[1], keys[0], "adapter")
    assert chunk.tokens == TOKENS[8:16]
    made.count(stored(1, 0, WINDOW))
    (chunk,) = made.take()
    assert (chunk.key, chunk.parent, chunk.tokens) == (keys[0], keys.parent, TOKENS[:8])
    assert chunk.parent == FULL.digest
    assert made.take() == []


def test_a_run_that_begins_later_has_the_right_tokens_and_parents() -> None:
    made = watched()
    made.offered(order(1, first=2, stop=5), TOKENS, 8)
    made.count(stored(1, 2, *BOTH) + stored(1, 4, *BOTH))
    keys = order(9, stop=5).runs[FULL.digest].prefix
    assert [(c.key, c.parent, c.tokens) for c in made.take()] == [
        (keys[2], keys[1], TOKENS[16:24]), (keys[4], keys[3], TOKENS[32:40]),
    ]  # fmt: skip


def test_nothing_is_kept_when_nobody_watches() -> None:
    made = StoredChunks()
    made.offered(order(1), TOKENS, 8)
    made.count(stored(1, 0, *BOTH))
    assert made.take() == []
    assert not made._open


def test_what_was_never_offered_is_not_announced() -> None:
    made = watched()
    made.count(stored(7, 0, *BOTH))
    assert made.take() == []


def test_offers_whose_outcome_never_comes_are_forgotten() -> None:
    made = watched()
    for number in range(1, 5000):
        made.offered(order(number), TOKENS, 8)
    assert len(made._open) <= 1024
    made.count(stored(4999, 0, *BOTH))
    assert len(made.take()) == 1


def test_a_chunk_that_lacks_a_part_is_not_announced() -> None:
    made = Simulation(Shape(windows=(None, 12), blocks=40), lambda most: 0)
    scheduling = made.scheduling
    scheduling.stored.watched = True
    asked = made.ask(TOKENS, 4)
    (entry,) = scheduling._tracked.values()
    entry.set_offered([0, 1 << 60])  # of the window nothing can be stored any more
    made.run()
    assert asked.num_output_tokens == 4
    for each in list(made.workers.pending):
        scheduling.received(StepReport(stored=Counter(
            {(each.number, chunk, digest): 1 for digest, run in each.runs.items()
             for chunk in range(run.first, run.first + len(run.prefix))}
        )))  # fmt: skip
    assert scheduling.stored.take() == []


def announced(scheduling: Scheduling, orders: list[OffloadOrder]) -> list[bytes]:
    """All chunks of the orders are stored by all their workers."""
    for each in orders:
        counts = Counter(
            (each.number, place, digest)
            for digest, run in each.runs.items()
            for place in range(run.first, run.first + len(run.prefix))
        )
        scheduling.received(StepReport(stored=counts))
    return [chunk.key for chunk in scheduling.stored.take()]


def test_chunks_offered_while_a_request_runs_are_announced() -> None:
    made = Simulation(Shape(), lambda most: 0)
    made.scheduling.stored.watched = True
    made.ask(TOKENS[:24], 4)
    made.run()
    assert len(announced(made.scheduling, made.workers.pending)) == 3


def test_chunks_offered_when_a_request_ends_are_announced() -> None:
    made = Simulation(Shape(), lambda most: 0)
    made.scheduling.stored.watched = True
    made.scheduling._offering.await_confirmation(99)  # a load of some other request
    made.ask(TOKENS[:24])
    made.run()
    made.workers.execute(made.engine.plan())
    assert len(announced(made.scheduling, made.workers.pending)) == 3


def test_chunks_of_an_adapter_are_announced_with_its_name() -> None:
    made = Simulation(Shape(), lambda most: 0)
    made.scheduling.stored.watched = True
    asked = made.ask(TOKENS[:24], 4)
    asked.lora_request = SimpleNamespace(lora_name="adapter")  # type: ignore[attr-defined]
    made.run()
    announced_before = made.scheduling.stored._open.values()
    assert {each.lora_name for each in announced_before} == {"adapter"}


# ── reports ───────────────────────────────────────────────────────────────────────────────────────


def test_reports_are_merged_whatever_their_order() -> None:
    one = StepReport({1}, {"a"}, stored(1, 0, FULL))
    two = StepReport({2}, {"a", "b"}, stored(1, 0, WINDOW) + stored(1, 1, FULL))
    expected = StepReport({1, 2}, {"a", "b"}, stored(1, 0, *BOTH) + stored(1, 1, FULL))
    assert one.merged(two) == two.merged(one) == expected
    assert StepReport().merged(StepReport()) == StepReport()
    assert not StepReport()
    assert all(map(bool, (one, StepReport({1}), StepReport(failed={"x"}))))


# ── counts ────────────────────────────────────────────────────────────────────────────────────────


def test_counts_are_taken_once() -> None:
    tally = Tally()
    assert tally.take() == {}
    tally.add(loads=2, load_seconds=0.25)
    tally.add(loads=1, lookups=0)
    assert tally.take() == {"loads": 3, "load_seconds": 0.25}
    assert tally.take() == {}


def test_an_unknown_count_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="lodas"):
        Tally().add(lodas=1)


def test_every_count_says_what_it_counts() -> None:
    assert all(text.endswith(".") and text[0].isupper() for text in COUNTS.values())


def test_the_schedulers_counts_agree_with_what_happened() -> None:
    made = Simulation(Shape(), lambda most: 0)
    made.ask(TOKENS, 1)
    made.run()
    for each in list(made.workers.pending):
        made.workers.settle(each)
    for block, _, _ in made.engine.tables.pool.entries():
        made.engine.tables.pool.forget(block)
    made.ask(TOKENS, 1)
    made.ask(TOKENS[:5], 1)  # fills no chunk: nothing to ask
    made.run()
    assert made.scheduling.tally.take() == {"lookups": 2, "loads": 1}
