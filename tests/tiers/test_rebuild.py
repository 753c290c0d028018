"""The index after a restart."""

import random
from itertools import pairwise

from kvtier.chunks import ChunkKey
from kvtier.spaces import Layout, Space
from kvtier.tiers.base import Record
from kvtier.tiers.index import Index
from kvtier.tiers.policies.lru import Lru
from kvtier.tiers.rebuild import rebuild
from kvtier.tiers.tree import Replica, TierId

SPACE = Space("m", Layout("int8", 1, 1, 1, tokens=1, planes=1))
SPACES = {SPACE.digest: SPACE}


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(32, "big"))


def record(number: int, parent: int | None, created_s: float = 1.0, space: bytes = b"") -> Record:
    above = ChunkKey(SPACE.digest) if parent is None else key(parent)
    return Record(number, key(number), above, space or SPACE.digest, 10, created_s)


def new_index() -> Index:
    return Index(lambda tier: Lru[Replica](), lambda replica: None)


def test_any_order_of_records_gives_the_whole_tree() -> None:
    records = [record(number, None if number == 1 else number // 2) for number in range(1, 200)]
    random.Random(0).shuffle(records)
    index = new_index()
    assert rebuild(index, SPACES, records) == []
    index.check()
    run = [1, 3, 6, 12, 25, 50, 100]
    assert len(index.match(index.branch(SPACE), [key(number) for number in run])) == len(run)


def test_what_has_no_way_to_the_root_is_returned() -> None:
    lost = [record(5, 4), record(6, 5), record(9, None, space=bytes(32)), record(1, None)]
    kept = [record(1, None), record(2, 1)]
    index = new_index()
    unreachable = rebuild(index, SPACES, kept + lost)
    assert sorted(r.id for r in unreachable) == [1, 5, 6, 9]
    assert index.chunks[TierId.DISK] == 2
    index.check()


def test_a_cycle_is_unreachable() -> None:
    index = new_index()
    assert len(rebuild(index, SPACES, [record(1, 2), record(2, 1)])) == 2
    index.check()


def test_eviction_starts_with_the_leaf_of_the_coldest_prefix() -> None:
    cold = [record(1, None, 1.0), record(2, 1, 1.0), record(3, 2, 1.0)]
    warm = [record(10, None, 0.5), record(11, 10, 9.0)]
    index = new_index()
    rebuild(index, SPACES, warm + cold)
    order = []
    [tenant] = index.tenants
    while (victim := next(index.victims(tenant, TierId.DISK, 9.0), None)) is not None:
        order.append(int.from_bytes(victim.node.key, "big"))
        index.drop(victim)
    assert order == [3, 2, 1, 11, 10]
    assert all(a != b for a, b in pairwise(order))
