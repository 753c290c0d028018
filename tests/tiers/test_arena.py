"""The arena against a list of intervals."""

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.tiers.arena import SLOT_ALIGN, Arena, Slot, slot_bytes_of

SIZES = st.sampled_from([1, 4096, 4097, 10_000, 40_000, 200_000])
ARENA_BYTES = 1 << 20


class ArenaMachine(RuleBasedStateMachine):
    """Slots never overlap, never leave the arena, and freed memory can be had again."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(ARENA_BYTES)
        self.live: list[Slot] = []

    @rule(nbytes=SIZES)
    def allocate(self, nbytes: int) -> None:
        slot = self.arena.allocate(nbytes)
        if slot is not None:
            assert slot.nbytes == nbytes
            self.live.append(slot)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.live))
        self.live.remove(slot)
        self.arena.free(slot)

    @rule(nbytes=SIZES)
    def everything_can_move_to_another_size(self, nbytes: int) -> None:
        while self.live:
            self.arena.free(self.live.pop())
        self._fill(nbytes)

    def _fill(self, nbytes: int) -> None:
        taken = []
        while (slot := self.arena.allocate(nbytes)) is not None:
            taken.append(slot)
        assert len(taken) == ARENA_BYTES // slot_bytes_of(nbytes), "an empty arena wastes nothing"
        for slot in taken:
            self.arena.free(slot)

    @invariant()
    def slots_are_disjoint_and_inside(self) -> None:
        spans = sorted((slot.offset, slot.offset + slot.nbytes) for slot in self.live)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert all(start % SLOT_ALIGN == 0 for start, _ in spans)
        assert not spans or (spans[0][0] >= 0 and spans[-1][1] <= ARENA_BYTES)

    @invariant()
    def used_bytes_are_counted(self) -> None:
        assert self.arena.used_bytes == sum(slot_bytes_of(slot.nbytes) for slot in self.live)


class TestArena(ArenaMachine.TestCase):
    settings = settings(max_examples=60, stateful_step_count=60)


def test_a_freed_slot_comes_back() -> None:
    arena = Arena(ARENA_BYTES)
    slots = [arena.allocate(4096) for _ in range(ARENA_BYTES // 4096)]
    assert arena.allocate(4096) is None
    assert slots[7] is not None
    arena.free(slots[7])
    again = arena.allocate(100)
    assert again is not None
    assert again.offset == slots[7].offset


@pytest.mark.parametrize("nbytes", [ARENA_BYTES + 1, 10 * ARENA_BYTES])
def test_what_can_never_fit_is_told(nbytes: int) -> None:
    arena = Arena(ARENA_BYTES)
    assert not arena.could_fit(nbytes)
    assert arena.allocate(nbytes) is None
