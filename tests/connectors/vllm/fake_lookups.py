"""Stand-ins for time and for the service's answers, for tests of what is promised."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from kvtier.chunks import Prefix
from kvtier.client import Held
from kvtier.connectors.vllm.lookups import Question


class Clock:
    """Stands in for the time module of the modules under test."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


class Waiting(threading.Event):
    """An event whose waits take their whole time on the clock, unless it is set."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None, "an unbounded wait"
        self.waits.append(timeout)
        self._clock.now_s += timeout if not self.is_set() else 0
        return self.is_set()


@dataclass
class FakeSecured:
    """Chunks from `first` up to `reach`, until they are let go of."""

    first: int
    reach: int
    open: bool = True


@dataclass
class FakeLookups:
    """Answers `held` at once, or when told to; as much is secured, or `come` chunks at most."""

    clock: Clock
    held: tuple[Held, ...] = (Held(0, 0),)
    come: int = 1 << 30
    at_once: bool = True
    connected: bool = True
    asked: list[Question] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)  # from which chunk on it was secured
    secured: list[FakeSecured] = field(default_factory=list)

    def ask(self, prefixes: Mapping[bytes, Prefix], until_s: float) -> Question:
        self.asked.append(Question(prefixes, until_s, Waiting(self.clock)))
        if self.at_once:
            self.answer()
        return self.asked[-1]

    def secure(self, question: Question, first: int) -> None:
        question.ready.clear()
        self.firsts.append(first)
        if self.at_once:
            self.bring()

    def release(self, secured: Any) -> None:
        if secured is not None:
            assert secured.open
            secured.open = False

    def answer(self) -> None:
        """The last question is answered."""
        self.asked[-1].held = self.held
        self.asked[-1].answered_s = self.clock.now_s
        self.asked[-1].ready.set()

    def bring(self) -> None:
        """What was wanted last is secured."""
        reach = max(self.firsts[-1], min(self.come, *(each.chunks for each in self.held)))
        self.secured.append(FakeSecured(self.firsts[-1], reach))
        if self.asked[-1].keep(cast("Any", self.secured[-1])):
            self.asked[-1].ready.set()
        else:
            self.release(self.secured[-1])

    @property
    def open(self) -> list[FakeSecured]:
        return [secured for secured in self.secured if secured.open]

    def waits(self, question: int) -> list[float]:
        return cast("Waiting", self.asked[question].ready).waits
