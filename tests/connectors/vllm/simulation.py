"""A whole simulated engine around the real scheduler's side of the connector."""

from collections.abc import Sequence
from typing import Any, cast

from kvtier.connectors.vllm.lookups import Lookups
from kvtier.connectors.vllm.parts import Shard
from kvtier.connectors.vllm.scheduling import Scheduling
from tests.connectors.vllm.making import parts, settings
from tests.connectors.vllm.simulated_engine import Engine
from tests.connectors.vllm.simulated_planning import Shape
from tests.connectors.vllm.simulated_pool import FakeRequest
from tests.connectors.vllm.simulated_workers import Choose, SimulatedLookups, Store, Workers
from tests.connectors.vllm.symbols import Kv

EVERYTHING = 1 << 30


class Simulation:
    """One engine with its workers and the service. `choose(most)`: 0 is that nothing goes wrong."""

    def __init__(
        self,
        shape: Shape,
        choose: Choose,
        *,
        chunk: int = 8,
        ranks: int = 1,
        load: str = "sync",
        in_process: bool = True,
        fragile: bool = False,
    ) -> None:
        self.shape = shape
        self.store = Store()
        by_rank = [
            parts(shape.windows, chunk=chunk, shard=Shard(rank, ranks), block=shape.block_tokens)
            for rank in range(ranks)
        ]
        flat = [part for each in by_rank for part in each]
        self.lookups = SimulatedLookups(self.store, choose)
        self.workers = Workers(shape, by_rank, self.store, choose)
        self.workers.fragile = fragile
        self.scheduling = Scheduling(
            flat,
            [shape.block_tokens] * len(shape.windows),
            cast("Lookups", self.lookups),
            settings(chunk, load=load),
            lambda request, salt: lambda chunk: salt,
            self.workers.prepare if in_process else None,
        )
        self.engine = Engine(shape, self.scheduling, self.workers.execute, self.workers.holds)
        self.engine.tables.root = self.workers.root
        self._count = 0

    def ask(self, tokens: Sequence[int], max_tokens: int = 1, **more: Any) -> FakeRequest:
        """A request arrives."""
        self._count += 1
        request = FakeRequest(f"r{self._count}", list(tokens), len(tokens), max_tokens, **more)
        self.engine.add(request)
        return request

    def run(self, most: int = 3000) -> None:
        """Step until nothing is left to do."""
        while self.engine.requests or self.engine.queue:
            self.lookups.answer()
            self.engine.step()
            most -= 1
            assert most, f"stuck: {list(self.engine.requests)}"

    def end(self) -> None:
        """Run to the end with all that is still to be offloaded, and look for what is left over."""
        self.workers.brings = EVERYTHING
        self.run()
        self.engine.requests = cast("dict[str, FakeRequest]", {})
        self.workers.execute(self.engine.plan())  # vLLM's last step, for what finished in the end
        for order in list(self.workers.pending):
            self.workers.settle(order)
        assert not self.scheduling._tracked
        assert not self.workers.prepared
        assert not any(secured.open for secured in self.lookups.secured)
        assert not self.scheduling._loads
        assert not self.scheduling._written
        assert not self.scheduling._offering._parting
        assert not self.scheduling._offering.held_back

    def change_weights(self) -> None:
        """The model is another one, and the engine has been told to forget."""
        self.engine.reset()
        self.workers.root = self.engine.tables.root = Kv(salt=self.scheduling._salt)

    def held(self, tokens: Sequence[int]) -> int:
        """How many leading chunks of a prompt the service holds in all spaces."""
        chains = []
        for part in self.scheduling._parts:
            node, chunk, count = self.workers.root, part.space.layout.tokens, 0
            for position, token in enumerate(tokens, start=1):
                node = node.then(token)
                if position % chunk == 0:
                    place = (part.digest, node.key(part.digest, chunk))
                    count += place in self.store.chunks and count == position // chunk - 1
            chains.append(count)
        return min(chains)
