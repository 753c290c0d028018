"""The scheduler's side against a simulated vLLM: whatever is stored is what its key says, whenever
it is read, and no answer is computed on top of garbage."""

from collections import Counter
from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.connectors.vllm.simulated_planning import Shape
from tests.connectors.vllm.simulated_pool import Status
from tests.connectors.vllm.simulation import Simulation

ENGINES: dict[str, tuple[Shape, dict[str, Any]]] = {
    "in line": (Shape(), {}),
    "in line, steps ahead": (Shape(depth=2), {}),
    "in line, second runner": (Shape(depth=2, second_runner=True, longest_prefill=9), {}),
    "in line, copies fail": (Shape(depth=2, longest_prefill=9, mends=True), {"fragile": True}),
    "beside": (Shape(), {"load": "async"}),
    "beside, steps ahead, two ranks": (Shape(depth=2), {"ranks": 2, "in_process": False}),
    "window": (Shape(windows=(None, 10), blocks=40), {}),
    "windows, steps ahead": (Shape(windows=(None, 10, 17), blocks=60, depth=2), {}),
    "only a window": (Shape(windows=(10,), depth=2), {}),
    "only a window, beside": (Shape(windows=(10,), depth=2), {"load": "async"}),
    "drafts": (Shape(drafts=2), {}),
    "drafts, steps ahead": (Shape(drafts=2, depth=2, second_runner=True), {"load": "async"}),
    "chunk of one block": (Shape(blocks=30, block_tokens=2, depth=2), {"chunk": 2}),
}
ACTIONS = {
    "arrive": 6, "step": 12, "run": 4, "process": 1, "answer": 3, "abort": 2, "store": 4,
    "evict": 3, "forget": 4, "connect": 1, "change weights": 1,
}  # fmt: skip
WEIGHTED = [action for action, weight in ACTIONS.items() for _ in range(weight)]


class Walk:
    """A random walk of one engine."""

    def __init__(self, shape: Shape, more: dict[str, Any], seed: int) -> None:
        self.random = Random(seed)
        self.simulation = Simulation(shape, self.choose, **more)
        self.engine = self.simulation.engine
        self.seen: Counter[str] = Counter()

    def choose(self, most: int) -> int:
        return self.random.randint(0, most) if self.random.random() < 0.25 else 0

    def walk(self, actions: list[str]) -> None:
        for action in actions:
            getattr(self, action.replace(" ", "_"))()
        self.simulation.end()
        assert not self.engine.wrong_answers

    def arrive(self) -> None:
        shape, random = self.engine.shape, self.random
        max_tokens = random.choice([1, 1, 4, 12])
        most = shape.block_tokens * (shape.blocks - 1) // len(shape.windows)
        length = min(random.choice([5, 20, 33, 40, 44]), most - max_tokens - shape.drafts)
        shared, family = random.choice([0, 8, 19, 32, 40]), random.randint(1, 2)
        tokens = [p if p < shared else 100 * family + p for p in range(length)]
        skip = random.random() < 0.1
        for _ in range(random.choice([1, 1, 2])):  # `n` of 2
            self.simulation.ask(tokens, max_tokens, skip_reading_prefix_cache=skip)

    def step(self) -> None:
        self.engine.step()

    def run(self) -> None:
        for _ in range(6):
            self.simulation.lookups.answer()
            self.engine.step()

    def process(self) -> None:
        if self.engine.queue:
            self.engine.process()

    def answer(self) -> None:
        self.simulation.lookups.answer()

    def abort(self) -> None:
        live = [r for r in self.engine.requests.values() if r.status is not Status.FINISHED]
        if live:
            self.engine.abort(self.random.choice(live))

    def store(self) -> None:
        for order in list(self.simulation.workers.pending)[: self.random.randint(0, 4)]:
            self.simulation.workers.settle(order)

    def evict(self) -> None:
        store = self.simulation.store
        for place in self.random.sample(list(store.chunks), len(store.chunks) // 4):
            if self.random.random() < 0.3:
                del store.chunks[place]
                store.on_disk.discard(place)
            else:
                store.on_disk.add(place)

    def forget(self) -> None:
        """Other traffic takes the place of what the engine's own cache holds."""
        pool = self.engine.tables.pool
        for block, _, _ in pool.entries():
            if pool.idle(block):
                pool.forget(block)

    def connect(self) -> None:
        self.simulation.lookups.connected = not self.simulation.lookups.connected

    def change_weights(self) -> None:
        # vLLM refuses a reset while requests that do not run hold blocks.
        holding = [request for request in self.engine.requests.values() if request.tables]
        if not self.engine.queue and all(r.status is Status.RUNNING for r in holding):
            self.simulation.change_weights()


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=25)
@given(actions=st.lists(st.sampled_from(WEIGHTED), min_size=150, max_size=250), seed=st.integers())
def test_what_is_read_to_be_stored_is_what_its_key_says(
    engine: str, actions: list[str], seed: int
) -> None:
    shape, more = ENGINES[engine]
    Walk(shape, more, seed).walk(actions)
