"""Chunks that one request brings to a tier: they are one arrival to its policy, and one claim."""

from collections.abc import Sequence

from kvtier.service.placement import Placement
from kvtier.tiers.base import Coming
from kvtier.tiers.tree import Node, TierId


class Batch:
    """Chunks of one space, in prompt order, that a request wants in a tier. Raises IndexError
    without chunks."""

    __slots__ = ("_coming", "_placement", "claim", "nodes")

    def __init__(self, placement: Placement, tier: TierId, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.claim = placement.claim(tier, nodes[0].branch)
        self._placement = placement
        self._coming: dict[int, Coming] = {}

    def renew(self) -> None:
        """Others had their turn."""
        self.claim = self._placement.claim(self.claim.tier, self.claim.branch)

    def coming(self, index: int) -> Coming:
        """What the tier's policy takes a chunk to be, which the tier lacks; asked once for all that
        follow it there."""
        if index not in self._coming:
            rest = self._lacking_from(index)
            comings = self._placement.coming(self.claim.tier, rest)
            self._coming |= dict(enumerate(comings, index))
        return self._coming[index]

    def _lacking_from(self, first: int) -> list[Node]:
        """Chunks that the tier lacks from one on, each the parent of the next: what clients name
        need not be."""
        rest = [self.nodes[first]]
        for index in range(first + 1, len(self.nodes)):
            node = self.nodes[index]
            if node.parent is not rest[-1] or node.replica(self.claim.tier) is not None:
                break
            rest.append(node)
        return rest
