"""ARC, by the contract every policy keeps, and what makes it one."""

from kvtier.tiers.policies.arc import Arc
from tests.contracts.policy import Chunk, PolicyMachine, Tier


class ArcMachine(PolicyMachine):
    name = "arc"


TestArcContract = ArcMachine.TestCase


def test_what_was_asked_for_again_outlives_what_came_later() -> None:
    tier = Tier(Arc[Chunk]())
    for prompt in ((1,), (1,), (2,), (3,)):
        tier.store(prompt)
    assert [chunk.prompt for chunk in tier.victims()] == [(2,), (3,), (1,)]


def test_a_ghost_that_is_asked_for_makes_its_list_longer() -> None:
    tier = Tier(Arc[Chunk]())
    for prompt in ((1,), (1,), (2,), (3,)):
        tier.store(prompt)
    tier.remove(next(tier.victims()), evicted=True)
    assert [chunk.prompt for chunk in tier.victims()] == [(3,), (1,)]
    tier.ask((2,))  # it should have been kept: so the list of what came once is left alone
    assert [chunk.prompt for chunk in tier.victims()] == [(1,), (3,)]


def test_of_a_request_the_last_chunk_goes_first() -> None:
    tier = Tier(Arc[Chunk]())
    tier.store((1, 2, 3))
    gone = []
    for victim in tier.victims():
        gone.append(victim.prompt)
        tier.remove(victim, evicted=True)
    assert gone == [(1, 2, 3), (1, 2), (1,)]
