"""vLLM's scheduler in small: requests come, steps are planned and carried out, outputs processed.

After `update_from_output` and what it calls in vllm/v1/core/sched/scheduler.py of 0.32, and
`step_with_batch_queue` in v1/engine/core.py. `Shape.mends` puts right what vLLM gets wrong after a
load in line with a step has failed (see test_failed_loads.py): it lets others go on with
blocks that are to be computed anew, keeps them in its prefix cache, and delivers the output of a
step that was already under way.
"""

from collections import deque
from collections.abc import Callable

from kvtier.connectors.vllm.scheduling import Scheduling
from tests.connectors.vllm.simulated_planning import Item, Planner, Shape, Step
from tests.connectors.vllm.simulated_pool import FakeRequest, Status
from tests.connectors.vllm.symbols import Kv

GARBAGE_TOKEN = 77_777  # sampled on top of garbage


class Engine(Planner):
    """The engine core. `execute` carries a step out on the workers; `holds` tells whether a block
    of a group holds the tokens that end with a given one."""

    def __init__(
        self,
        shape: Shape,
        scheduling: Scheduling,
        execute: Callable[[Step], None],
        holds: Callable[[int, int, Kv], bool],
    ) -> None:
        super().__init__(shape, scheduling)
        self.queue: deque[Step] = deque()
        self.wrong_answers: list[str] = []
        self._execute = execute
        self._holds = holds
        self._sharers: list[FakeRequest] = []

    # ── from outside ──────────────────────────────────────────────────────────────────────────────

    def add(self, request: FakeRequest) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request)
        self.scheduling.arrived(request)

    def abort(self, request: FakeRequest) -> None:
        later = False
        if request.status is Status.LOADING:
            later = request.request_id not in self.arrived
            self.arrived.discard(request.request_id)
            self.lost.discard(request.request_id)
        self._leave(request)
        self._finish(request, whole=False, later=later)

    def step(self) -> None:
        """One turn of the engine's loop."""
        if self.requests:
            step = self.plan()
            self._execute(step)
            self.queue.append(step)
            if len(self.queue) < self.shape.depth:
                return
        if self.queue:
            self.process()

    def reset(self) -> None:
        """reset_prefix_cache(reset_running_requests=True, reset_connector=True), when paused."""
        assert not self.queue
        while self.running:
            self.preempt(self.running.pop(), drop=True)
        for block, _, _ in self.tables.pool.entries():
            self.tables.pool.forget(block)
        self.scheduling.start_over()

    # ── processing what a step brought ────────────────────────────────────────────────────────────

    def process(self) -> None:
        """Process the oldest step that is under way."""
        step = self.queue.popleft()
        if step.items:
            self.processed += 1
        while self.deferred and self.deferred[0][0] <= self.processed:
            self.tables.pool.give_back(self.deferred.popleft()[1])
        self._note_lost(step)
        failed = self._rewind(step) if step.bad_blocks else set[str]()
        for item in step.items:
            self._process(item, step.generated.get(item.request.request_id, []), failed)
        if step.bad_blocks and self.shape.mends:
            self._mend(failed)
        self.scheduling.received(step.report)
        for request_id in step.finished_recving:
            request = self.requests[request_id]
            if request.status is Status.LOADING:
                self.arrived.add(request_id)
            else:
                self.free(request)
                del self.requests[request_id]

    def _note_lost(self, step: Step) -> None:
        for request_id in step.failed_recving:
            request = self.requests.get(request_id)
            if request is not None and request.status is Status.LOADING:
                request.num_computed_tokens = 0
                self.lost.add(request_id)

    def _process(self, item: Item, generated: list[int], failed: set[str]) -> None:
        request = item.request
        if self.requests.get(request.request_id) is not request:
            return
        request.num_in_flight_tokens -= item.tokens
        stale = request.stale > 0
        if stale:
            request.stale -= item.tokens
        if request.request_id in failed or request.status is Status.FINISHED:
            return
        if (stale and request.drop_stale) or not generated:
            return
        if item.drafts and not stale:
            rejected = item.drafts - (len(generated) - 1)
            request.num_computed_tokens -= rejected if request.num_computed_tokens else 0
            request.placeholders -= rejected if request.placeholders else 0
        self._append(request, generated, stale)

    def _append(self, request: FakeRequest, generated: list[int], stale: bool) -> None:
        before, room = request.status, request.max_tokens - request.num_output_tokens
        kept = generated[:room]
        request.all_token_ids += kept
        if GARBAGE_TOKEN in kept:
            self.wrong_answers.append(request.request_id)
        if self.shape.depth > 1:
            if not stale:
                request.placeholders -= len(kept)
                assert request.placeholders >= 0 or not self.shape.mends
            if before is Status.RUNNING:
                self.tables.enter(request, request.num_computed_tokens - request.placeholders)
        if request.num_output_tokens >= request.max_tokens:
            self._finish(request, whole=True)
            self._leave(request)

    def _leave(self, request: FakeRequest) -> None:
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)

    def _finish(self, request: FakeRequest, *, whole: bool, later: bool = False) -> None:
        request.status = Status.FINISHED
        processed = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
        self.tables.drop_skipped(request, processed)
        blocks = -(-request.num_computed_tokens // self.shape.block_tokens)
        table = [list(each[:blocks]) for each in request.tables] or [[] for _ in self.shape.windows]
        self.scheduling.finished(request, table, whole=whole)
        if not later:
            self.free(request)
            del self.requests[request.request_id]

    def _rewind(self, step: Step) -> set[str]:
        """vLLM's _update_requests_with_invalid_blocks: the first request that has a bad block
        computes it, others that share it only lose this step."""
        scheduled = {item.request.request_id: item.tokens for item in step.items}
        marked: set[int] = set()
        affected: set[str] = set()
        for request in self.running:
            computed = request.num_computed_tokens - scheduled.get(request.request_id, 0)
            blocks = request.tables[0][: -(-computed // self.shape.block_tokens)]
            bad = [place for place, block in enumerate(blocks) if block in step.bad_blocks]
            if not bad:
                continue
            affected.add(request.request_id)
            mine = [place for place in bad if blocks[place] not in marked]
            marked |= {blocks[place] for place in bad}
            request.num_computed_tokens = mine[0] * self.shape.block_tokens if mine else computed
            request.renewed = True
            if len(mine) < len(bad):
                self._sharers.append(request)
        return affected

    def _mend(self, failed: set[str]) -> None:
        """What vLLM 0.32 does not do: see the module."""
        for block, group, end in self.tables.pool.entries():
            if not self._holds(group, block, end):
                self.tables.pool.forget(block)
        for request in self._sharers:
            if request in self.running:
                self.running.remove(request)
                self.preempt(request, drop=True)
        self._sharers = []
        for request in self.running:
            if request.request_id in failed:
                request.drop_stale, request.stale = True, request.num_in_flight_tokens
                request.placeholders = request.drafts = 0
