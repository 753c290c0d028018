"""Who has to give up room: tenants share each tier fairly, and none holds more than its quota.

A tenant's fair share of a tier is an equal part among the tenants that asked for anything within
the last hour. Room for one is taken from those that hold more than their share, the one furthest
above it first, and then from itself. So a flood evicts nobody who is below the share; and what
nobody else claims may be used by anyone.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from kvtier.tiers.index import Index
from kvtier.tiers.tree import Tenant, TierId

# After that a tenant's chunks are anyone's room: most prefixes that come again do so much earlier.
_PRESENT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Shares:
    """`capacity` is each tier's bytes, `quota_percent` the part that one tenant may hold."""

    index: Index
    capacity: Mapping[TierId, int]
    quota_percent: Mapping[TierId, int]
    clock: Callable[[], float]

    def within_quota(self, tenant: Tenant, tier: TierId, more_bytes: int) -> bool:
        """Whether a tenant may hold so much more of a tier."""
        if self.quota_percent[tier] == 100:
            return True
        most = self.capacity[tier] * self.quota_percent[tier] // 100
        return tenant.used_bytes[tier] + more_bytes <= most

    def losers(self, tier: TierId, asker: Tenant) -> Iterator[Tenant]:
        """Whose chunks may go for one of the asker's, in that order."""
        tenants = self.index.tenants
        if len(tenants) > 1:
            yield from self._above_their_share(tier, asker, tenants)
        yield asker

    def _above_their_share(
        self, tier: TierId, asker: Tenant, tenants: list[Tenant]
    ) -> Iterator[Tenant]:
        gone_s = self.clock() - _PRESENT_S
        present = {tenant.name for tenant in tenants if tenant.asked_s > gone_s} | {asker.name}
        share = self.capacity[tier] // len(present)

        def excess(tenant: Tenant) -> int:
            return tenant.used_bytes[tier] - (share if tenant.name in present else 0)

        over = sorted((t for t in tenants if excess(t) > 0), key=excess, reverse=True)
        for tenant in over:
            if tenant is asker:
                return  # nobody is further above the share
            yield tenant
