"""The engine tells the connector to forget: its weights may have changed, its KV may be gone."""

import pytest

from tests.connectors.vllm.simulated_planning import Shape
from tests.connectors.vllm.simulation import Simulation

PROMPT = list(range(100, 124))  # three chunks


def simulation(load: str = "sync") -> Simulation:
    return Simulation(Shape(), lambda most: 0, load=load)


def stored(made: Simulation) -> None:
    made.ask(PROMPT)
    made.run()
    for order in list(made.workers.pending):
        made.workers.settle(order)


@pytest.mark.parametrize("load", ["sync", "async"])
def test_what_was_stored_before_is_not_seen_any_more(load: str) -> None:
    made = simulation(load=load)
    stored(made)
    assert made.held(PROMPT) == 3
    made.change_weights()
    asked = made.ask(PROMPT)
    assert made.scheduling.matched(asked, 0) == (0, False)
    made.run()
    made.end()
    assert made.held(PROMPT) == 3  # of the new weights, under other keys
    assert len(made.store.chunks) == 6


def test_no_two_engines_see_what_each_other_stored_after_it() -> None:
    salts = set()
    for _ in range(3):
        made = simulation()
        made.change_weights()
        salts.add(made.scheduling._salt)
        made.change_weights()
        salts.add(made.scheduling._salt)
    assert len(salts) == 6


@pytest.mark.parametrize("load", ["sync", "async"])
def test_requests_that_began_before_are_neither_loaded_nor_offered(load: str) -> None:
    made = simulation(load=load)
    stored(made)
    began = made.ask(PROMPT, 12)
    waits = made.ask([*PROMPT, 7, 8], 12)
    made.engine.tables.pool.forget(1)
    made.scheduling.matched(waits, 0)
    made.change_weights()
    assert not any(secured.open for secured in made.lookups.secured)
    assert made.scheduling.matched(began, 0) == (0, False)
    assert made.scheduling.matched(waits, 0) == (0, False)
    made.run()
    assert not made.workers.pending
    assert len(made.store.chunks) == 3


def test_what_ended_before_is_not_read_after_it() -> None:
    made = simulation()
    made.scheduling._offering.await_confirmation(99)  # a load of some other request
    made.ask(PROMPT)
    made.run()
    made.scheduling.start_over()
    assert made.engine.plan().orders.offloads == ()


def test_what_is_under_way_is_given_up_with_the_next_step() -> None:
    made = simulation()
    made.ask(PROMPT)
    made.run()
    (order,) = made.workers.pending
    made.scheduling.start_over()
    assert made.engine.plan().orders.fence >= order.number


def test_all_that_is_under_way_is_given_up_whatever_the_next_step_writes() -> None:
    made = simulation()
    for number in range(3):
        made.ask([number, *PROMPT])
        made.run()
    first, *_, last = made.workers.pending
    made.scheduling.start_over()
    (blocks,) = next(iter(first.runs.values())).blocks.values()
    assert made.scheduling._offering.fence(blocks) >= last.number
