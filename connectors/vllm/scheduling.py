"""The scheduler's side: what each request reuses, what each step loads and stores.

It runs on the engine's loop, so it only computes and remembers; `Lookups` asks the service.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtier.connectors.vllm.events import StoredChunks
from kvtier.connectors.vllm.keys import Chains, Extra
from kvtier.connectors.vllm.lookups import Lookups, Secured
from kvtier.connectors.vllm.matching import BlockTable, Matching
from kvtier.connectors.vllm.offering import Offering
from kvtier.connectors.vllm.orders import LoadOrder, OffloadOrder, StepOrders, StepReport
from kvtier.connectors.vllm.parts import Part
from kvtier.connectors.vllm.settings import LoadMode, Scope, Settings
from kvtier.connectors.vllm.tally import Tally
from kvtier.connectors.vllm.tracking import NEVER, EngineRequest, Tracked

logger = logging.getLogger(__name__)

ExtraOf = Callable[[Any, bytes], Extra]
"""The extras of a request's chunks, with a salt of ours (empty: none)."""

HandOver = Callable[[str, Secured], None]
"""Gives the worker in this process what is secured for a request's load."""


@dataclass(frozen=True, slots=True)
class NewBlocks:
    """Blocks that a step will write: those of a request from the `start`th token on, or all."""

    table: BlockTable
    start: int


class Scheduling:
    """All requests of one engine. Not for several threads.

    `block_tokens` are the tokens of a block, for each cache group. Without `hand_over`, where the
    workers are other processes, loads are in the background whatever the settings say: see
    `Matching`. So they are with several cache groups, where the engine cannot tell which blocks of
    a load in line are bad.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        block_tokens: Sequence[int],
        lookups: Lookups,
        settings: Settings,
        extra_of: ExtraOf,
        hand_over: HandOver | None,
    ) -> None:
        self.tally = Tally()
        self.stored = StoredChunks()
        self._parts = tuple(parts)
        self._block_tokens = tuple(block_tokens)
        self._lookups = lookups
        self._chunk_tokens = settings.chunk_tokens
        self._extra_of = extra_of
        self._hand_over = hand_over
        self._matching = Matching(
            parts,
            lookups,
            self.tally,
            wait_s=settings.lookup_wait_ms / 1000,
            patience_s=settings.deadline_ms / 1000,
            background=(
                settings.load is LoadMode.ASYNC or len(block_tokens) > 1 or hand_over is None
            ),
        )
        self._offering = Offering(parts, output=settings.offload is Scope.PROMPT_AND_OUTPUT)
        self._tracked: dict[str, Tracked] = {}
        self._loads: list[LoadOrder] = []
        self._written: list[NewBlocks] = []
        self._step = 0
        self._salt = b""

    # ── requests ──────────────────────────────────────────────────────────────────────────────────

    def arrived(self, request: EngineRequest) -> None:
        """A new request: ask about it at once, so that the answer is there when it is scheduled."""
        chains = Chains([part.digest for part in self._parts], self._chunk_tokens)
        extra = self._extra_of(request, self._salt)
        tracked = Tracked(request, extra, chains, (0,) * len(self._parts))
        self._tracked[request.request_id] = tracked
        if not request.skip_reading_prefix_cache:
            self._matching.ask(tracked)

    def matched(self, request: EngineRequest, local: int) -> tuple[int | None, bool]:
        """The answer to the engine's get_num_new_matched_tokens."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return 0, False
        tokens = self._matching.matched(tracked, local)
        return tokens, bool(tokens) and self._matching.background

    def allocated(self, request: EngineRequest, table: BlockTable, external: int) -> None:
        """The request has its blocks; `external` tokens of them are to be loaded."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return
        question = tracked.question
        if question is not None and question.ready.is_set():
            reach = NEVER if question.secured is None else question.secured.reach
            held = (min(held.chunks, reach) for held in question.held)
            tracked.set_offered(max(pair) for pair in zip(tracked.offered, held, strict=True))
        if external > 0:
            self._loads.append(self._matching.load(tracked, table, external))
            if self._matching.background:
                self._written.append(NewBlocks(table, tracked.local))
            elif question is not None and (secured := question.take()) is not None:
                assert self._hand_over is not None, "a load in line of another process"
                self._hand_over(request.request_id, secured)
        self._matching.forget(tracked)

    def from_ram(self, request: EngineRequest, external: int) -> int:
        """How many of the tokens just ordered to be loaded come from RAM; the rest was on disk."""
        tracked = self._tracked.get(request.request_id)
        return self._matching.from_ram(tracked, external) if tracked is not None else 0

    def finished(self, request: EngineRequest, table: BlockTable, *, whole: bool) -> None:
        """The request has ended; its blocks are freed next. Unless it is `whole`, nothing more of
        it is offered."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return
        self._matching.forget(tracked)
        if whole and self._matching.connected:
            processed = request.num_computed_tokens - request.num_in_flight_tokens
            order = self._offering.offer_at_end(tracked, table, processed)
            if order is not None:
                self._note(order, tracked)

    def start_over(self) -> None:
        """The engine's weights may have changed: from now on this engine neither sees what was
        stored before, nor shows what it stores to those who trust the weights' fingerprint."""
        self._salt = os.urandom(16)
        self._offering.forget()
        for tracked in self._tracked.values():
            self._matching.forget(tracked)
            tracked.start_over()
            tracked.set_offered(NEVER for _ in self._parts)

    # ── steps ─────────────────────────────────────────────────────────────────────────────────────

    def plan(self, output: Any) -> StepOrders:
        """The orders of the step that vLLM's SchedulerOutput describes."""
        # Every step passes here, and hardly any has something to do: keep its way short. Between
        # two steps the engine's own work has displaced this code and its data from the caches.
        self._step += 1
        self._matching.next_step()
        loads, self._loads = self._loads, []
        fence = self._offering.fence(self._blocks_written(output, loads))
        confirm = False
        if loads:
            self.tally.add(loads=len(loads))
            confirm = any(not load.background for load in loads)
            if confirm:
                self._offering.await_confirmation(self._step)
        offloads = self._offering.parting()
        if not self._offering.held_back:
            due = self._due(output.num_scheduled_tokens)
            if due and self._matching.connected:
                offloads += self._orders(due, output.kv_connector_block_state)
        idle = not output.num_scheduled_tokens
        return StepOrders(self._step, fence, confirm, tuple(loads), tuple(offloads), idle)

    def received(self, report: StepReport) -> None:
        """What the workers answered."""
        self._offering.confirmed(report.confirmed)
        for request_id in report.failed:
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                self._matching.forget(tracked)
                tracked.start_over()
        self.stored.count(report.stored)

    def _due(self, scheduled: Mapping[str, int]) -> list[tuple[Tracked, int]]:
        """Requests with chunks to offer, and how many tokens of each this step completes."""
        due = []
        everyone = self._tracked
        for request_id, tokens in scheduled.items():
            tracked = everyone.get(request_id)
            if tracked is None:
                continue
            computed = tracked.request.num_computed_tokens + tokens
            if computed >= tracked.due_tokens and self._offering.due(tracked, computed):
                due.append((tracked, computed))
        return due

    def _orders(self, due: Iterable[tuple[Tracked, int]], tables: Any) -> Iterator[OffloadOrder]:
        for tracked, computed in due:
            table = tables.get_block_ids(tracked.request.request_id)
            order = self._offering.offer(tracked, table, computed)
            if order is not None:
                self._note(order, tracked)
                yield order

    def _note(self, order: OffloadOrder, tracked: Tracked) -> None:
        if len(order.runs) == len(self._parts):  # else it will never be a hit
            lora = getattr(tracked.request, "lora_request", None)
            name = lora.lora_name if lora is not None else None
            tokens = tracked.request.all_token_ids
            self.stored.offered(order, tokens, self._chunk_tokens, name)

    def _blocks_written(self, output: Any, loads: Sequence[LoadOrder]) -> Iterable[int]:
        """Every block that the step may write, but for those that it only continues to fill: these
        were named when they were new."""
        if not (
            self._written
            or output.scheduled_new_reqs
            or any(output.scheduled_cached_reqs.new_block_ids)
            or output.kv_cache_block_copies
            or output.new_block_ids_to_zero
        ):
            return ()
        return self._new_blocks(output, loads)

    def _new_blocks(self, output: Any, loads: Sequence[LoadOrder]) -> Iterator[int]:
        written, self._written = self._written, []
        starts: dict[str, int] = {load.request: load.start for load in loads}
        for new in output.scheduled_new_reqs:
            computed: int = new.num_computed_tokens
            written.append(NewBlocks(new.block_ids, starts.get(new.req_id, computed)))
        cached = output.scheduled_cached_reqs
        for index, table in enumerate(cached.new_block_ids):
            if table is not None:
                request_id = cached.req_ids[index]
                resumed = request_id in cached.resumed_req_ids
                computed = cached.num_computed_tokens[index] if resumed else 0
                written.append(NewBlocks(table, starts.get(request_id, computed)))
        for new in written:
            for block_tokens, blocks in zip(self._block_tokens, new.table, strict=True):
                yield from blocks[new.start // block_tokens :]
        for copy in output.kv_cache_block_copies or ():
            yield copy.dst_block_id
        yield from output.new_block_ids_to_zero or ()
