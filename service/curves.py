"""The hit ratio by capacity, of a running service."""

import asyncio
from collections.abc import Callable
from functools import partial

from kvtier.config import Config
from kvtier.tiers.curve_family import sampled_family
from kvtier.tiers.curve_tenants import Curves

# Between two pieces of work of about half a millisecond: a few percent of a core at most.
_PAUSE_S = 0.01


def curves_of(config: Config) -> Curves:
    """The curves of the tiers that are configured, with the policy in use."""
    capacities = {"cpu": config.cpu.capacity}
    if config.disk.directory is not None:
        capacities["disk"] = config.cpu.capacity + config.disk.capacity
    return Curves(capacities, partial(sampled_family, config.eviction.policy), _defer)


def _defer(work: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(_PAUSE_S, work)
