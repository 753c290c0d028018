"""What the scheduler's side remembers of each request."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvtier.connectors.vllm.keys import Chains, Extra
from kvtier.connectors.vllm.lookups import Question

NEVER = 1 << 60
"""More chunks than any request has."""


class EngineRequest(Protocol):
    """What is read of vLLM's Request."""

    @property
    def request_id(self) -> str: ...
    @property
    def all_token_ids(self) -> Any: ...  # slices give lists of ints
    @property
    def num_tokens(self) -> int: ...  # whose ids are known
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_computed_tokens(self) -> int: ...  # with those of steps under way
    @property
    def num_in_flight_tokens(self) -> int: ...
    @property
    def skip_reading_prefix_cache(self) -> bool: ...


@dataclass(slots=True, eq=False)
class Tracked:
    """One request.

    `offered` are the leading chunks, for each part, that the service holds or that were sent to it.
    """

    request: EngineRequest
    extra: Extra
    chains: Chains
    offered: tuple[int, ...]
    question: Question | None = None
    asked_tokens: int = 0
    in_ram: int = 0  # leading chunks that were in RAM when first asked
    local: int = 0  # tokens that the engine's own cache held when last asked
    waiting_since_s: float = 0.0  # when it first had to wait for an answer; 0: it does not
    barred: bool = False  # nothing is loaded for it any more
    due_tokens: int = field(init=False)  # below so many computed tokens nothing is due

    def __post_init__(self) -> None:
        self.set_offered(self.offered)

    def key(self, chunks: int) -> None:
        """Have keys of at least the first `chunks` chunks, whose tokens must be known."""
        if chunks > self.chains.chunks:
            tokens = chunks * self.chains.chunk_tokens
            self.chains.extend(self.request.all_token_ids[:tokens], self.extra)

    def start_over(self) -> None:
        """A load of this request failed: compute it, and offer what is computed."""
        self.barred = True
        self.set_offered(0 for _ in self.offered)

    def set_offered(self, chunks: Iterable[int]) -> None:
        """The leading chunks of each part that are held or sent; NEVER: no more of that part."""
        self.offered = tuple(chunks)
        self.due_tokens = (min(self.offered) + 1) * self.chains.chunk_tokens
