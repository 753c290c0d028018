"""How the index comes back at start, from a store's metadata alone."""

from collections import defaultdict

from kvtier.chunks import ChunkKey
from kvtier.spaces import Space
from kvtier.tiers.base import Record
from kvtier.tiers.index import Index, Node, TierId


def rebuild(index: Index, spaces: dict[bytes, Space], records: list[Record]) -> list[Record]:
    """Enter the records that can be reached from their space's root; returns those that can't.

    A chunk without its parent (a crash fell between their transactions) could never be hit. Of two
    records of one chunk the first is kept. The eviction order becomes that of
    the youngest chunk under each one, leaves before their parents.
    """
    unreachable: list[Record] = []
    nodes: list[Node] = []
    by_space: dict[bytes, list[Record]] = defaultdict(list)
    for record in records:
        by_space[record.space].append(record)
    for digest, members in by_space.items():
        space = spaces.get(digest)
        if space is None or space.digest != digest:
            unreachable.extend(members)
            continue
        nodes.extend(_enter(index, space, members, unreachable))
    _restore_order(index, nodes)
    return unreachable


def _enter(
    index: Index, space: Space, records: list[Record], unreachable: list[Record]
) -> list[Node]:
    branch = index.branch(space)
    children: dict[ChunkKey, list[Record]] = defaultdict(list)
    for record in records:
        children[record.parent].append(record)
    nodes: list[Node] = []
    frontier = children.pop(ChunkKey(branch.digest), [])
    for record in frontier:  # grows while it is walked
        held = branch.nodes.get(record.key)
        if held is not None:
            unreachable.append(record)
            continue
        replica = index.begin(
            branch, record.key, record.parent, record.created_s, TierId.DISK, record
        )
        index.commit(replica)
        nodes.append(replica.node)
        frontier.extend(children.pop(record.key, []))
    for orphans in children.values():
        unreachable.extend(orphans)
    return nodes


def _restore_order(index: Index, nodes: list[Node]) -> None:
    youngest: dict[Node, float] = {}
    depth: dict[Node, int] = {}
    for node in nodes:
        depth[node] = 0 if node.parent is None else depth[node.parent] + 1
        youngest[node] = node.created_s
    for node in reversed(nodes):
        if node.parent is not None:
            youngest[node.parent] = max(youngest[node.parent], youngest[node])
    coldest_first = sorted(nodes, key=lambda node: (youngest[node], -depth[node]))
    index.touch(coldest_first[::-1])
