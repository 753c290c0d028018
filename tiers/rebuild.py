"""How the index comes back at start, from a store's metadata alone."""

from collections import defaultdict

from kvtier.chunks import ChunkKey
from kvtier.spaces import Space
from kvtier.tiers.base import Record
from kvtier.tiers.index import Index
from kvtier.tiers.tree import Replica, TierId


def rebuild(index: Index, spaces: dict[bytes, Space], records: list[Record]) -> list[Record]:
    """Enter the records that can be reached from their space's root; returns those that can't.

    A chunk without its parent (a crash fell between their transactions) could never be hit. Of two
    records of one chunk the first is kept. The eviction order becomes that of
    the youngest chunk under each one, leaves before their parents.
    """
    unreachable: list[Record] = []
    replicas: list[Replica] = []
    by_space: dict[bytes, list[Record]] = defaultdict(list)
    for record in records:
        by_space[record.space].append(record)
    for digest, members in by_space.items():
        space = spaces.get(digest)
        if space is None or space.digest != digest:
            unreachable.extend(members)
            continue
        replicas.extend(_enter(index, space, members, unreachable))
    for run in _coldest_first(replicas):
        index.rank(run, run[-1].node.created_s)
    return unreachable


def _enter(
    index: Index, space: Space, records: list[Record], unreachable: list[Record]
) -> list[Replica]:
    """Returns replicas, parents before their children."""
    branch = index.branch(space)
    children: dict[ChunkKey, list[Record]] = defaultdict(list)
    for record in records:
        children[record.parent].append(record)
    replicas: list[Replica] = []
    frontier = children.pop(ChunkKey(branch.digest), [])
    for record in frontier:  # grows while it is walked
        if record.key in branch.nodes:
            unreachable.append(record)
            continue
        node = index.enter(branch, record.key, record.parent, record.created_s)
        replicas.append(index.revive(node, TierId.DISK, record))
        frontier.extend(children.pop(record.key, []))
    for orphans in children.values():
        unreachable.extend(orphans)
    return replicas


def _coldest_first(replicas: list[Replica]) -> list[list[Replica]]:
    """Cut the trees in runs of one path each: a chunk is in the run of the youngest leaf under it,
    and the runs are in the order of those leaves."""
    taken: set[Replica] = set()
    leaves = [replica for replica in replicas if replica.node.below is None]
    leaves.sort(key=lambda replica: replica.node.created_s, reverse=True)
    runs = []
    for leaf in leaves:
        run: list[Replica] = []
        above: Replica | None = leaf
        while above is not None and above not in taken:
            run.append(above)
            above = above.above
        taken.update(run)
        runs.append(run[::-1])
    return runs[::-1]
