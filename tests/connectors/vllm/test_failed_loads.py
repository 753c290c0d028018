"""Loads that fail, on a vLLM exactly as 0.32 is.

When a load in line with a step fails, vLLM lets the first request that has a bad block go back to
it, takes others that share it to have it, and removes nothing from its prefix cache
(`_update_requests_with_invalid_blocks`). That is right only if the first request computes the
blocks in the very next step, and if no step was planned in between. So a load in line must not
fail: what it loads is secured before it is promised. Loads in the background may: their blocks are
in nobody's hands, and in no cache, until they are loaded.
"""

import pytest

from tests.connectors.vllm.simulated_planning import Shape
from tests.connectors.vllm.simulation import EVERYTHING, Simulation

PROMPT = list(range(100, 124))  # three chunks
LONGER = [*PROMPT, *range(500, 512)]
OTHER = [*PROMPT, *range(600, 620)]
LOADS = pytest.mark.parametrize("load", ["sync", "async"])


def simulation(load: str = "sync", **shape: object) -> Simulation:
    """An engine that finds the prompt's chunks in the service, and not in its own cache."""
    made = Simulation(Shape(**shape), lambda most: 0, load=load)  # type: ignore[arg-type]
    made.ask(PROMPT)
    made.run()
    made.workers.execute(made.engine.plan())
    for order in list(made.workers.pending):
        made.workers.settle(order)
    assert made.held(PROMPT) == 3
    for block, _, _ in made.engine.tables.pool.entries():
        made.engine.tables.pool.forget(block)
    return made


def lose(made: Simulation, kept: int = 1) -> None:
    """All but a few of the service's chunks are evicted."""
    store = made.store.chunks
    for place in list(store)[kept:]:
        del store[place]


def check(made: Simulation) -> None:
    made.run()
    made.end()
    assert not made.engine.wrong_answers


@LOADS
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_what_is_lost_after_it_was_found_is_computed(load: str, kept: int) -> None:
    made = simulation(load)
    made.ask(LONGER, 12)  # the service says three chunks
    lose(made, kept)
    check(made)


@LOADS
def test_what_is_lost_after_it_was_found_is_stored_again(load: str) -> None:
    made = simulation(load)
    made.ask(LONGER, 12)
    lose(made)
    check(made)
    assert made.held(LONGER) == 4


@LOADS
def test_what_is_lost_after_it_was_promised_is_no_matter_in_line(load: str) -> None:
    made = simulation(load)
    made.ask(LONGER, 12)
    execute = made.engine._execute

    def losing(step: object) -> None:
        lose(made, 0)
        execute(step)  # type: ignore[arg-type]

    made.engine._execute = losing
    made.engine.step()
    made.engine._execute = execute
    assert made.scheduling.tally.take()["loads"] == 1
    check(made)


@LOADS
def test_a_step_that_was_planned_on_a_failed_load_answers_nothing(load: str) -> None:
    made = simulation(load, depth=2)
    made.ask(LONGER, 12)
    lose(made)
    check(made)


@LOADS
def test_blocks_of_an_aborted_request_whose_load_failed_are_not_used(load: str) -> None:
    made = simulation(load)
    aborted = made.ask(LONGER)
    lose(made)
    made.engine.step()
    made.engine.abort(aborted)
    made.store.chunks.clear()
    made.ask(OTHER)
    check(made)


@LOADS
@pytest.mark.parametrize("depth", [1, 2])
def test_others_that_share_lost_blocks_are_right(load: str, depth: int) -> None:
    """A long prompt is computed in several steps; another request shares its beginning."""
    made = simulation(load, longest_prefill=8, depth=depth)
    made.ask(LONGER)
    lose(made)
    made.engine.step()
    made.store.chunks.clear()
    made.ask(OTHER, 12)
    check(made)


@LOADS
def test_a_lost_load_of_a_sliding_window_is_computed(load: str) -> None:
    """Going back to a bad block is no way out here: the blocks before it are gone."""
    made = simulation(load, windows=(10,))
    made.ask(LONGER)
    lose(made, 0)
    check(made)


def test_the_last_token_of_a_prompt_that_is_loaded_whole_sees_its_window() -> None:
    made = simulation("async", windows=(None, 17), blocks=40)
    made.workers.brings = EVERYTHING
    made.ask(PROMPT, 12)
    check(made)


def test_an_engine_whose_workers_are_other_processes_loads_beside_its_steps() -> None:
    made = Simulation(Shape(), lambda most: 0, load="sync", in_process=False)
    assert made.scheduling._matching.background
    assert not simulation("sync").scheduling._matching.background


def test_what_was_secured_for_a_request_that_is_aborted_is_let_go_of() -> None:
    made = simulation("sync")
    asked = made.ask(LONGER)
    assert made.scheduling.matched(asked, 0) == (24, False)
    assert [secured.open for secured in made.lookups.secured] == [True]
    made.engine.abort(asked)
    assert [secured.open for secured in made.lookups.secured] == [False]


def test_what_is_secured_too_late_is_let_go_of() -> None:
    made = Simulation(Shape(), lambda most: most)  # every answer comes later
    asked = made.ask(LONGER)
    made.lookups.answer()
    made.engine.abort(asked)
    made.lookups.answer()
    assert not any(secured.open for secured in made.lookups.secured)
