"""Who has to give up room: tenants share each tier fairly, and none holds more than its quota.

A tenant's fair share of a tier is an equal part among the tenants that asked for anything within
the last hour. Room for one is taken from those that hold more than their share, the one furthest
above it first, and then from itself. So a flood evicts nobody who is below the share; and what
nobody else claims may be used by anyone.

What a tenant has pinned beyond its share is out of reach, so the others share the rest of the tier:
else they could hold all of it and be below their share, and who comes after them would find none.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TypeAlias

from kvtier.tiers.index import Index
from kvtier.tiers.tree import Tenant, TierId

# After that a tenant's chunks are anyone's room: most prefixes that come again do so much earlier.
_PRESENT_S = 3600.0


@dataclass(slots=True, eq=False)
class Shares:
    """`capacity` is each tier's bytes, `quota_percent` the part that one tenant may hold. `pinned`
    says how many bytes of a tier are kept for a tenant's pins, of all tenants together less than
    the capacity."""

    index: Index
    capacity: Mapping[TierId, int]
    quota_percent: Mapping[TierId, int]
    clock: Callable[[], float]
    pinned: Callable[[Tenant, TierId], int] = lambda tenant, tier: 0

    def within_quota(self, tenant: Tenant, tier: TierId, more_bytes: int) -> bool:
        """Whether a tenant may hold so much more of a tier."""
        if self.quota_percent[tier] == 100:
            return True
        most = self.capacity[tier] * self.quota_percent[tier] // 100
        return tenant.used_bytes[tier] + more_bytes <= most

    def losers(self, tier: TierId, asker: Tenant) -> "Losers":
        """Whose chunks may go for the asker's, from now on until the loop's next turn."""
        return Losers(self, tier, asker)

    def allowed(self, tier: TierId, asker: Tenant) -> dict[Tenant, int]:
        """What each tenant may hold of a tier, in bytes, before it has to give to the asker."""
        gone_s = self.clock() - _PRESENT_S
        everyone = (*self.index.tenants, asker)
        pinned = {tenant: self.pinned(tenant, tier) for tenant in everyone}
        present = {t for t in pinned if t is asker or t.asked_s > gone_s}
        away = sum(nbytes for tenant, nbytes in pinned.items() if tenant not in present)
        share = share_of(self.capacity[tier] - away, (pinned[tenant] for tenant in present))
        return {t: max(nbytes, share) if t in present else nbytes for t, nbytes in pinned.items()}


def share_of(nbytes: int, pinned: Iterable[int]) -> int:
    """The equal part of so many bytes for each of those who have pinned so much of it, where some
    have pinned more than that part."""
    bounds = sorted(pinned, reverse=True)
    for place, bound in enumerate(bounds):
        if bound * (len(bounds) - place) <= nbytes:
            return nbytes // (len(bounds) - place)
        nbytes -= bound
    return 0


class Losers:
    """Whose chunks may go for one of the asker's, in that order; each iteration is for one chunk.

    It is valid until the loop's next turn: meanwhile nobody but the asker may come to hold more. So
    the tenants are ranked once, and one that has lost since is moved when its turn comes.
    """

    __slots__ = ("_above", "_allowed", "_asker", "_given", "_place", "_shares", "_tier")

    def __init__(self, shares: Shares, tier: TierId, asker: Tenant) -> None:
        self._shares = shares
        self._tier = tier
        self._asker = asker
        self._allowed: dict[Tenant, int] | None = None  # ranked when that is asked for
        self._above: list[_Ranked] = []  # a heap of the others above their share
        self._given: list[tuple[int, Tenant]] = []  # out of it since the last iteration
        self._place = 0

    def __iter__(self) -> Iterator[Tenant]:
        if self._allowed is None:
            self._rank()
        for place, tenant in self._given:
            self._enter(place, tenant)
        self._given.clear()
        above, asker = self._above, (-self._excess(self._asker), self._place)
        while above and above[0] < asker:
            was, place, tenant = heappop(above)
            if self._excess(tenant) < -was:
                self._enter(place, tenant)
            else:
                self._given.append((place, tenant))
                yield tenant
        yield self._asker  # nobody else is further above the share

    def _rank(self) -> None:
        self._allowed = self._shares.allowed(self._tier, self._asker)
        for place, tenant in enumerate(self._allowed):
            if tenant is self._asker:
                self._place = place
            else:
                self._enter(place, tenant)

    def _enter(self, place: int, tenant: Tenant) -> None:
        excess = self._excess(tenant)
        if excess > 0:
            heappush(self._above, (-excess, place, tenant))

    def _excess(self, tenant: Tenant) -> int:
        assert self._allowed is not None
        return tenant.used_bytes[self._tier] - self._allowed[tenant]


_Ranked: TypeAlias = tuple[int, int, Tenant]
"""How much less a tenant may hold than it does, its place among all, and the tenant: no two have
the same place."""
