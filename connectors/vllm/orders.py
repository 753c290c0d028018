"""What the scheduler's side tells the workers' sides each step, and what they answer.

Plain data: it crosses processes. A worker finds its own share by the digests of its spaces.
"""

from collections import Counter
from dataclasses import dataclass, field

from kvtier.chunks import Prefix


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive chunks of one request in one space.

    `first` is the place of the first chunk in the request; `blocks` maps each cache group to the
    engine's block ids that hold the run's tokens, in order. Block 0 marks tokens that the engine
    does not keep (out of a sliding window).
    """

    prefix: Prefix
    first: int
    blocks: dict[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Fill the blocks of tokens `start` to `stop` of a request; `runs` by space digest.

    In the background, or else before this step's forward.
    """

    request: str
    start: int
    stop: int
    runs: dict[bytes, Run]
    background: bool


@dataclass(frozen=True, slots=True)
class OffloadOrder:
    """Store chunks of a request after this step's forward. `number` counts up."""

    number: int
    request: str
    runs: dict[bytes, Run]


@dataclass(frozen=True, slots=True)
class StepOrders:
    """All that one step asks of the workers.

    `fence`: before anything is written in this step, every offload up to this number must have
    left its blocks. 0: nothing to wait for. A step with `confirm` is answered, so that the
    scheduler learns whether its loads succeeded. An `idle` step computes nothing.
    """

    step: int
    fence: int = 0
    confirm: bool = False
    loads: tuple[LoadOrder, ...] = ()
    offloads: tuple[OffloadOrder, ...] = ()
    idle: bool = False


@dataclass(slots=True)
class StepReport:
    """What the workers answer. `stored` counts, for each (offload number, chunk's place in the
    request, space digest), the workers that stored it."""

    confirmed: set[int] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    stored: "Counter[tuple[int, int, bytes]]" = field(default_factory=Counter)

    def __bool__(self) -> bool:
        return bool(self.confirmed or self.failed or self.stored)

    def merged(self, other: "StepReport") -> "StepReport":
        """Both reports in one: of several workers on the same step, or of several steps."""
        return StepReport(
            self.confirmed | other.confirmed,
            self.failed | other.failed,
            self.stored + other.stored,
        )
