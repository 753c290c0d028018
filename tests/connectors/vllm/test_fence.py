"""Nobody writes to a block that an offload may still read without the workers waiting for it."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, rule

from kvtier.connectors.vllm.fence import Fence
from kvtier.connectors.vllm.offering import Offering
from tests.connectors.vllm.making import block_table, parts, request, tracked

BLOCKS = st.sets(st.integers(1, 12), min_size=1, max_size=6)


class FenceMachine(RuleBasedStateMachine):
    """Offloads are numbered in order, end in order, and a fence ends all up to its number. The
    oracle keeps what each unfinished one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fence = Fence()
        self.number = 0
        self.reading: dict[int, set[int]] = {}

    @rule(blocks=BLOCKS)
    def offload(self, blocks: set[int]) -> None:
        self.number += 1
        self.fence.reading(self.number, blocks)
        self.reading[self.number] = blocks

    @rule(blocks=BLOCKS)
    def write(self, blocks: set[int]) -> None:
        number = max(self.fence.written(blocks), default=0)
        assert all(n <= number for n, read in self.reading.items() if read & blocks)
        self.finish(number)

    @rule(data=st.data())
    def finish_some(self, data: st.DataObject) -> None:
        self.finish(data.draw(st.integers(0, self.number)))

    def finish(self, number: int) -> None:
        for done in [n for n in self.reading if n <= number]:
            del self.reading[done]

    def teardown(self) -> None:
        assert len(self.fence._readers) <= 12


TestFence = FenceMachine.TestCase
TestFence.settings = settings(max_examples=60, stateful_step_count=40)


def test_nothing_read_is_nothing_to_wait_for() -> None:
    assert Fence().written([1, 2]) == set()


def test_a_block_is_waited_for_once() -> None:
    fence = Fence()
    fence.reading(3, [1, 2])
    assert fence.written([1]) == {3}
    assert fence.written([1]) == set()
    assert fence.written([2]) == {3}


# ── orders of ended requests: not at a worker yet ─────────────────────────────────────────────────


def offering() -> Offering:
    return Offering(parts(), output=True)


def test_an_ended_requests_order_is_dropped_when_its_blocks_are_written() -> None:
    made = offering()
    made.offer_at_end(tracked(request(8), parts()), [[1, 2]], 8)
    assert made.fence([2]) == 0
    assert made.parting() == []


def test_an_ended_requests_order_goes_out_when_other_blocks_are_written() -> None:
    made = offering()
    made.offer_at_end(tracked(request(8), parts()), [[1, 2]], 8)
    assert made.fence([3, 4]) == 0
    assert [order.number for order in made.parting()] == [1]
    assert made.fence([1]) == 1


def test_a_dropped_order_does_not_hide_an_offload_under_way() -> None:
    """A's offload is under way; B shares A's blocks and ends; then the blocks are written."""
    made = offering()
    table = [[1, 2]]
    under_way = made.offer(tracked(request(8, name="a"), parts()), table, 8)
    assert under_way is not None
    made.offer_at_end(tracked(request(8, name="b"), parts()), table, 8)
    assert made.fence([1, 2]) == under_way.number
    assert made.parting() == []


def test_all_ended_requests_that_share_a_written_block_are_dropped() -> None:
    """Two equal requests end in one step, and the next step gives their blocks away."""
    made = offering()
    for name in ("a", "b"):
        made.offer_at_end(tracked(request(8, name=name), parts()), [[1, 2]], 8)
    assert made.fence([2]) == 0
    assert made.parting() == []


def test_blocks_that_only_some_orders_share_are_told_apart() -> None:
    """Beginning together, then apart: only who reads a written block is dropped."""
    made = offering()
    for name, table in {"a": [1, 2, 3, 4], "b": [1, 2, 5, 6]}.items():
        made.offer_at_end(tracked(request(16, name=name), parts()), [table], 16)
    assert made.fence([3]) == 0
    assert [order.request for order in made.parting()] == ["b"]
    made.offer_at_end(tracked(request(16, name="c"), parts()), [[1, 2, 7, 8]], 16)
    made.offer_at_end(tracked(request(16, name="d"), parts()), [[1, 2, 9, 10]], 16)
    assert made.fence([1]) == 2  # b is under way
    assert made.parting() == []


def test_the_fence_of_a_step_is_that_of_the_last_offload_it_touches() -> None:
    made = offering()
    for number in range(3):
        first = 1 + 2 * number
        made.offer(tracked(request(8, name=str(number)), parts()), [[first, first + 1]], 8)
    assert made.fence([1, 4]) == 2
    assert made.fence([1, 4]) == 0
    assert made.fence([9]) == 0
    assert made.fence(block for table in block_table(tokens=24) for block in table) == 3
