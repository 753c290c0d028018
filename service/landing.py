"""Room in RAM for chunks on their way to disk: RAM's policy would not keep them, the disk's would.

Bytes reach the disk through RAM only. Such chunks are written as soon as they are committed, and
till then they take at most a part of RAM, so that what its policy does keep stays. Then RAM has
them like all others.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from kvtier.chunks import ChunkKey
from kvtier.service.placement import Placement
from kvtier.tiers.base import Coming
from kvtier.tiers.tree import Branch, Node, Replica, State, TierId

# One part in so many of RAM.
_SHARE = 8
# Of what landed, looked at for one chunk that wants to.
_LOOK = 16


class Landing:
    """What is in RAM on its way to the disk."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._most_bytes = placement.memory.arena.nbytes // _SHARE
        self._there: OrderedDict[Replica, None] = OrderedDict()
        self._bytes = 0

    def takes(self, branch: Branch, key: ChunkKey, in_ram: Coming, on_disk: Coming) -> bool:
        """Whether a chunk may land: what RAM's policy takes it to be, and the disk's."""
        if not self.placement.passes(branch, key, in_ram):
            return False
        if self._bytes + branch.nbytes > self._most_bytes:
            self._forget_arrived()
        return self._bytes + branch.nbytes <= self._most_bytes and self._disk_keeps(branch, on_disk)

    def landed(self, replica: Replica) -> None:
        """Such a chunk has got its room."""
        self._there[replica] = None
        self._bytes += replica.node.branch.nbytes

    def committed(self, nodes: Sequence[Node]) -> None:
        """Chunks are new in RAM, in prompt order: those that landed are written next."""
        for node in nodes:
            replica = node.ready(TierId.CPU)
            if replica is None or replica not in self._there:
                continue
            if not self.placement.is_unsaved(replica):  # it will not be written after all
                self._forget(replica)

    def _forget_arrived(self) -> None:
        """Of some, those that were not looked at for longest."""
        for replica in list(islice(self._there, _LOOK)):
            if self._has_arrived(replica):
                self._forget(replica)
            else:
                self._there.move_to_end(replica)

    def _has_arrived(self, replica: Replica) -> bool:
        """Whether it is on disk, or gone, or will not be written after all; what could not be
        written may be tried again."""
        if replica.state is not State.READY:
            return replica.state is State.DETACHED
        on_disk = replica.node.in_disk
        if on_disk is not None:
            return on_disk.state is State.READY
        return not self.placement.is_unsaved(replica)

    def _forget(self, replica: Replica) -> None:
        del self._there[replica]
        self._bytes -= replica.node.branch.nbytes

    def _disk_keeps(self, branch: Branch, coming: Coming) -> bool:
        placement, tenant = self.placement, branch.tenant
        store = placement.store
        assert store is not None
        if store.used_bytes + store.worst_bytes(branch.nbytes) <= store.capacity_bytes:
            return True
        now_s = placement.clock()
        victim = next(placement.index.victims(tenant, TierId.DISK, now_s), None)
        return victim is None or tenant.policies[TierId.DISK].admits(coming, victim)
