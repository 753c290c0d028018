"""When a chunk of RAM is written to disk, and why: the rules of `disk.write`.

demote          when RAM is about to give it up: what is near eviction is written ahead of it
write_through   as soon as it is committed
second_touch    when it is asked for again, or stored again: as far back as losses are remembered
reuse           as demote, if the policy takes it to be asked for again with that probability

A clean stop writes whatever the rule would have written in the end. A copy on disk stays there when
the chunk is promoted. Which of these writes how much is measured in docs/eviction.md.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from kvtier.chunks import ChunkKey
from kvtier.service.placement import Placement
from kvtier.tiers.base import Coming
from kvtier.tiers.tree import Branch, Node, Replica, Tenant, TierId

# What is written ahead of its eviction, as a part of RAM: enough for the disk to keep up with a
# burst, little enough that most of RAM is not on disk twice.
_AHEAD_SHARE = 8
# Looked at in one go, so that the loop is not held up.
_MOST_LOOKED_AT = 256


class When(Enum):
    """The values of `disk.write`."""

    DEMOTE = "demote"
    WRITE_THROUGH = "write_through"
    SECOND_TOUCH = "second_touch"
    REUSE = "reuse"


class Cause(Enum):
    """Why a chunk is written."""

    COMMIT = "commit"
    DEMOTION = "demotion"
    SECOND_TOUCH = "second_touch"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Writing:
    """When chunks are written; `least_reuse` counts with REUSE only."""

    when: When = When.DEMOTE
    least_reuse: float = 0.3


class Queue(Protocol):
    """Chunks to be written."""

    def add(self, nodes: Iterable[Node], cause: Cause) -> None: ...
    def __contains__(self, node: Node) -> bool: ...


class Demotion:
    """Tells a queue which chunks of RAM the disk is to have, ancestors before what continues
    them."""

    def __init__(self, placement: Placement, writing: Writing, queue: Queue) -> None:
        self._placement = placement
        self._writing = writing
        self._queue = queue
        shares = placement.shares
        most_bytes = shares.capacity[TierId.CPU] * shares.quota_percent[TierId.CPU] // 100
        self._ahead_bytes = most_bytes // _AHEAD_SHARE
        self._since_bytes = 0  # committed since the last look ahead

    def committed(self, nodes: Sequence[Node]) -> None:
        """Chunks are new in RAM, in prompt order."""
        if self._writing.when is When.WRITE_THROUGH:
            self._queue.add(nodes, Cause.COMMIT)
        elif self._writing.when is When.SECOND_TOUCH:
            for node in nodes:
                if self._was_known(node.branch, node.key):
                    self._write_path(node, Cause.SECOND_TOUCH)
        else:
            self._since_bytes += sum(node.branch.nbytes for node in nodes)
            self._look_ahead(nodes[0].branch.tenant)

    def asked(self, run: Sequence[Node]) -> None:
        """Held chunks are asked for."""
        if self._writing.when is When.SECOND_TOUCH:
            self._write_path(run[-1], Cause.SECOND_TOUCH)

    def is_unsaved(self, replica: Replica) -> bool:
        """Whether the disk is still to have a chunk that RAM would give up; if so, it is written
        next."""
        if self._writing.when is When.SECOND_TOUCH:
            return replica.node in self._queue
        if replica.node.in_disk is not None or not self._wants(replica):
            return False
        self._write_path(replica.node, Cause.DEMOTION)  # once more, where it could not be written
        return True

    def passes(self, branch: Branch, key: ChunkKey, coming: Coming) -> bool:
        """Whether the disk is to have a chunk that RAM does not keep: `coming` is what RAM's policy
        takes it to be."""
        if self._writing.when is When.SECOND_TOUCH:
            return self._was_known(branch, key)
        if self._writing.when is When.REUSE:
            policy = branch.tenant.policies[TierId.CPU]
            return policy.likely(coming) >= self._writing.least_reuse
        return True

    def stopping(self) -> None:
        """The service stops, and nobody uses a chunk any more: what the rule would write in the end
        is written now, as far as the disk can hold it, beginning with what RAM would keep
        longest."""
        if self._writing.when in {When.SECOND_TOUCH, When.WRITE_THROUGH}:
            return
        index, store = self._placement.index, self._placement.store
        assert store is not None
        left = store.capacity_bytes
        for tenant in index.tenants:
            leaves = list(index.victims(tenant, TierId.CPU, self._placement.clock()))
            for leaf in reversed(leaves):
                if left > 0 and self._wants(leaf):
                    left -= self._write_path(leaf.node, Cause.STOP)

    @property
    def all_saved(self) -> bool:
        """Whether the disk has every chunk that is held."""
        index = self._placement.index
        return all(
            node.ready(TierId.DISK) is not None or not node.held
            for space in index.spaces
            for node in index.branch(space).nodes
        )

    def _was_known(self, branch: Branch, key: ChunkKey) -> bool:
        """Whether a chunk was offered before, and evicted or refused."""
        return self._placement.history.find(branch.digest, key) is not None

    def _wants(self, replica: Replica) -> bool:
        if self._writing.when is not When.REUSE:
            return True
        policy = replica.node.branch.tenant.policies[TierId.CPU]
        return policy.reuse(replica, self._placement.clock()) >= self._writing.least_reuse

    def _look_ahead(self, asker: Tenant) -> None:
        """Write what RAM is going to give up next for a tenant that stores, each time that a part
        of the bytes ahead has come in."""
        if self._since_bytes * 4 < self._ahead_bytes:
            return
        arena, shares = self._placement.memory.arena, self._placement.shares
        losers: Iterable[Tenant] = (asker,)
        if shares.within_quota(asker, TierId.CPU, self._ahead_bytes):
            if arena.nbytes - arena.used_bytes >= self._ahead_bytes:
                return
            losers = shares.losers(TierId.CPU, asker)
        self._since_bytes = 0
        ahead = looked_at = 0
        for tenant in losers:
            victims = self._placement.index.victims(tenant, TierId.CPU, self._placement.clock())
            for replica in victims:
                self.is_unsaved(replica)
                chunks = _going_with(replica.node)
                ahead += chunks * replica.node.branch.nbytes
                looked_at += chunks
                if ahead >= self._ahead_bytes or looked_at >= _MOST_LOOKED_AT:
                    return

    def _write_path(self, node: Node, cause: Cause) -> int:
        """Write a chunk and all that is before it, without which it is of no use after a crash;
        returns how many bytes that is at most."""
        path: list[Node] = []
        above: Node | None = node
        while above is not None and above.in_disk is None and above not in self._queue:
            path.append(above)
            above = above.parent
        self._queue.add(reversed(path), cause)
        return len(path) * node.branch.nbytes


def _going_with(leaf: Node) -> int:
    """How many chunks RAM can give up one after the other from a leaf on, before another leaf is in
    the way; counted as far as anyone looks."""
    chunks = 1
    above = leaf.parent
    while above is not None and above.children_in(TierId.CPU) == 1 and chunks < _MOST_LOOKED_AT:
        chunks += 1
        above = above.parent
    return chunks
