"""The workers in small: each step's orders and forward, on symbols, with all that can go wrong.

`choose(most)` decides: 0 is that nothing goes wrong. Whatever an offload may still read is checked
after each write, so that it does not matter when a real one would read it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from kvtier.chunks import Prefix
from kvtier.client import Held
from kvtier.connectors.vllm.lookups import Question, Secured
from kvtier.connectors.vllm.orders import LoadOrder, OffloadOrder, Run
from kvtier.connectors.vllm.parts import Part
from tests.connectors.vllm.simulated_engine import GARBAGE_TOKEN
from tests.connectors.vllm.simulated_planning import Item, Shape, Step
from tests.connectors.vllm.symbols import Kv, Memory, Symbol, after, check_chunk

Choose = Callable[[int], int]


def next_token(kv: Kv) -> int:
    """What the model says after a prefix."""
    return (kv.token * 7 + kv.depth * 3) % 5 + 900


class Store:
    """What the service holds: chunks by space and key, in RAM or on disk only."""

    def __init__(self) -> None:
        self.chunks: dict[tuple[bytes, bytes], tuple[Symbol, ...]] = {}
        self.on_disk: set[tuple[bytes, bytes]] = set()

    def leading(self, digest: bytes, prefix: Prefix, *, in_ram: bool = False) -> int:
        for count, key in enumerate(prefix):
            place = (digest, bytes(key))
            if place not in self.chunks or (in_ram and place in self.on_disk):
                return count
        return len(prefix)


class SimulatedSecured:
    """Chunks that cannot be lost any more: what the store held of them when they were secured."""

    def __init__(self, first: int, chunks: dict[bytes, list[tuple[Symbol, ...]]]) -> None:
        self.first = first
        self.chunks = chunks
        self.open = True

    @property
    def reach(self) -> int:
        return self.first + min(len(chunks) for chunks in self.chunks.values())

    def release(self) -> None:
        assert self.open, "released twice"
        self.open = False


class SimulatedLookups:
    """`Lookups` without its threads."""

    def __init__(self, store: Store, choose: Choose) -> None:
        self.connected = True
        self.secured: list[SimulatedSecured] = []
        self._store = store
        self._choose = choose
        self._open: list[Callable[[], None]] = []

    def ask(self, prefixes: Mapping[bytes, Prefix], until_s: float) -> Question:
        question = Question(prefixes, math.inf)
        self._later(lambda: self._answer(question))
        return question

    def secure(self, question: Question, first: int) -> None:
        question.ready.clear()
        self._later(lambda: self._secure(question, first))

    def release(self, secured: Secured | None) -> None:
        if secured is not None:
            secured.release()

    def _later(self, what: Callable[[], None]) -> None:
        self._open.append(what)
        if not self._choose(1):
            self.answer()

    def answer(self) -> None:
        """Answer all open questions."""
        opened, self._open = self._open, []
        for what in opened:
            what()

    def _answer(self, question: Question) -> None:
        question.held = tuple(
            Held(self._store.leading(digest, prefix),
                 self._store.leading(digest, prefix, in_ram=True))
            for digest, prefix in question.prefixes.items()
        )  # fmt: skip
        question.answered_s = math.inf
        question.ready.set()

    def _secure(self, question: Question, first: int) -> None:
        chunks = {}
        for (digest, prefix), held in zip(question.prefixes.items(), question.held, strict=True):
            wanted = prefix[first : held.chunks]
            come = self._store.leading(digest, wanted)
            come -= self._choose(come)  # too late
            chunks[digest] = [self._store.chunks[digest, bytes(key)] for key in wanted[:come]]
        self.secured.append(SimulatedSecured(first, chunks))
        if question.keep(cast("Any", self.secured[-1])):
            question.ready.set()
        else:
            self.secured[-1].release()


class Workers:
    """All ranks. `parts` are each rank's."""

    def __init__(
        self, shape: Shape, parts: Sequence[Sequence[Part]], store: Store, choose: Choose
    ) -> None:
        self.memories = [Memory(shape.block_tokens) for _ in parts]
        self.root = Kv()  # another one for other weights
        self.pending: list[OffloadOrder] = []  # offloads that may still read
        self.loading: list[LoadOrder] = []
        self.brings: int | None = None  # chunks of each load at most; None: as chosen
        self.fragile = False  # loads of what was secured may fail as well
        self.prepared: dict[str, SimulatedSecured] = {}
        self._shape = shape
        self._parts = parts
        self._store = store
        self._choose = choose
        self._tokens: dict[str, list[int]] = {}
        self._computed: dict[str, int] = {}

    def prepare(self, request: str, secured: Secured) -> None:
        """Take over what is secured for a load in line."""
        assert request not in self.prepared
        self.prepared[request] = cast("SimulatedSecured", secured)

    def holds(self, group: int, block: int, end: Kv) -> bool:
        """Whether a block holds the tokens that end with that one, on all ranks."""
        return all(memory.holds(group, block, end) for memory in self.memories)

    def execute(self, step: Step) -> None:
        """Carry a step out, in the order in which vLLM calls a worker's connector."""
        self._fence(step.orders.fence)
        for order in step.orders.loads:
            if not order.background:
                self._load_in_line(order, step)
        for item in sorted(step.items, key=lambda item: item.start):
            self._forward(item, step)
        self._load_beside(step)
        for order in step.orders.offloads:
            self._check(order)
            self.pending.append(order)
        if step.orders.confirm:
            step.report.confirmed.add(step.orders.step)
        for order in self.pending:
            self._check(order)

    # ── the forward ───────────────────────────────────────────────────────────────────────────────

    def _forward(self, item: Item, step: Step) -> None:
        request_id = item.request.request_id
        if item.renewed:
            self._tokens[request_id], self._computed[request_id] = list(item.known), item.start
        tokens, start = self._tokens[request_id], self._computed[request_id]
        path = after(self.root, tokens)
        right = self._sees_no_garbage(item, path, start)
        drafts = start + item.tokens - len(tokens)
        for _ in range(drafts):
            wrong = self._choose(1)
            path.append(path[-1].then(800 if wrong else next_token(path[-1])))
        for position in range(start, start + item.tokens):
            self._write(item, position, path[position] if right else None)
        if drafts < 0:
            self._computed[request_id] = start + item.tokens
            return
        step.generated[request_id] = self._sampled(path, len(tokens), right=right)
        tokens += step.generated[request_id]
        self._computed[request_id] = len(tokens) - 1

    def _sees_no_garbage(self, item: Item, path: Sequence[Kv], start: int) -> bool:
        for group, window in enumerate(self._shape.windows):
            first = 0 if window is None else max(0, start - window + 1)
            for memory in self.memories:
                for position in range(first, start):
                    if memory.read(group, item.tables[group], position) is not path[position]:
                        return False
        return True

    def _write(self, item: Item, position: int, kv: Symbol) -> None:
        for group, table in enumerate(item.tables):
            assert table[position // self._shape.block_tokens], "KV written to the null block"
            for memory in self.memories:
                memory.write(group, table, position, kv)

    def _sampled(self, path: Sequence[Kv], known: int, *, right: bool) -> list[int]:
        if not right:
            return [GARBAGE_TOKEN]
        sampled = []
        for kv in path[known - 1 :]:
            sampled.append(next_token(kv))
            following = path[kv.depth] if kv.depth < len(path) else None
            if following is None or following.token != sampled[-1]:
                break
        return sampled

    # ── loads ─────────────────────────────────────────────────────────────────────────────────────

    def _load_in_line(self, order: LoadOrder, step: Step) -> None:
        for rank in range(len(self._parts)):
            reached = self._load(order, rank)
            if reached < order.stop:
                step.report.failed.add(order.request)
                for run in order.runs.values():
                    for blocks in run.blocks.values():
                        lost = max(0, reached - run.first * run.prefix.chunk_tokens)
                        step.bad_blocks |= {*blocks[lost // self._shape.block_tokens :]}
        secured = self.prepared.pop(order.request, None)
        if secured is not None:
            secured.release()

    def _load_beside(self, step: Step) -> None:
        self.loading += [order for order in step.orders.loads if order.background]
        for order in [each for each in self.loading if not self._choose(1)]:
            self.loading.remove(order)
            step.finished_recving.add(order.request)
            # A list: each rank loads, whatever became of the others.
            if min([self._load(order, rank) for rank in range(len(self._parts))]) < order.stop:
                step.failed_recving.add(order.request)
                step.report.failed.add(order.request)

    def _load(self, order: LoadOrder, rank: int) -> int:
        """Load one rank's share; returns up to which token."""
        reached = order.stop
        for part in self._parts[rank]:
            run = order.runs.get(part.digest)
            if run is None:
                continue
            chunks = self._had(order, part, run)
            come = len(chunks)
            if self.brings is not None:
                come = min(come, self.brings)
            elif order.background or self.fragile:
                come -= self._choose(come)
            for index, symbols in enumerate(chunks[:come]):
                self._fill(order, part, run, index, rank, symbols)
            if come < len(run.prefix):
                chunk = run.prefix.chunk_tokens
                reached = min(reached, max(order.start, (run.first + come) * chunk))
        return reached

    def _had(self, order: LoadOrder, part: Part, run: Run) -> list[tuple[Symbol, ...]]:
        """The chunks of a run that are there to be loaded."""
        secured = self.prepared.get(order.request)
        if secured is not None and not order.background:
            assert secured.open, "loaded from what was let go of"
            first = run.first - secured.first
            return secured.chunks[part.digest][first : first + len(run.prefix)]
        there = run.prefix[: self._store.leading(part.digest, run.prefix)]
        return [self._store.chunks[part.digest, bytes(key)] for key in there]

    def _fill(
        self, order: LoadOrder, part: Part, run: Run, index: int, rank: int,
        symbols: tuple[Symbol, ...],
    ) -> None:  # fmt: skip
        chunk = run.prefix.chunk_tokens
        for group, _ in part.groups:
            for offset, kv in enumerate(symbols):
                at = index * chunk + offset
                block = run.blocks[group][at // self._shape.block_tokens]
                if block and run.first * chunk + at >= order.start:
                    self.memories[rank].write(group, run.blocks[group], at, kv)

    # ── offloads ──────────────────────────────────────────────────────────────────────────────────

    def _fence(self, number: int) -> None:
        """What may be read until now is read now, or never."""
        for order in [order for order in self.pending if order.number <= number]:
            self.settle(order)

    def settle(self, order: OffloadOrder) -> None:
        """An offload ends: with any number of leading chunks stored."""
        self._check(order)
        self.pending.remove(order)
        for rank, parts in enumerate(self._parts):
            for part in parts:
                run = order.runs.get(part.digest)
                if run is not None:
                    self._keep(order, part, run, rank)

    def _keep(self, order: OffloadOrder, part: Part, run: Run, rank: int) -> None:
        parent, chunk = (part.digest, bytes(run.prefix.parent)), run.prefix.chunk_tokens
        group = part.groups[0][0]
        for index in range(len(run.prefix) - self._choose(len(run.prefix))):
            if run.first + index and parent not in self._store.chunks:
                return
            place = (part.digest, bytes(run.prefix[index]))
            blocks = self._blocks(run, group, index)
            self._store.chunks[place] = self.memories[rank].chunk(group, blocks, chunk)
            parent = place

    def _check(self, order: OffloadOrder) -> None:
        """What an offload would read now is what it is to store."""
        for rank, parts in enumerate(self._parts):
            for part in parts:
                run = order.runs.get(part.digest)
                for index, key in enumerate(run.prefix if run is not None else ()):
                    assert run is not None
                    for group, _ in part.groups:
                        blocks = self._blocks(run, group, index)
                        chunk = run.prefix.chunk_tokens
                        symbols = self.memories[rank].chunk(group, blocks, chunk)
                        check_chunk(part.digest, key, symbols, chunk)

    def _blocks(self, run: Run, group: int, index: int) -> tuple[int, ...]:
        width = run.prefix.chunk_tokens // self._shape.block_tokens
        return run.blocks[group][index * width : (index + 1) * width]
