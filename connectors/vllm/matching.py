"""What a request can reuse: the answer to the scheduler, and the order that loads it."""

import time
from collections.abc import Sequence

from kvtier.connectors.vllm.lookups import Lookups, Question
from kvtier.connectors.vllm.orders import LoadOrder, Run
from kvtier.connectors.vllm.parts import Part
from kvtier.connectors.vllm.tally import Tally
from kvtier.connectors.vllm.tracking import Tracked

_STALE_S = 1.0  # an answer older than this is asked for anew before it is acted on

BlockTable = Sequence[Sequence[int]]
"""A request's block ids, for each cache group."""


class Matching:
    """Finds how far a prefix reaches. Waits at most `wait_s` for answers in each step; a request
    waits at most `patience_s` in all.

    In the background, a load that fails is computed again by the engine. In line with a step the
    engine cannot be told in time, so nothing is promised there but what is secured.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        lookups: Lookups,
        tally: Tally,
        *,
        wait_s: float,
        patience_s: float,
        background: bool,
    ) -> None:
        self._parts = tuple(parts)
        self._lookups = lookups
        self._tally = tally
        self._wait_s = wait_s
        self._left_s = wait_s
        self._patience_s = patience_s
        self.background = background

    @property
    def connected(self) -> bool:
        """Whether the service can be asked about every part."""
        return self._lookups.connected

    def next_step(self) -> None:
        """A step is planned: the next one may wait again."""
        self._left_s = self._wait_s

    def ask(self, tracked: Tracked) -> Question | None:
        """Ask about a request's known tokens; None when they fill no chunk."""
        self.forget(tracked)
        tracked.asked_tokens = tracked.request.num_tokens
        chunks = tracked.asked_tokens // tracked.chains.chunk_tokens
        tracked.key(chunks)
        if chunks and self._lookups.connected:
            prefixes = {
                part.digest: tracked.chains.run(part.digest, 0, chunks) for part in self._parts
            }
            until_s = time.monotonic() + self._patience_s
            if tracked.waiting_since_s:
                until_s = tracked.waiting_since_s + self._patience_s
            tracked.question = self._lookups.ask(prefixes, until_s)
            self._tally.add(lookups=1)
        return tracked.question

    def forget(self, tracked: Tracked) -> None:
        """The present question of a request is settled; what was secured for it is let go of."""
        question, tracked.question = tracked.question, None
        if question is not None:
            self._lookups.release(question.drop())

    def matched(self, tracked: Tracked, local: int) -> int | None:
        """How many tokens beyond the `local` ones can be loaded; None: ask again in a later step.

        All but the last token of the prompt when loading in line with the step: the engine needs
        one to compute. In the background all of them; the engine then takes the last one back.
        """
        tracked.local = local
        if tracked.barred or tracked.request.skip_reading_prefix_cache:
            return 0
        question = self._question(tracked)
        if question is None:
            return 0
        if not self._ready(question):
            return self._not_yet(tracked, question)
        if self.background:
            tracked.waiting_since_s = 0.0
            tracked.in_ram = min(held.in_ram for held in question.held)
            chunks = min(held.chunks for held in question.held)
            # The engine takes the last token back, which looks one further back than the next.
            windowed = any(part.window is not None for part in self._parts)
            return self._beyond(tracked, chunks, spare=1 if windowed else 0)
        if not self._secured(tracked, question):
            return self._not_yet(tracked, question)
        tracked.waiting_since_s = 0.0
        reach = question.secured.reach if question.secured is not None else 0
        return self._beyond(tracked, reach, spare=1)

    def load(self, tracked: Tracked, table: BlockTable, external: int) -> LoadOrder:
        """The order that fills `external` tokens after the local ones in the request's blocks."""
        start, stop = tracked.local, tracked.local + external
        tokens = tracked.chains.chunk_tokens
        runs = {}
        for part in self._parts:
            first = max(start // tokens, part.first_needed(stop))
            last = -(-stop // tokens)
            if first < last:
                runs[part.digest] = run_of(tracked, part, table, first, last)
        return LoadOrder(tracked.request.request_id, start, stop, runs, self.background)

    def from_ram(self, tracked: Tracked, external: int) -> int:
        """How many of the tokens being loaded were in RAM when the service was first asked."""
        return max(0, min(external, tracked.in_ram * tracked.chains.chunk_tokens - tracked.local))

    def _question(self, tracked: Tracked) -> Question | None:
        question = tracked.question
        if question is None or tracked.asked_tokens != tracked.request.num_tokens:
            return self.ask(tracked)
        stale = time.monotonic() - question.answered_s > _STALE_S
        if question.ready.is_set() and question.secured is None and stale:
            return self.ask(tracked)
        return question

    def _secured(self, tracked: Tracked, question: Question) -> bool:
        """Have what lies beyond the local tokens secured; False while that is under way."""
        first = tracked.local // tracked.chains.chunk_tokens
        secured = question.secured
        if secured is None or secured.first > first:
            self._lookups.release(question.take())
            tracked.in_ram = min(held.in_ram for held in question.held)
            if min(held.chunks for held in question.held) <= first:
                return True  # nothing to be had
            question.until_s = self._patience_s + (tracked.waiting_since_s or time.monotonic())
            self._lookups.secure(question, first)
        return self._ready(question)

    def _ready(self, question: Question) -> bool:
        """Whether the answer is there, now or within what is left of this step's waiting time."""
        if question.ready.is_set():
            return True
        started_s = time.monotonic()
        ready = question.ready.wait(max(0.0, self._left_s))
        self._left_s -= time.monotonic() - started_s
        return ready

    def _not_yet(self, tracked: Tracked, question: Question) -> int | None:
        if not tracked.waiting_since_s:
            tracked.waiting_since_s = time.monotonic()
        waited_s = time.monotonic() - tracked.waiting_since_s
        if self._lookups.connected and waited_s < self._patience_s:
            self._tally.add(ask_again=1)
            return None
        self._tally.add(late_lookups=1)
        tracked.barred = True  # it has waited as long as it may
        self.forget(tracked)
        return 0

    def _beyond(self, tracked: Tracked, chunks: int, *, spare: int) -> int:
        """How many tokens of that many leading chunks are not local."""
        tokens = tracked.chains.chunk_tokens
        return max(0, min(chunks * tokens, tracked.request.num_tokens - spare) - tracked.local)


def run_of(tracked: Tracked, part: Part, table: BlockTable, first: int, last: int) -> Run:
    """Chunks `first` to `last` (exclusive) of a part, and the blocks that hold their tokens.

    Raises ValueError when the table does not reach that far.
    """
    tokens = tracked.chains.chunk_tokens
    blocks = {}
    for group, block_tokens in part.groups:
        ids = table[group][first * tokens // block_tokens : last * tokens // block_tokens]
        if len(ids) * block_tokens != (last - first) * tokens:
            raise ValueError(f"{len(ids)} blocks for chunks {first} to {last} of group {group}")
        blocks[group] = tuple(ids)
    return Run(tracked.chains.run(part.digest, first, last), first, blocks)
