"""GIX, by the contract every policy keeps, and what makes it one."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from kvtier.spaces import Layout, Space
from kvtier.tiers.index import Index
from kvtier.tiers.policies import shades
from kvtier.tiers.policies.classes import BINS, FineClasses
from kvtier.tiers.policies.gix import Gix
from kvtier.tiers.policies.learner import HazardLearner
from kvtier.tiers.tree import Replica, TierId
from tests.contracts.policy import PROMPTS, Chunk, PolicyMachine, Prompt, Tier, key_of


class GixMachine(PolicyMachine):
    """Also: what is counted of chunks and ghosts is what there is."""

    name = "gix"

    @property
    def gix(self) -> Gix[Chunk]:
        policy = self.tier.policy
        assert isinstance(policy, Gix)
        return policy

    @rule(prompt=PROMPTS, data=st.data())
    def refuse(self, prompt: Prompt, data: st.DataObject) -> None:
        """A chunk that is not let in, and all that hangs on it, become ghosts."""
        arrival = self.tier.arrival(prompt)
        if not arrival.done:
            for _ in range(data.draw(st.integers(0, len(prompt)))):
                self.tier.add(arrival)
            if not arrival.done:
                self.gix._refuse(arrival.made, arrival.place)

    @invariant()
    def segments_are_paths(self) -> None:
        segments = {chunk.mark for chunk in self.tier.chunks.values()}
        queued = [link for queue in self.gix._queues.values() for link in _links(queue)]
        assert set(queued) == segments
        assert len(queued) == len(segments)
        assert sum(segment.count for segment in segments) == len(self.tier.chunks)
        for segment in segments:
            chunk: Any = segment.tail
            for _ in range(segment.count):
                assert chunk.mark is segment
                chunk = chunk.above

    @invariant()
    def ghosts_are_bounded_and_counted(self) -> None:
        faded = list(_links(self.gix._shades._queue))
        assert self.gix._shades.ghosts == sum(shade.count for shade in faded)
        assert all(shade.count for shade in faded)
        assert self.gix._shades.ghosts <= 4 * self.tier.most
        found = self.gix._shades._by_first
        assert len(found) == len(faded)
        assert all(found.get(shade.first) is shade for shade in faded)

    @invariant()
    def all_that_waits_is_counted(self) -> None:
        """Wherever it is now, and whatever it was before: of each class and time."""
        held = Counter(chunk.mark.traits[:2] for chunk in self.tier.chunks.values())
        for shade in _links(self.gix._shades._queue):
            held[shade.traits[:2]] += shade.count
        counted = Counter[tuple[int, int]]()
        cohorts = self.gix._learner._cohorts
        expected = Counter[tuple[int, int]]()
        for (kind, since_s), chunks in held.items():
            expected[kind, cohorts._lines[kind].place(since_s)] += chunks
        for kind, line in cohorts._lines.items():
            counted.update({(kind, place): n for place, n in enumerate(line._counts) if n})
        assert counted == expected


TestGixContract = GixMachine.TestCase


class GixLiteMachine(GixMachine):
    name = "gix-lite"


TestGixLiteContract = GixLiteMachine.TestCase


class ChosenKeysMachine(GixMachine):
    """Clients choose their keys: the first bytes of many may be the same."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(shades, "fingerprint", lambda key: bytes([0, 0, 0, key[0] % 3]))

    def teardown(self) -> None:
        self.patch.undo()


TestChosenKeys = ChosenKeysMachine.TestCase


def _links(queue: Any) -> Any:
    link = queue.oldest
    while link is not None:
        yield link
        link = link.newer


@pytest.fixture
def tier() -> Tier:
    return Tier(Gix[Chunk](HazardLearner(FineClasses())))


def gix_of(tier: Tier) -> Gix[Chunk]:
    assert isinstance(tier.policy, Gix)
    return tier.policy


def test_before_it_has_learned_it_is_lru(tier: Tier) -> None:
    for now_s, prompt in enumerate([(1, 2), (3,), (1, 2)]):
        tier.now_s = float(now_s)
        tier.store(prompt)
    assert [chunk.prompt for chunk in tier.victims()] == [(3,), (1, 2)]


def test_a_request_that_goes_on_where_one_ended_is_the_next_turn(tier: Tier) -> None:
    turns = []
    for prompt in ((1, 2), (1, 2, 3), (1, 2, 3, 4), (1, 5)):
        tier.store(prompt)
        turns.append(tier.chunks[prompt].mark.traits.turn)
    assert turns == [0, 2, 3, 1]


def test_asking_twice_before_storing_is_no_turn(tier: Tier) -> None:
    tier.store((1, 2))
    tier.ask((1, 2, 3))
    tier.ask((1, 2, 3))
    tier.store((1, 2, 3))
    assert tier.chunks[1, 2, 3].mark.traits.turn == 2


def test_what_a_request_uses_of_a_segment_parts_from_the_rest(tier: Tier) -> None:
    tier.store((1, 2, 3, 4))
    old = tier.chunks[1,].mark
    tier.now_s = 50.0
    tier.store((1, 2, 5))
    marks = {prompt: chunk.mark.traits.since_s for prompt, chunk in tier.chunks.items()}
    assert marks == {
        (1,): 50.0, (1, 2): 50.0, (1, 2, 5): 50.0, (1, 2, 3): 0.0, (1, 2, 3, 4): 0.0
    }  # fmt: skip
    assert tier.chunks[1, 2, 3].mark.count == 2
    assert old.count == 2


def test_ghosts_of_a_run_are_one_shade_and_come_back_as_one(tier: Tier) -> None:
    tier.store((1, 2, 0, 1, 2))
    for victim in tier.victims():
        if victim.prompt == (1,):
            break
        tier.remove(victim, evicted=True)
    gix = gix_of(tier)
    assert gix._shades.ghosts == 4
    assert len(list(_links(gix._shades._queue))) == 1
    tier.now_s = 10.0
    tier.ask((1, 2, 0, 1, 2))
    assert gix._learner._reused.sum() == 5
    arrival = tier.arrival((1, 2, 0, 1, 2))
    while tier.add(arrival):
        pass
    assert gix._shades.ghosts == 0
    assert len({chunk.mark for chunk in tier.chunks.values()}) == 1
    assert gix._learner._reused.sum() == 5, "a request counts once"


def test_a_request_that_leaves_the_ghosts_in_the_middle_takes_its_part(tier: Tier) -> None:
    tier.store((1, 2, 0, 1))
    for victim in tier.victims():
        tier.remove(victim, evicted=True)
    gix = gix_of(tier)
    tier.ask((1, 2, 2))
    assert gix._learner._reused.sum() == 2
    assert gix._shades.ghosts == 4
    tier.ask((1, 2, 0, 1))
    assert gix._learner._reused.sum() == 6, "both parts are known"


def test_what_was_refused_is_known_when_it_returns(tier: Tier) -> None:
    learned(gix_of(tier)._learner)
    tier.store((1,))
    tier.store((1,))
    tier.ask((2, 2))
    arrival = tier.arrival((2, 2))
    [victim] = tier.victims()
    assert not tier.policy.admits(arrival.coming, victim)
    assert gix_of(tier)._shades.ghosts == 2
    tier.ask((2, 2))
    seen = gix_of(tier).arrival(None, [key_of((2,)), key_of((2, 2))], tier.now_s)
    assert seen.known == 2


def learned(learner: HazardLearner) -> None:
    """Teach that what was asked for again will be, and what was not will not."""
    classes = learner.classes
    for kind in range(classes.count):
        if kind < classes.seen_from:
            learner.forgotten(kind, 3000.0, 100_000)
        else:
            learner.reused(kind, 1.0, 100_000)
    learner.learn()


def test_it_gives_up_first_what_is_least_likely_to_return(tier: Tier) -> None:
    learned(gix_of(tier)._learner)
    for prompt in ((1,), (1,), (2,)):
        tier.now_s += 1
        tier.store(prompt)
    assert [chunk.prompt for chunk in tier.victims()] == [(2,), (1,)]
    assert tier.policy.reuse(tier.chunks[2,], 2.0) < tier.policy.reuse(tier.chunks[1,], 2.0)


def test_an_arrival_goes_on_when_what_it_brought_has_been_asked_for(tier: Tier) -> None:
    tier.store((0, 0))
    arrival = tier.arrival((0, 1, 0))
    tier.add(arrival)
    tier.ask((0, 1))
    tier.add(arrival)
    assert {victim.prompt for victim in tier.victims()} == {(0, 0), (0, 1, 0)}


def test_looking_ahead_changes_nothing(tier: Tier) -> None:
    learned(gix_of(tier)._learner)
    for prompt in ((0,), (1,), (2,), (0,)):
        tier.now_s += 1
        tier.store(prompt)
    first = list(tier.victims())
    for looked_at in range(1, 4):
        ahead = tier.victims()
        for _ in range(looked_at):
            next(ahead)
        assert list(tier.victims()) == first


def test_a_choice_does_not_outlive_its_time(tier: Tier) -> None:
    """What was the first to go when somebody looked need not be so an hour later."""
    gix = gix_of(tier)
    learner, classes = gix._learner, gix._learner.classes
    once, twice = classes.new(0, 1), classes.seen(2, 2, 1.0)
    learner.reused(once, 3000.0, 10**7)
    learner.reused(twice, 1.0, 10**7)
    learner.learn()
    for prompt in ((1,), (2,), (2,)):
        tier.store(prompt)
        tier.now_s += 1
    [looked_at] = [next(tier.victims())]
    tier.now_s = 2500.0
    assert next(tier.victims()) is not looked_at


def test_the_ghosts_of_a_tenant_that_goes_are_forgotten() -> None:
    learner = HazardLearner(FineClasses())
    stays, goes = Tier(Gix[Chunk](learner)), Tier(Gix[Chunk](learner))
    stays.store((1, 2))
    goes.store((1, 2, 0))
    for victim in goes.victims():
        goes.remove(victim, evicted=True)
    assert learner._cohorts.by_age(FineClasses.count, 0.0).sum() == 5
    goes.policy.closed()
    assert learner._cohorts.by_age(FineClasses.count, 0.0).sum() == 2
    assert learner._forgotten.sum() == 3


def test_the_index_tells_the_policies_of_a_tenant_that_it_forgets() -> None:
    learner = HazardLearner(FineClasses())
    index = Index(lambda tier: Gix[Replica](learner), lambda replica: None)
    branch = index.branch(Space("n", Layout(dtype="int8", layers=1, heads=1, head_dim=1)))
    key = key_of((1,))
    [coming] = index.arrival(branch, TierId.CPU, None, [key], 0.0)
    node = index.enter(branch, key, branch.digest, 0.0)
    replica = index.begin(node, TierId.CPU, None, coming)
    assert index.commit(replica)
    index.drop(replica)
    assert learner._cohorts.by_age(FineClasses.count, 0.0).sum() == 1
    assert index.forget_if_empty(branch)
    assert learner._cohorts.by_age(FineClasses.count, 0.0).sum() == 0


def test_two_tenants_learn_together_and_hold_apart() -> None:
    learner = HazardLearner(FineClasses())
    first, second = Tier(Gix[Chunk](learner)), Tier(Gix[Chunk](learner))
    first.store((1, 2))
    second.ask((1, 2))
    assert learner._reused.sum() == 0
    first.ask((1, 2))
    assert learner._reused.sum() == 2
    assert list(second.victims()) == []


def test_what_is_said_of_chunks_that_return_is_said_of_their_ghosts(tier: Tier) -> None:
    tier.store((1, 2))
    for victim in tier.victims():
        tier.remove(victim, evicted=True)
    tier.now_s += 1
    tier.ask((1, 2))
    tier.add(arrival := tier.arrival((1, 2, 0), label=3))
    assert gix_of(tier).label(tier.chunks[1,]) == 3
    tier.add(arrival)
    tier.add(arrival)
    assert gix_of(tier).label(tier.chunks[1, 2, 0]) == 3
    tier.ask((1, 2, 0))
    assert gix_of(tier).label(tier.chunks[1, 2]) == 0, "it has been used since"


def test_a_label_has_a_class_of_its_own_until_there_are_too_many(tier: Tier) -> None:
    kinds = {}
    for label in (0, 1, 7, 8, 1000, -1):
        made = gix_of(tier).arrival(None, [key_of((label,))], 0.0, label)
        kinds[label] = made.traits_at(0).kind
    assert len({kinds[0], kinds[1], kinds[7]}) == 3
    assert kinds[8] == kinds[1000] == kinds[-1] == kinds[0]
    gix_of(tier)._learner.learn()
    assert np.isfinite(gix_of(tier)._learner.worth).all()


def test_a_hint_is_no_use_and_is_used_up_by_one(tier: Tier) -> None:
    tier.store((1, 2, 0))
    gix = gix_of(tier)
    before = tier.chunks[1,].mark.traits
    gix.hinted(tier.path((1, 2)), 3, 5.0)
    hinted, rest = tier.chunks[1, 2].mark.traits, tier.chunks[1, 2, 0].mark.traits
    assert rest is before
    assert hinted.kind == before.kind + 3 * FineClasses.count
    assert (hinted.since_s, hinted.touches, hinted.turn) == (0.0, 1, 0)
    assert gix._learner._reused.sum() == 0
    tier.now_s = 9.0
    tier.ask((1, 2))
    assert gix._learner._reused[hinted.kind].sum() == 2
    assert tier.chunks[1,].mark.traits.kind < FineClasses.count


def test_ages_are_binned_three_to_a_doubling() -> None:
    learner = HazardLearner(FineClasses())
    for age_s in (0.0, 0.25, 1.0, 100.0, 1e5, float("inf")):
        learner.reused(0, age_s, 1)
    assert np.flatnonzero(learner._reused[0]).tolist() == [0, 3, 19, BINS - 1]
