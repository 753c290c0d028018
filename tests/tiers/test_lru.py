"""LRU, by the contract every policy keeps, and against the plainest possible one."""

from hypothesis import given
from hypothesis import strategies as st

from kvtier.tiers.policies.lru import Lru
from tests.contracts.policy import PROMPTS, Chunk, PolicyMachine, Prompt, Tier


class LruMachine(PolicyMachine):
    name = "lru"


TestLruContract = LruMachine.TestCase


@given(st.lists(PROMPTS, max_size=30), st.integers(1, 12))
def test_it_is_lru_with_the_last_chunk_of_a_request_first(
    prompts: list[Prompt], capacity: int
) -> None:
    tier = Tier(Lru())
    plain: dict[Prompt, None] = {}  # the oldest first
    for prompt in prompts:
        tier.store(prompt)
        for end in range(len(prompt), 0, -1):
            plain.pop(prompt[:end], None)
            plain[prompt[:end]] = None
        _shrink(tier, capacity)
        for oldest in list(plain)[: max(len(plain) - capacity, 0)]:
            del plain[oldest]
        assert set(tier.chunks) == set(plain)


def _shrink(tier: Tier, capacity: int) -> None:
    for victim in tier.victims():
        if len(tier.chunks) <= capacity:
            return
        tier.remove(victim, evicted=True)


def test_a_chunk_does_not_go_for_one_that_hangs_on_it() -> None:
    tier = Tier(Lru[Chunk]())
    tier.store((1,))
    arrival = tier.arrival((1, 2))
    [victim] = tier.victims()
    assert not tier.policy.admits(arrival.coming, victim)
