"""S3-FIFO, by the contract every policy keeps, and what makes it one."""

from kvtier.tiers.policies.s3fifo import S3Fifo
from tests.contracts.policy import Chunk, PolicyMachine, Tier


class S3FifoMachine(PolicyMachine):
    name = "s3fifo"


TestS3FifoContract = S3FifoMachine.TestCase


def test_what_is_asked_for_once_goes_in_the_order_it_came() -> None:
    tier = Tier(S3Fifo[Chunk]())
    for prompt in ((1,), (2,), (1,), (3,)):
        tier.store(prompt)
    assert [chunk.prompt for chunk in tier.victims()] == [(1,), (2,), (3,)]


def test_what_is_asked_for_twice_more_stays() -> None:
    tier = Tier(S3Fifo[Chunk]())
    for prompt in ((1,), (2,), (1,), (1,)):
        tier.store(prompt)
    tier.remove(next(tier.victims()), evicted=True)
    assert set(tier.chunks) == {(1,)}


def test_what_returns_is_put_behind_what_is_new() -> None:
    tier = Tier(S3Fifo[Chunk]())
    tier.store((1,))
    tier.remove(next(tier.victims()), evicted=True)
    tier.store((1,))
    tier.store((2,))
    assert next(tier.victims()).prompt == (2,)
