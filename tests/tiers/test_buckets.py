"""A hash table of chains that grows bucket by bucket."""

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.tiers.policies.buckets import Buckets


@dataclass(eq=False)
class Item:
    first: bytes
    beside: Any = None


# Few different ones, and such that only the upper bytes tell apart.
FIRSTS = st.one_of(
    st.binary(min_size=4, max_size=4), st.integers(0, 7).map(lambda n: bytes([0, 0, 0, n]))
)


@given(st.lists(st.tuples(FIRSTS, st.booleans()), max_size=200))
def test_what_was_put_is_found_until_it_is_removed(steps: list[tuple[bytes, bool]]) -> None:
    buckets: Buckets[Item] = Buckets()
    known: dict[bytes, Item] = {}
    for first, comes in steps:
        if comes:
            item = Item(first)
            assert buckets.put(item) is known.get(first), "it takes the place of the older one"
            known[first] = item
        elif first in known:
            buckets.remove(known.pop(first))
        assert len(buckets) == len(known)
        assert all(buckets.get(other) is item for other, item in known.items())
        assert buckets.get(first) is known.get(first)


@pytest.mark.parametrize("step", [0x9E3779B1, 1 << 16], ids=["random", "chosen to collide"])
def test_chains_stay_short_while_items_come_and_go(step: int) -> None:
    buckets: Buckets[Item] = Buckets()
    items = [Item((n * step % 2**32).to_bytes(4, "little")) for n in range(4000)]
    for place, item in enumerate(items):
        buckets.put(item)
        if place >= 1000:
            buckets.remove(items[place - 1000])
    assert len(buckets) == 1000
    assert len(buckets._buckets) <= 1001, "what went left no bytes behind"
    assert max(_length(item) for item in buckets._buckets) <= 16


def _length(item: Item | None) -> int:
    length = 0
    while item is not None:
        item, length = item.beside, length + 1
    return length
