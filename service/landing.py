"""Room in RAM for chunks on their way to disk: RAM's policy would not keep them, the disk's would.

Bytes reach the disk through RAM only. Such chunks are the first that RAM gives up, once they are
written; till then they take at most a part of it, so that what RAM's policy does keep stays.
"""

from kvtier.service.placement import Placement
from kvtier.tiers.base import Coming
from kvtier.tiers.tree import Branch, Replica, State, TierId

# One part in so many of RAM.
_SHARE = 8


class Landing:
    """What lands in RAM for the disk. `passes` says whether a chunk that RAM does not keep is ever
    written."""

    def __init__(self, placement: Placement, *, passes: bool) -> None:
        self.placement = placement
        self._passes = passes and placement.store is not None
        self._most_bytes = placement.memory.arena.nbytes // _SHARE
        self._there: dict[Replica, None] = {}
        self._bytes = 0

    def takes(self, branch: Branch, on_disk: Coming) -> bool:
        """Whether a chunk may land: `on_disk` is what the disk's policy takes it to be."""
        if not self._passes:
            return False
        if self._bytes + branch.nbytes > self._most_bytes:
            self._forget_gone()
        return self._bytes + branch.nbytes <= self._most_bytes and self._disk_keeps(branch, on_disk)

    def landed(self, replica: Replica) -> None:
        """Such a chunk has got its room."""
        self._there[replica] = None
        self._bytes += replica.node.branch.nbytes

    def _forget_gone(self) -> None:
        for replica in [each for each in self._there if each.state is State.DETACHED]:
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
