"""Caches in this process, one for each space, shared by the tests of a module: they use prompts of
their own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

import kvtier
from kvtier.client import Client
from kvtier.connectors.vllm.parts import Part

if TYPE_CHECKING:
    from tests.connectors.vllm.workplace import Bench

OpenCache = Callable[[Part], Client]


@pytest.fixture(scope="module")
def open_cache() -> Iterator[OpenCache]:
    """A client of the cache of a part's space."""
    opened: dict[bytes, Client] = {}
    with ExitStack() as stack:

        def of(part: Part) -> Client:
            if part.digest not in opened:
                opened[part.digest] = stack.enter_context(kvtier.open(part.space, cpu="64MiB"))
            return opened[part.digest]

        yield of


@pytest.fixture
def bench(open_cache: OpenCache) -> Iterator["Bench"]:
    """Makes workers; all their threads must end."""
    from tests.connectors.vllm.workplace import Bench, alive  # noqa: PLC0415 - needs torch

    made = Bench(open_cache)
    yield made
    for worker in made.workers:
        worker._parts = ()  # their clients are shared
        worker.close()
        assert not worker._offloader._thread.is_alive()
        assert not alive(worker._background._thread)
