"""LRU, by the contract every policy keeps."""

from kvtier.tiers.base import Policy
from kvtier.tiers.policies.lru import Lru
from tests.contracts.policy import PolicyContract


class TestLru(PolicyContract):
    def make(self) -> Policy[int]:
        return Lru[int]()

    def test_the_oldest_goes_first(self) -> None:
        lru = Lru[int]()
        for chunk in (1, 2, 3):
            lru.added(chunk)
        lru.touched(1)
        assert list(lru.victims()) == [2, 3, 1]
