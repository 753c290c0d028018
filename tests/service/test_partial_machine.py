"""Parts of chunks whatever happens to the chunks, against a plain search through all of them."""

import asyncio
import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.chunks import ChunkKey
from kvtier.service.answers import LoadStop, ReserveOutcome
from kvtier.service.sessions import Session
from tests.core import CHUNK_TOKENS, Harness, harness
from tests.service.partial_steps import ask, prompt_of

PROMPTS = st.lists(st.integers(1, 2), max_size=14)
EXTRAS = st.sampled_from([b"", b"adapter"])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "commit", "halve", "abort", "evict", "to_disk", *["load"] * 3]),
        PROMPTS,
        EXTRAS,
    ),
    max_size=30,
)


@dataclass
class Life:
    """What is done to chunks by one session, and what it was told of their tokens."""

    h: Harness
    session: Session
    told: dict[ChunkKey, tuple[ChunkKey, list[int], bytes]] = field(default_factory=dict)
    under_way: list[tuple[int, list[int]]] = field(default_factory=list)

    async def reserve(self, tokens: list[int], extra: bytes) -> None:
        prefix, offered = prompt_of(self.session, tokens, extra)
        for index, key in enumerate(prefix):
            chunk = tokens[index * CHUNK_TOKENS : (index + 1) * CHUNK_TOKENS]
            self.told[key] = prefix[index:].parent, chunk, extra
        lease_id, outcomes = self.h.reserve(self.session, prefix)
        self.h.cache.learn(self.session, prefix.keys, offered)
        wanted = [i for i, each in enumerate(outcomes) if each is ReserveOutcome.WRITE]
        self.under_way.append((lease_id, wanted))

    async def commit(self, tokens: list[int], extra: bytes) -> None:
        """Of the reservation in whose place the prompt's length points, all."""
        self.end(tokens, 1.0)

    async def halve(self, tokens: list[int], extra: bytes) -> None:
        self.end(tokens, 0.5)

    async def abort(self, tokens: list[int], extra: bytes) -> None:
        self.end(tokens, 0.0)

    def end(self, tokens: list[int], share: float) -> None:
        if self.under_way:
            lease_id, wanted = self.under_way.pop(len(tokens) % len(self.under_way))
            if share:
                self.h.cache.commit(self.session, lease_id, wanted[: int(share * len(wanted))])
            else:
                self.h.cache.abort(self.session, lease_id)

    async def evict(self, tokens: list[int], extra: bytes) -> None:
        prefix, _ = prompt_of(self.session, tokens, extra)
        await self.h.cache.evict(self.session, prefix.keys[-1:], whole_space=not prefix.keys)

    async def to_disk(self, tokens: list[int], extra: bytes) -> None:
        await self.h.write_behind.flush(10.0)
        self.h.only_on_disk()

    async def load(self, tokens: list[int], extra: bytes) -> None:
        """What comes is the longest that is held and known by its tokens."""
        prefix, offered = prompt_of(self.session, tokens, extra)
        held = list(itertools.takewhile(self.is_held, prefix))
        rest, parent = tokens[len(held) * CHUNK_TOKENS :], prefix[len(held) :].parent
        best = 0
        for key, (its_parent, chunk, its_extra) in self.told.items():
            if self.is_held(key) and its_extra == extra and its_parent == parent:
                pairs = zip(chunk, rest, strict=False)
                same = itertools.takewhile(lambda two: two[0] == two[1], pairs)
                best = max(best, len(list(same)))
        whole, part, stop = await ask(self.h, self.session, prefix.keys, offered)
        if stop is not LoadStop.NO_ROOM:
            assert (whole, part[1] if part is not None else 0) == (len(held), best)

    def is_held(self, key: ChunkKey) -> bool:
        node = self.session.branch.nodes.get(key)
        return node is not None and node.held

    def check(self) -> None:
        """Nothing is remembered of what is neither held nor being written."""
        tree, nodes = self.h.cache.overlaps.tree, self.session.branch.nodes
        tree.check()
        assert len(tree) == sum(1 for node in nodes if node in tree)
        assert all(any(node.replicas) for node in nodes if node in tree)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_a_part_is_of_what_is_held(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, list[int], bytes]]
) -> None:
    """RAM for six chunks, and a disk."""

    async def run() -> None:
        async with harness(tmp_path_factory.mktemp("all"), slots=6) as h:
            life = Life(h, h.session())
            for step, tokens, extra in steps:
                await getattr(life, step)(tokens, extra)
                life.check()

    asyncio.run(run())
