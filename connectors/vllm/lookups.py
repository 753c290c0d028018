"""Asking the service in the background, so that no scheduler step waits for it.

A question is answered with one call for each space. When the scheduler wants what is held, it is
*secured*: leased and, where it was on disk, brought to RAM. What is secured cannot be lost any
more, whatever becomes of the service, so it may be promised to the engine.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from kvtier.chunks import Prefix
from kvtier.client import Held, Loaded, LoadedChunk

logger = logging.getLogger(__name__)

# An answer takes about a millisecond; bringing chunks from disk takes longer, and must not keep
# others from their answers.
_ASKING_THREADS = 2
_SECURING_THREADS = 4
# A call that is given less time than any call takes would only look as if the service had failed.
_LEAST_S = 0.25


class Asked(Protocol):
    """What a question needs of a client."""

    @property
    def connected(self) -> bool: ...
    def locate(self, prefix: Prefix, deadline_s: float | None = None) -> Held | None: ...
    def load(
        self, prefix: Prefix, deadline_s: float | None = None
    ) -> AbstractContextManager[Loaded]: ...


class Secured:
    """Chunks that are kept for one load, from chunk `first` of the request on: leased in the arena,
    or in this process' memory. `chunks` are those of each space, by its digest."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.chunks: dict[bytes, list[LoadedChunk]] = {}
        self._leases = ExitStack()

    def secure(self, client: Asked, digest: bytes, prefix: Prefix, deadline_s: float) -> None:
        """Keep what can be had of a prefix in one space until the deadline."""
        loaded = self._leases.enter_context(client.load(prefix, deadline_s))
        self.chunks[digest] = list(loaded)

    @property
    def reach(self) -> int:
        """How many leading chunks of the request there are, those before `first` included."""
        return self.first + min(len(chunks) for chunks in self.chunks.values())

    def release(self) -> None:
        """Let go. The chunks' memory must not be read any more."""
        self.chunks = {}
        self._leases.close()


@dataclass(slots=True, eq=False)
class Question:
    """One request's prefix in each space, by its digest. `held` is the answer; it stands, and so
    does `secured`, while `ready` is set."""

    prefixes: Mapping[bytes, Prefix]
    until_s: float  # when the request no longer waits, by time.monotonic()
    ready: threading.Event = field(default_factory=threading.Event)
    held: tuple[Held, ...] = ()
    answered_s: float = 0.0
    secured: Secured | None = None
    _dropped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def late(self) -> bool:
        """Whether the request has waited as long as it may."""
        return time.monotonic() >= self.until_s

    def take(self) -> Secured | None:
        """What was secured; it is the caller's to release."""
        secured, self.secured = self.secured, None
        return secured

    def drop(self) -> Secured | None:
        """Nobody wants the answer any more. As `take`; what is secured later is let go of."""
        with self._lock:
            self._dropped = True
            return self.take()

    def keep(self, secured: Secured) -> bool:
        """Note what was secured; False when nobody wants it any more."""
        with self._lock:
            if not self._dropped:
                self.secured = secured
            return not self._dropped


class Lookups:
    """Asks through one client for each space."""

    def __init__(self, clients: Mapping[bytes, Asked]) -> None:
        self._clients = dict(clients)
        self._asking = ThreadPoolExecutor(_ASKING_THREADS, thread_name_prefix="kvtier-ask")
        self._securing = ThreadPoolExecutor(_SECURING_THREADS, thread_name_prefix="kvtier-secure")

    @property
    def connected(self) -> bool:
        """Whether every space can be asked."""
        return all(client.connected for client in self._clients.values())

    def ask(self, prefixes: Mapping[bytes, Prefix], until_s: float) -> Question:
        """Ask what is held, for a request that waits until then."""
        question = Question(prefixes, until_s)
        self._asking.submit(self._guarded, question, lambda: self._answer(question))
        return question

    def secure(self, question: Question, first: int) -> None:
        """Secure what is held from chunk `first` on. `ready` is set again when it is there, or as
        much of it as could be had until the question is late."""
        question.ready.clear()
        self._securing.submit(self._guarded, question, lambda: self._secure(question, first))

    def release(self, secured: Secured | None) -> None:
        """Let go of what nobody reads, in the background."""
        if secured is not None:
            self._securing.submit(secured.release)

    def close(self) -> None:
        """End the threads; questions that are open stay so."""
        self._asking.shutdown(wait=True, cancel_futures=True)
        self._securing.shutdown(wait=True, cancel_futures=True)

    def _answer(self, question: Question) -> None:
        left_s = max(_LEAST_S, _left(question))
        question.held = tuple(
            (None if question.late else self._clients[digest].locate(prefix, left_s)) or Held(0, 0)
            for digest, prefix in question.prefixes.items()
        )
        question.answered_s = time.monotonic()
        question.ready.set()

    def _secure(self, question: Question, first: int) -> None:
        secured = Secured(first)
        try:
            for (digest, prefix), held in zip(
                question.prefixes.items(), question.held, strict=True
            ):
                wanted = prefix[first : held.chunks]
                secured.secure(self._clients[digest], digest, wanted, _left(question))
        except BaseException:
            secured.release()
            raise
        if question.keep(secured):
            question.ready.set()
        else:
            secured.release()

    def _guarded(self, question: Question, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:
            logger.exception("kvtier: a lookup failed")
            question.held = tuple(Held(0, 0) for _ in question.prefixes)
            question.ready.set()


def _left(question: Question) -> float:
    """What is left of the request's patience; a moment at least, as a deadline must be positive."""
    return max(0.001, question.until_s - time.monotonic())
