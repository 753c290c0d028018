"""The table of chunks against a dict, and what it costs when chunks come and go."""

import random
import sys
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtier.chunks import ChunkKey
from kvtier.tiers.key_table import KeyTable


@dataclass(frozen=True, eq=False)
class Thing:
    key: ChunkKey


def key_of(number: int) -> ChunkKey:
    return ChunkKey(random.Random(number).randbytes(32))


class KeyTableMachine(RuleBasedStateMachine):
    """Whatever comes and goes, by ones and by thousands, all that is there is found."""

    def __init__(self) -> None:
        super().__init__()
        self.table: KeyTable[Thing] = KeyTable()
        self.there: dict[ChunkKey, Thing] = {}

    def _add(self, number: int) -> None:
        thing = Thing(key_of(number))
        if thing.key not in self.there:
            self.table.add(thing)
            self.there[thing.key] = thing

    @rule(number=st.integers(0, 30))
    def one_comes(self, number: int) -> None:
        self._add(number)

    @rule(first=st.integers(0, 3))
    def thousands_come(self, first: int) -> None:
        for number in range(3000 * first, 3000 * (first + 1)):
            self._add(number)

    @rule(number=st.integers(0, 30))
    def one_goes(self, number: int) -> None:
        thing = self.there.pop(key_of(number), None)
        if thing is not None:
            assert self.table.discard(thing)
            assert not self.table.discard(thing)

    @rule(number=st.integers(0, 30))
    def a_double_does_not_go(self, number: int) -> None:
        assert not self.table.discard(Thing(key_of(number)))

    @rule(step=st.integers(2, 5))
    def many_go(self, step: int) -> None:
        for key in list(self.there)[::step]:
            assert self.table.discard(self.there.pop(key))

    @rule(number=st.integers(0, 9000))
    def one_is_looked_up(self, number: int) -> None:
        key = key_of(number)
        assert self.table.get(key) is self.there.get(key)
        assert (key in self.table) == (key in self.there)

    @invariant()
    def all_are_there_once(self) -> None:
        assert len(self.table) == len(self.there)
        assert bool(self.table) == bool(self.there)
        assert {id(thing) for thing in self.table} == {id(t) for t in self.there.values()}


KeyTableMachine.TestCase.settings = settings(max_examples=30, deadline=None)
TestKeyTable = KeyTableMachine.TestCase


def test_coming_and_going_does_not_make_it_large() -> None:
    table: KeyTable[Thing] = KeyTable()
    there = [Thing(key_of(number)) for number in range(20_000)]
    for thing in there:
        table.add(thing)
    most = 0
    for number in range(20_000, 60_000):
        assert table.discard(there[number % 20_000])
        there[number % 20_000] = Thing(key_of(number))
        table.add(there[number % 20_000])
        if number % 1000 == 0:
            most = max(most, sum(map(sys.getsizeof, table.parts)))
    # 24 bytes and an index for each, in a power of two: an emptied dict would take up to 120.
    assert most < 70 * len(there)
