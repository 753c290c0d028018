"""What every eviction policy keeps, whatever its callers do, in whatever order."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.chunks import ChunkKey
from kvtier.tiers.base import Coming, Policy
from kvtier.tiers.policies.registry import make_family

Prompt = tuple[int, ...]
PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)


def key_of(prompt: Prompt) -> ChunkKey:
    """The key of the last chunk of a prompt."""
    return ChunkKey(hashlib.sha256(repr(prompt).encode()).digest())


@dataclass(eq=False)
class Chunk:
    """A chunk in a tier that is nothing but its tree."""

    prompt: Prompt
    tier: "Tier" = field(repr=False)
    mark: Any = None
    leases: int = 0

    @property
    def key(self) -> ChunkKey:
        return key_of(self.prompt)

    @property
    def above(self) -> "Chunk | None":
        return self.tier.chunks.get(self.prompt[:-1])

    @property
    def evictable(self) -> bool:
        return self.tier.holds(self) and not self.leases and not self.tier.children(self)


class Tier:
    """Chunks by the prompt that they end, under one policy."""

    def __init__(self, policy: Policy[Chunk]) -> None:
        self.policy = policy
        self.chunks: dict[Prompt, Chunk] = {}
        self.now_s = 0.0
        self.most = 0

    def holds(self, chunk: Chunk) -> bool:
        return self.chunks.get(chunk.prompt) is chunk

    def children(self, chunk: Chunk) -> list[Chunk]:
        end = len(chunk.prompt)
        return [
            other
            for prompt, other in self.chunks.items()
            if len(prompt) == end + 1 and prompt[:end] == chunk.prompt
        ]

    def path(self, prompt: Prompt) -> list[Chunk]:
        """The leading chunks of a prompt that are held."""
        found = []
        for end in range(1, len(prompt) + 1):
            chunk = self.chunks.get(prompt[:end])
            if chunk is None:
                break
            found.append(chunk)
        return found

    def ask(self, prompt: Prompt) -> None:
        path = self.path(prompt)
        self.policy.asked(path, keys_of(prompt, len(path)), self.now_s)

    def arrival(self, prompt: Prompt, label: int = 0) -> "Arrival":
        """What the rest of a prompt is taken to be."""
        path = self.path(prompt)
        above = path[-1] if path else None
        keys = keys_of(prompt, len(path))
        return Arrival(self.policy.arrival(above, keys, self.now_s, label), prompt, len(path))

    def add(self, arrival: "Arrival") -> bool:
        """Store the next chunk of an arrival; False when nothing of it can be stored any more."""
        prompt = arrival.prompt[: arrival.start + arrival.place + 1]
        orphan = len(prompt) > 1 and prompt[:-1] not in self.chunks
        if arrival.done or orphan or prompt in self.chunks:
            return False
        chunk = self.chunks[prompt] = Chunk(prompt, self)
        self.policy.added(chunk, arrival.coming)
        arrival.place += 1
        self.most = max(self.most, len(self.chunks))
        return True

    def remove(self, chunk: Chunk, *, evicted: bool) -> None:
        self.policy.removed(chunk, evicted=evicted)
        del self.chunks[chunk.prompt]

    def store(self, prompt: Prompt) -> None:
        """One request, from the question to the last chunk."""
        self.ask(prompt)
        arrival = self.arrival(prompt)
        while self.add(arrival):
            pass

    def victims(self) -> Iterator[Chunk]:
        return self.policy.victims(self.now_s)


@dataclass
class Arrival:
    """What a policy made of the rest of a prompt; `place` is the next of it to be stored."""

    made: Any
    prompt: Prompt
    start: int
    place: int = 0

    @property
    def done(self) -> bool:
        return self.start + self.place >= len(self.prompt)

    @property
    def coming(self) -> Coming:
        return Coming(self.made, self.place)


def keys_of(prompt: Prompt, start: int) -> Sequence[ChunkKey]:
    return [key_of(prompt[: end + 1]) for end in range(start, len(prompt))]


class PolicyMachine(RuleBasedStateMachine):
    """Subclass it and name the policy."""

    name: str

    def __init__(self) -> None:
        super().__init__()
        self.family = make_family(self.name)
        self.tier = Tier(self.family.policy())
        self.arrivals: list[Arrival] = []

    @rule(prompt=PROMPTS)
    def ask(self, prompt: Prompt) -> None:
        self.tier.ask(prompt)

    @rule(prompt=PROMPTS)
    def store(self, prompt: Prompt) -> None:
        self.tier.store(prompt)

    @rule(prompt=PROMPTS, label=st.integers(0, 12))
    def announce(self, prompt: Prompt, label: int) -> None:
        self.arrivals.append(self.tier.arrival(prompt, label))

    @rule(prompt=PROMPTS, label=st.integers(1, 12))
    def hint(self, prompt: Prompt, label: int) -> None:
        self.tier.policy.hinted(self.tier.path(prompt), label, self.tier.now_s)

    @rule(data=st.data())
    def add_one(self, data: st.DataObject) -> None:
        if self.arrivals:
            arrival = data.draw(st.sampled_from(self.arrivals))
            if not self.tier.add(arrival):
                self.arrivals.remove(arrival)

    @rule(data=st.data())
    def compete(self, data: st.DataObject) -> None:
        """Store chunks, each for another one, as long as they are worth it."""
        if not self.arrivals:
            return
        arrival = self.arrivals.pop(data.draw(st.integers(0, len(self.arrivals) - 1)))
        for victim in self.tier.victims():
            if arrival.done or not self.tier.policy.admits(arrival.coming, victim):
                return
            self.tier.remove(victim, evicted=True)
            if not self.tier.add(arrival):
                return

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        """Victims may be taken or left."""
        expected = {chunk for chunk in self.tier.chunks.values() if chunk.evictable}
        for victim in self.tier.victims():
            assert victim.evictable
            expected.discard(victim)
            if data.draw(st.booleans()):
                self.tier.remove(victim, evicted=True)
            elif data.draw(st.booleans()):
                return
        assert not expected, "what may go is offered"

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """A chunk is lost with all under it, or alone."""
        if not self.tier.chunks:
            return
        chunk = data.draw(st.sampled_from(list(self.tier.chunks.values())))
        doomed = [chunk]
        if data.draw(st.booleans()):
            for member in doomed:
                doomed.extend(self.tier.children(member))
        for member in reversed(doomed):
            self.tier.remove(member, evicted=False)

    @rule(data=st.data(), change=st.sampled_from([1, -1]))
    def lease(self, data: st.DataObject, change: int) -> None:
        if self.tier.chunks:
            chunk = data.draw(st.sampled_from(list(self.tier.chunks.values())))
            chunk.leases = max(chunk.leases + change, 0)

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 30.0, 4000.0, 1e9, -5.0]))
    def wait(self, seconds: float) -> None:
        """A clock may go back."""
        self.tier.now_s += seconds

    @rule()
    def learn(self) -> None:
        self.family.learner.learn()

    @precondition(lambda self: not self.tier.chunks)
    @rule()
    def forget(self) -> None:
        """The tenant goes, and comes back as another."""
        self.tier.policy.closed()
        self.tier.policy = self.family.policy()
        self.arrivals.clear()
        self.tier.most = 0

    @rule()
    def restart(self) -> None:
        """What was learned is handed on; the chunks are another affair."""
        learner = make_family(self.name).learner
        assert learner.restore(self.family.learner.dump())
        self.family.learner.restore(self.family.learner.dump())

    @invariant()
    def offers_every_evictable_chunk_once(self) -> None:
        offered = list(self.tier.victims())
        assert len(offered) == len(set(offered))
        assert set(offered) == {chunk for chunk in self.tier.chunks.values() if chunk.evictable}

    @invariant()
    def knows_a_chance(self) -> None:
        for chunk in self.tier.chunks.values():
            assert 0 <= self.tier.policy.reuse(chunk, self.tier.now_s) <= 1
