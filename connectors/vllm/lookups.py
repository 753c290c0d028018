"""Asking the service what it holds, in the background, so that no scheduler step waits for it.

One thread asks. A question is answered with one call for each space; chunks that are on disk only
are brought to RAM when the scheduler says that it wants them, and the answer is then taken anew.
"""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvtier.chunks import Prefix
from kvtier.client import Held
from kvtier.errors import KvtierError

logger = logging.getLogger(__name__)

_POLL_S = 0.004


class Asked(Protocol):
    """What a question needs of a client."""

    @property
    def connected(self) -> bool: ...
    def locate(self, prefix: Prefix, deadline_s: float | None = None) -> Held | None: ...
    def prefetch(self, prefix: Prefix) -> int: ...


@dataclass(slots=True, eq=False)
class Question:
    """One request's prefix, in each space. `held` is the latest answer, in the order of `prefixes`;
    it stands while `ready` is set."""

    prefixes: tuple[Prefix, ...]
    until_s: float  # when the request no longer waits, by time.monotonic()
    ready: threading.Event = field(default_factory=threading.Event)
    held: tuple[Held, ...] = ()
    answered_s: float = 0.0
    promoting: "Promoting | None" = None

    @property
    def late(self) -> bool:
        """Whether the request has waited as long as it may."""
        return time.monotonic() >= self.until_s


@dataclass(slots=True)
class Promoting:
    """What is being brought to RAM: from chunk `first` on; `targets` are how many leading chunks
    will be there, for each space, once the service has said so."""

    first: int
    targets: tuple[int, ...] = ()


class Lookups:
    """The thread that asks. `clients` are in the order of every question's prefixes."""

    def __init__(self, clients: Sequence[Asked], patience_s: float) -> None:
        self._clients = tuple(clients)
        self._patience_s = patience_s
        self._incoming: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._waiting: list[Question] = []  # their chunks are on their way to RAM
        self._thread = threading.Thread(target=self._run, name="kvtier-lookups", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether every space can be asked."""
        return all(client.connected for client in self._clients)

    def ask(self, prefixes: Sequence[Prefix]) -> Question:
        """Ask what is held. The question is late once the patience is over."""
        question = Question(tuple(prefixes), time.monotonic() + self._patience_s)
        self._incoming.put(question)
        return question

    def promote(self, question: Question, first: int) -> None:
        """Bring what is on disk only to RAM, from chunk `first` on. `ready` is set again when it is
        there, when it cannot be, or when the question is late."""
        question.promoting = Promoting(first)
        question.ready.clear()
        self._incoming.put(question)

    def close(self) -> None:
        """End the thread; questions that are open stay so."""
        self._incoming.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while True:
            try:
                question = self._incoming.get(timeout=_POLL_S if self._waiting else None)
            except queue.Empty:
                waiting, self._waiting = self._waiting, []
                for each in waiting:
                    self._attend(each)
                continue
            if question is None:
                return
            self._attend(question)

    def _attend(self, question: Question) -> None:
        try:
            self._answer(question)
        except KvtierError as error:
            logger.warning("kvtier: a lookup failed: %s", error)
            question.held = tuple(Held(0, 0) for _ in question.prefixes)
            question.ready.set()

    def _answer(self, question: Question) -> None:
        promoting = question.promoting
        if promoting is not None and not promoting.targets:
            promoting.targets = tuple(
                promoting.first + client.prefetch(prefix[promoting.first : held.chunks])
                for client, prefix, held in self._each(question)
            )
        question.held = tuple(
            client.locate(prefix, self._patience_s) or Held(0, 0)
            for client, prefix in zip(self._clients, question.prefixes, strict=True)
        )
        question.answered_s = time.monotonic()
        if promoting is not None and not question.late and not _arrived(question, promoting):
            self._waiting.append(question)
            return
        question.ready.set()

    def _each(self, question: Question) -> "zip[tuple[Asked, Prefix, Held]]":
        return zip(self._clients, question.prefixes, question.held, strict=True)


def _arrived(question: Question, promoting: Promoting) -> bool:
    """Whether nothing more is to be waited for: it is in RAM, or no longer held."""
    return all(
        held.in_ram >= min(target, held.chunks)
        for held, target in zip(question.held, promoting.targets, strict=True)
    )
