"""Layouts of three sizes share one arena and one disk that hold little: whatever is asked in
whatever order, nothing raises, no byte is wrong, and nothing is there that was never stored."""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.chunks import ChunkKey, Prefix
from kvtier.client import Client, KeyState, LoadedChunk
from kvtier.client.client import connect_through
from kvtier.service.embedded import EmbeddedCore, InProcessTransport
from kvtier.spaces import Layout, Space
from tests.sidecar import HANG_S, content_of

TOKENS = 4
# 128 KiB, 192 KiB and 1 MiB a chunk.
SPACES = [
    Space(f"m{heads}", Layout("int8", 16, heads, 512, tokens=TOKENS, planes=2))
    for heads in (2, 3, 16)
]
HELD = (KeyState.RAM, KeyState.DISK)

spaces = st.sampled_from(range(len(SPACES)))
families = st.integers(0, 4)
lengths = st.integers(1, 24)


class Churn(RuleBasedStateMachine):
    """One engine with a client per layout, over a cache in its process. The model is the set of
    keys that were ever stored and not removed since, and the bytes that each key stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.stored: set[ChunkKey] = set()
        self.reading: list[tuple[ExitStack, Prefix, list[LoadedChunk]]] = []
        self.core: EmbeddedCore
        self.clients: list[Client] = []

    @initialize()
    def start(self) -> None:
        self.core = EmbeddedCore(
            [
                "cpu.capacity=16MiB",
                f"disk.directory={self.folder}",
                "disk.capacity=24MiB",
                "disk.compression=none",
                "disk.commit_interval_ms=1",
            ]
        )
        self.clients = [
            connect_through(lambda: InProcessTransport(self.core), space, HANG_S)
            for space in SPACES
        ]
        for client in self.clients:
            assert client.wait_ready(HANG_S)

    def stop(self) -> None:
        self.let_go()
        for client in self.clients:
            client.close()
        self.core.close()

    def let_go(self) -> None:
        while self.reading:
            self.reading.pop()[0].close()

    def teardown(self) -> None:
        if self.clients:
            self.stop()
        shutil.rmtree(self.folder)

    def prompt(self, space: int, family: int, length: int) -> tuple[Client, Prefix]:
        """Prompts of one family share their beginning, and part in the middle of the longest."""
        tokens = [family * 1000 + n for n in range(min(length, 12) * TOKENS)]
        tokens += [family * 1000 + length * 100 + n for n in range((length - 12) * TOKENS)]
        client = self.clients[space]
        return client, client.prefix(tokens)

    def right(self, prefix: Prefix, index: int, data: memoryview) -> bool:
        return bytes(data) == content_of(prefix[index], data.nbytes)

    # ── what an engine does ───────────────────────────────────────────────────────────────────────

    @rule(space=spaces, family=families, length=lengths, leave=st.integers(0, 40))
    def offload(self, space: int, family: int, length: int, leave: int) -> None:
        """Store a prompt, perhaps leaving after some chunks."""
        client, prefix = self.prompt(space, family, length)
        with client.offload(prefix) as wanted:
            for count, slot in enumerate(wanted):
                if count == leave:
                    slot.data[: len(slot.data) // 2] = bytes(len(slot.data) // 2)
                    break
                slot.write(memoryview(content_of(prefix[slot.index], slot.data.nbytes)))
        told = wanted.outcome
        assert sorted([*told.stored, *told.existing, *told.refused]) == list(range(length))
        assert all(prefix[index] in self.stored for index in told.existing)
        self.stored |= {prefix[index] for index in told.stored}

    @rule(space=spaces, family=families, length=lengths)
    def load(self, space: int, family: int, length: int) -> None:
        client, prefix = self.prompt(space, family, length)
        held = client.lookup(prefix)
        with client.load(prefix) as loaded:
            came = [self.right(prefix, chunk.index, chunk.data) for chunk in loaded]
        assert all(came)
        assert len(came) <= held
        assert self.stored.issuperset(prefix.keys[:held])

    @precondition(lambda self: len(self.reading) < 3)
    @rule(space=spaces, family=families, length=lengths)
    def keep_reading(self, space: int, family: int, length: int) -> None:
        """Load a prompt and stay in the block, while everything else goes on."""
        client, prefix = self.prompt(space, family, length)
        stack = ExitStack()
        loaded = stack.enter_context(client.load(prefix))
        self.reading.append((stack, prefix, list(loaded)))

    @precondition(lambda self: self.reading)
    @rule(which=st.integers(0, 2))
    def stop_reading(self, which: int) -> None:
        self.reading.pop(which % len(self.reading))[0].close()

    @rule(space=spaces, family=families, length=lengths)
    def prefetch(self, space: int, family: int, length: int) -> None:
        client, prefix = self.prompt(space, family, length)
        assert 0 <= client.prefetch(prefix) <= length

    @rule(space=spaces, family=families, length=lengths, at=st.integers(0, 23))
    def evict(self, space: int, family: int, length: int, at: int) -> None:
        client, prefix = self.prompt(space, family, length)
        client.evict(prefix[at : at + 1])
        assert client.lookup(prefix) <= at or at >= length

    @rule(space=spaces)
    def evict_all(self, space: int) -> None:
        client = self.clients[space]
        client.evict(None)
        for family in range(5):
            assert client.lookup(self.prompt(space, family, 24)[1]) == 0

    @rule(space=spaces, family=families, length=lengths)
    def explain(self, space: int, family: int, length: int) -> None:
        """Said in one breath, a lookup and an explanation agree."""
        client, prefix = self.prompt(space, family, length)
        told = client.explain(prefix)
        states = [each.state in HELD for each in told]
        held = states.index(False) if False in states else length
        assert self.stored.issuperset(prefix.keys[:held])
        assert not any(states[held:]), "a held chunk below one that is not"

    @rule()
    def reconnect(self) -> None:
        """A session is given up while its chunks are being read."""
        for client in self.clients:
            session = client._connection.session
            assert session is not None
            client.lookup(client.prefix(range(TOKENS)))  # else the next session keeps one waiting
            client._connection.drop(session, "for the test")
        for client in self.clients:
            while not client.connected:
                assert client.wait_ready(HANG_S)

    @rule()
    def restart(self) -> None:
        self.stop()
        self.start()

    # ── what holds all the time ───────────────────────────────────────────────────────────────────

    @invariant()
    def what_is_being_read_is_right(self) -> None:
        for _, prefix, chunks in self.reading:
            assert all(self.right(prefix, chunk.index, chunk.data) for chunk in chunks)

    @precondition(lambda self: self.clients)
    @invariant()
    def the_index_is_whole_and_the_tiers_are_inside_their_bytes(self) -> None:
        cache = self.core._core.cache

        async def check() -> Any:
            cache.placement.index.check()
            return cache.tiers()

        for tier in self.core.submit(check()).result(HANG_S):
            assert tier.used_bytes <= tier.capacity_bytes


@pytest.mark.slow
class TestChurn(Churn.TestCase):
    settings = settings(max_examples=25, stateful_step_count=30)
