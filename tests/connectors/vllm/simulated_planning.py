"""How vLLM's scheduler plans a step, in small, and in which order it calls a connector for it.

After `Scheduler.schedule` in vllm/v1/core/sched/scheduler.py, and async_scheduler.py, of 0.32.
"""

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from kvtier.connectors.vllm.orders import StepOrders, StepReport
from kvtier.connectors.vllm.scheduling import Scheduling
from tests.connectors.vllm.simulated_pool import FakeRequest, Status, Tables


@dataclass(frozen=True)
class Shape:
    """How the engine is set up. `depth`: steps planned before the first one's output is seen."""

    blocks: int = 24
    block_tokens: int = 4
    windows: tuple[int | None, ...] = (None,)
    depth: int = 1
    budget: int = 24
    most_running: int = 4
    longest_prefill: int = 1000
    drafts: int = 0
    second_runner: bool = False  # resumed requests come as new ones
    mends: bool = False  # see simulated_engine.py


@dataclass
class Item:
    """One request's share of a step."""

    request: FakeRequest
    start: int
    tokens: int
    tables: list[list[int]]
    known: list[int]
    renewed: bool
    drafts: int


@dataclass
class Step:
    """A step, and once it was carried out, what came of it."""

    orders: StepOrders
    items: list[Item]
    generated: dict[str, list[int]] = field(default_factory=dict)
    bad_blocks: set[int] = field(default_factory=set)
    finished_recving: set[str] = field(default_factory=set)
    failed_recving: set[str] = field(default_factory=set)
    report: StepReport = field(default_factory=StepReport)


@dataclass
class _Draft:
    """A step while it is planned."""

    budget: int
    items: list[Item] = field(default_factory=list)
    new: list[Any] = field(default_factory=list)
    cached: list[tuple[FakeRequest, list[list[int]] | None, bool]] = field(default_factory=list)


class Planner:
    """The scheduler, as far as it plans."""

    def __init__(self, shape: Shape, scheduling: Scheduling) -> None:
        self.shape = shape
        self.scheduling = scheduling
        self.tables = Tables(shape.blocks, shape.block_tokens, shape.windows)
        self.requests: dict[str, FakeRequest] = {}
        self.waiting: deque[FakeRequest] = deque()
        self.running: list[FakeRequest] = []
        self.arrived: set[str] = set()  # background loads that ended
        self.lost: set[str] = set()  # and those of them that failed
        self.deferred: deque[tuple[int, list[int]]] = deque()
        self.planned = self.processed = 0  # steps with any tokens
        self._draft = _Draft(0)

    def plan(self) -> Step:
        """Plan a step."""
        self._draft = _Draft(self.shape.budget)
        if not self._plan_running():
            self._plan_waiting()
        orders = self.scheduling.plan(self._output())
        if self._draft.items:
            self.planned += 1
        for item in self._draft.items:
            self._advance(item)
        return Step(orders, self._draft.items)

    def _plan_running(self) -> bool:
        """Plan the running requests; whether any had to be preempted."""
        preempted, place = False, 0
        while place < len(self.running) and self._draft.budget > 0:
            request = self.running[place]
            tokens = self._new_tokens(request)
            if tokens <= 0:
                place += 1
                continue
            new = self.tables.allocate(request, tokens)
            while new is None and self._may_free(self.running[-1]):
                victim = self.running.pop()
                self.preempt(victim)
                preempted = True
                if victim is request:
                    break
                new = self.tables.allocate(request, tokens)
            if new is None:
                break
            self._draft.cached.append((request, new if any(new) else None, False))
            self._schedule(request, request.num_computed_tokens, tokens)
            place += 1
        return preempted

    def _new_tokens(self, request: FakeRequest) -> int:
        most = request.num_prompt_tokens + request.max_tokens
        computed = request.num_computed_tokens
        if request.placeholders and computed + 2 - request.placeholders >= most:
            return 0
        wanted = request.num_tokens + request.drafts + request.placeholders - computed
        return min(wanted, self._draft.budget, self.shape.longest_prefill)

    def _plan_waiting(self) -> None:
        held = [r for r in self.waiting if r.num_computed_tokens or r.status is Status.LOADING]
        for request in held + [r for r in self.waiting if r not in held]:
            if self._draft.budget <= 0 or len(self.running) >= self.shape.most_running:
                return
            if self._ready(request) and not self._admit(request):
                return

    def _ready(self, request: FakeRequest) -> bool:
        if request.status is Status.LOADING:
            if request.request_id not in self.arrived:
                return False
            self.arrived.remove(request.request_id)
            self._take_load(request)
        return not request.stale or request.drop_stale

    def _take_load(self, request: FakeRequest) -> None:
        request.status = Status.PREEMPTED if request.preemptions else Status.WAITING
        if request.request_id in self.lost:
            self.lost.remove(request.request_id)
            self.tables.pool.give_back(self.tables.take_away(request))
            return
        self.tables.enter(request, request.num_computed_tokens)
        if request.num_computed_tokens == request.num_tokens:
            request.num_computed_tokens -= 1

    def _admit(self, request: FakeRequest) -> bool:
        """Schedule a waiting request, or leave it for another step; False when there is no room."""
        local, external, background = 0, 0, False
        hit: list[list[int]] = []
        if not request.num_computed_tokens:
            local, hit = self.tables.hit(request)
            matched, background = self.scheduling.matched(request, local)
            if matched is None:
                return True
            external = matched
        computed = request.num_computed_tokens + local + external
        assert computed <= request.num_tokens
        tokens = 0
        if not background:
            tokens = min(
                request.num_tokens - computed, self._draft.budget, self.shape.longest_prefill
            )
            assert tokens > 0
        if background and not self._fits_to_its_end(request, local):
            return False
        new = self.tables.allocate(
            request, tokens, hit=hit, computed=computed, enter=not background
        )
        if new is None:
            return False
        self.scheduling.allocated(request, [list(table) for table in request.tables], external)
        request.num_computed_tokens = computed
        if background:
            request.status = Status.LOADING
        else:
            self._run(request, computed, tokens)
        return True

    def _run(self, request: FakeRequest, computed: int, tokens: int) -> None:
        self.waiting.remove(request)
        self.running.append(request)
        request.renewed = True
        if request.status is Status.PREEMPTED and not self.shape.second_runner:
            self._draft.cached.append((request, request.tables, True))
        else:
            self._draft.new.append(
                SimpleNamespace(
                    req_id=request.request_id,
                    block_ids=tuple(list(table) for table in request.tables),
                    num_computed_tokens=computed,
                )
            )
        request.status = Status.RUNNING
        self._schedule(request, computed, tokens)

    def _schedule(self, request: FakeRequest, start: int, tokens: int) -> None:
        self._draft.budget -= tokens
        drafts = max(0, start + tokens - request.num_tokens - request.placeholders)
        self._draft.items.append(
            Item(
                request, start, tokens, [list(table) for table in request.tables],
                list(request.all_token_ids), request.renewed, drafts,
            )
        )  # fmt: skip
        request.renewed, request.drafts = False, 0

    def _output(self) -> Any:
        """What the connector reads of vLLM's SchedulerOutput."""
        running = self._draft.cached
        cached = SimpleNamespace(
            req_ids=[request.request_id for request, _, _ in running],
            resumed_req_ids={request.request_id for request, _, resumed in running if resumed},
            new_block_ids=[None if new is None else tuple(map(list, new)) for _, new, _ in running],
            num_computed_tokens=[request.num_computed_tokens for request, _, _ in running],
        )
        return SimpleNamespace(
            scheduled_new_reqs=self._draft.new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={
                item.request.request_id: item.tokens for item in self._draft.items
            },
            kv_cache_block_copies=None,
            new_block_ids_to_zero=None,
            kv_connector_block_state=SimpleNamespace(
                get_block_ids=lambda request_id: tuple(map(list, self.requests[request_id].tables))
            ),
        )

    def _advance(self, item: Item) -> None:
        request = item.request
        request.num_computed_tokens += item.tokens
        request.num_in_flight_tokens += item.tokens
        request.last_step = self.planned
        if request.num_computed_tokens < request.num_tokens + request.placeholders:
            return  # it is still prefilling
        if self.shape.depth > 1:
            request.placeholders += 1 + item.drafts
        request.drafts = self.shape.drafts

    # ── blocks ────────────────────────────────────────────────────────────────────────────────────

    def _fits_to_its_end(self, request: FakeRequest, local: int) -> bool:
        """Whether all that are being loaded or prefilled, and this one, can get the blocks that
        their prompts still need: who waits for a load cannot be preempted."""
        size, groups = self.shape.block_tokens, len(self.shape.windows)
        missing = -(-(request.num_tokens - local) // size)
        for other in self.requests.values():
            if any(other.tables):
                missing += max(0, -(-other.num_tokens // size) - len(other.tables[0]))
        return missing * groups <= len(self.tables.pool.free)

    def _may_free(self, request: FakeRequest) -> bool:
        return self.shape.depth == 1 or request.last_step <= self.processed

    def free(self, request: FakeRequest) -> None:
        """Free a request's blocks once no step that is under way writes to them."""
        blocks = self.tables.take_away(request)
        if self._may_free(request):
            self.tables.pool.give_back(blocks)
        else:
            self.deferred.append((self.planned, blocks))

    def preempt(self, request: FakeRequest, *, drop: bool = False) -> None:
        """Take a running request's blocks; it starts again."""
        self.free(request)
        request.status = Status.PREEMPTED
        request.preemptions += 1
        request.num_computed_tokens = request.placeholders = request.drafts = 0
        request.drop_stale = drop or (request.drop_stale and request.stale > 0)
        request.stale = request.num_in_flight_tokens
        self.waiting.appendleft(request)
