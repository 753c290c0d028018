"""Which chunks are offered, and when."""

import hypothesis.strategies as st
from hypothesis import given

from kvtier.connectors.vllm.offering import Offering
from kvtier.connectors.vllm.orders import OffloadOrder
from kvtier.connectors.vllm.parts import Part
from kvtier.connectors.vllm.tracking import Tracked
from tests.connectors.vllm.making import block_table, parts, request, tracked

CHUNK = 8
WHOLE = parts()
BOTH = parts((None, 12))


def chunks(order: OffloadOrder | None, part: Part = WHOLE[0]) -> list[int]:
    """The places of the chunks that an order offers of a part."""
    run = order.runs.get(part.digest) if order is not None else None
    return list(range(run.first, run.first + len(run.prefix))) if run is not None else []


def offered_at(computed: list[int], of: Tracked, made: Offering | None = None) -> list[list[int]]:
    """What is offered when so many tokens are computed, one after the other."""
    made = made or Offering(WHOLE, output=True)
    table = block_table(tokens=200)
    found = []
    for tokens in computed:
        due = made.due(of, tokens)
        order = made.offer(of, table, tokens) if due else None
        assert due == (order is not None)
        found.append(chunks(order))
    return found


def test_a_chunk_is_offered_with_the_step_that_completes_it() -> None:
    of = tracked(request(40), WHOLE)
    assert offered_at([7, 8, 9, 23, 24, 40], of) == [[], [0], [], [1], [2], [3, 4]]


@given(
    known=st.integers(1, 60),
    prompt=st.integers(1, 60),
    computed=st.lists(st.integers(0, 80)),
    output=st.booleans(),
)
def test_only_computed_tokens_whose_ids_are_known_are_offered_each_once(
    known: int, prompt: int, computed: list[int], output: bool
) -> None:
    of = tracked(request(known, prompt=min(prompt, known)), WHOLE)
    found = offered_at(sorted(computed), of, Offering(WHOLE, output=output))
    most = min(max(computed, default=0), known if output else min(prompt, known))
    assert [place for each in found for place in each] == list(range(most // CHUNK))


def test_a_run_has_the_keys_and_blocks_of_its_tokens() -> None:
    of = tracked(request(40), WHOLE, extra=b"x")
    made = Offering(WHOLE, output=True)
    made.offer(of, [[9, 8, 7, 6]], 10)
    order = made.offer(of, [[9, 8, 7, 6, 5, 4, 3]], 26)
    assert order is not None
    run = order.runs[WHOLE[0].digest]
    assert (order.number, order.request, run.first) == (2, "r", 1)
    assert run.blocks == {0: (7, 6, 5, 4)}
    assert run.prefix == of.chains.run(WHOLE[0].digest, 1, 3)


def test_what_the_service_holds_is_not_offered_part_by_part() -> None:
    of = tracked(request(24), BOTH)
    of.set_offered([2, 1])
    order = Offering(BOTH, output=True).offer(of, block_table(tokens=24, groups=2), 24)
    assert [chunks(order, part) for part in BOTH] == [[2], [1, 2]]


def test_a_chunk_whose_blocks_the_engine_gave_away_ends_its_part() -> None:
    of = tracked(request(40), BOTH)
    made = Offering(BOTH, output=True)
    full, window = block_table(tokens=40, groups=2)
    order = made.offer(of, [full, [0, 0, 0, *window[3:]]], 16)
    assert [chunks(order, part) for part in BOTH] == [[0, 1], []]
    order = made.offer(of, [full, window], 40)
    assert [chunks(order, part) for part in BOTH] == [[2, 3, 4], []]
    assert not made.due(of, 40)


def test_when_no_part_has_its_blocks_there_is_no_order() -> None:
    made = Offering(WHOLE, output=True)
    of = tracked(request(16), WHOLE)
    assert made.offer(of, [[0, 1, 2, 3]], 16) is None
    assert made.fence([1, 2, 3]) == 0
    assert not made.due(of, 16)


def test_nothing_is_offered_until_all_steps_that_load_are_confirmed() -> None:
    made = Offering(WHOLE, output=True)
    assert not made.held_back
    made.await_confirmation(3)
    made.await_confirmation(4)
    made.confirmed({4})
    assert made.held_back
    made.confirmed({2, 3})
    assert not made.held_back


def test_ended_requests_are_offered_once_and_only_if_a_chunk_is_due() -> None:
    made = Offering(WHOLE, output=True)
    of = tracked(request(20), WHOLE)
    made.offer_at_end(of, block_table(tokens=20), 7)
    assert made.parting() == []
    made.offer_at_end(of, block_table(tokens=20), 20)
    (order,) = made.parting()
    assert chunks(order) == [0, 1]
    assert made.parting() == []
    made.offer_at_end(of, block_table(tokens=20), 20)
    assert made.parting() == []


def test_numbers_count_up_over_all_requests() -> None:
    made = Offering(WHOLE, output=True)
    numbers = []
    for name in "abc":
        order = made.offer(tracked(request(8, name=name), WHOLE), [[1, 2]], 8)
        assert order is not None
        numbers.append(order.number)
    assert numbers == [1, 2, 3]
