"""vLLM's block pool and block tables, as far as a connector can tell: KVCacheManager in small."""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from tests.connectors.vllm.symbols import Kv, after


class Status(Enum):
    WAITING = auto()
    LOADING = auto()  # vLLM's WAITING_FOR_REMOTE_KVS
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


@dataclass(eq=False)
class FakeRequest:
    """vLLM's Request, with its block tables. Fields that vLLM has too have vLLM's names."""

    request_id: str
    all_token_ids: list[int]
    num_prompt_tokens: int
    max_tokens: int
    skip_reading_prefix_cache: bool = False
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    placeholders: int = 0
    stale: int = 0
    drop_stale: bool = False
    drafts: int = 0
    status: Status = Status.WAITING
    tables: list[list[int]] = field(default_factory=list)
    hashed: list[int] = field(default_factory=list)  # blocks entered in the prefix cache
    last_step: int = 0
    preemptions: int = 0
    renewed: bool = True  # the worker starts from the scheduler's tokens

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens


class Pool:
    """Blocks with reference counts; block 0 is the null block. A free block keeps its content and
    its entry in the prefix cache until it is handed out again."""

    def __init__(self, blocks: int) -> None:
        self.free = deque(range(1, blocks))
        self._users: Counter[int] = Counter()
        self._cached: dict[tuple[int, Kv], int] = {}
        self._entries: dict[int, tuple[int, Kv]] = {}

    def take(self) -> int:
        block = self.free.popleft()
        self.forget(block)
        self._users[block] = 1
        return block

    def idle(self, block: int) -> bool:
        return not self._users[block]

    def share(self, block: int) -> None:
        if self.idle(block):
            self.free.remove(block)
        self._users[block] += 1

    def give_back(self, blocks: Iterable[int]) -> None:
        for block in filter(None, blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0
            if not self._users[block]:
                self.free.append(block)

    def users(self, block: int) -> int:
        return self._users[block]

    def enter(self, group: int, kv: Kv, block: int) -> None:
        if (group, kv) not in self._cached:
            self._cached[group, kv] = block
            self._entries[block] = (group, kv)

    def find(self, group: int, kv: Kv) -> int | None:
        return self._cached.get((group, kv))

    def forget(self, block: int) -> None:
        entry = self._entries.pop(block, None)
        if entry is not None:
            del self._cached[entry]

    def entries(self) -> list[tuple[int, int, Kv]]:
        """Block, group and last token of each block in the prefix cache."""
        return [(block, group, end) for block, (group, end) in self._entries.items()]


class Tables:
    """Gives requests their blocks. `windows` has the window of each group, None for all tokens."""

    def __init__(self, blocks: int, block_tokens: int, windows: Sequence[int | None]) -> None:
        self.pool = Pool(blocks)
        self.block_tokens = block_tokens
        self.windows = tuple(windows)
        self.root = Kv()

    def hit(self, request: FakeRequest) -> tuple[int, list[list[int]]]:
        """The longest prefix that is cached, and its blocks. One token stays to be computed."""
        ends = after(self.root, request.all_token_ids)[self.block_tokens - 1 :: self.block_tokens]
        for blocks in range((request.num_tokens - 1) // self.block_tokens, 0, -1):
            found = [self._hit(group, ends[:blocks]) for group in range(len(self.windows))]
            if None not in found:
                return blocks * self.block_tokens, [each for each in found if each is not None]
        return 0, [[] for _ in self.windows]

    def _hit(self, group: int, ends: Sequence[Kv]) -> list[int] | None:
        found = []
        for place, kv in enumerate(ends):
            if self._skipped(group, place, len(ends) * self.block_tokens):
                found.append(0)
                continue
            block = self.pool.find(group, kv)
            if block is None:
                return None
            found.append(block)
        return found

    def _skipped(self, group: int, place: int, computed: int) -> bool:
        """Whether no token after `computed` ones sees this block any more."""
        window = self.windows[group]
        return window is not None and (place + 1) * self.block_tokens <= computed - window + 1

    def drop_skipped(self, request: FakeRequest, computed: int) -> None:
        for group, table in enumerate(request.tables):
            for place, block in enumerate(table):
                if block and self._skipped(group, place, computed):
                    table[place] = 0
                    self.pool.give_back([block])

    def allocate(
        self,
        request: FakeRequest,
        new_tokens: int,
        *,
        hit: Sequence[Sequence[int]] = (),
        computed: int | None = None,
        enter: bool = True,
    ) -> list[list[int]] | None:
        """Room for `new_tokens` after the first `computed`; the new blocks, or None for no room."""
        if computed is None:
            computed = request.num_computed_tokens
        if not request.tables:
            request.tables = [[] for _ in self.windows]
            request.hashed = [0] * len(self.windows)
        self.drop_skipped(request, max(0, computed - request.num_in_flight_tokens))
        wanted = -(-(computed + new_tokens) // self.block_tokens)
        sources = [
            [
                self._source(group, place, computed, hit)
                for place in range(len(request.tables[group]), wanted)
            ]
            for group in range(len(self.windows))
        ]
        flat = [source for each in sources for source in each]
        touched = {source for source in flat if source and self.pool.idle(source)}
        if flat.count(None) + len(touched) > len(self.pool.free):
            return None
        for source in flat:
            if source:
                self.pool.share(source)
        new = [[self.pool.take() if s is None else s for s in each] for each in sources]
        for table, blocks in zip(request.tables, new, strict=True):
            table.extend(blocks)
        if enter:
            self.enter(request, min(computed + new_tokens, request.num_tokens))
        return new

    def _source(
        self, group: int, place: int, computed: int, hit: Sequence[Sequence[int]]
    ) -> int | None:
        """A block to be shared, 0 for none needed, or None for a new one."""
        if place * self.block_tokens < computed and self._skipped(group, place, computed):
            return 0
        return hit[group][place] if hit and place < len(hit[group]) else None

    def enter(self, request: FakeRequest, tokens: int) -> None:
        """Enter the full blocks of the first `tokens` tokens in the prefix cache."""
        ends = after(self.root, request.all_token_ids)[self.block_tokens - 1 :: self.block_tokens]
        for group, table in enumerate(request.tables):
            full = tokens // self.block_tokens
            for place in range(request.hashed[group], full):
                if table[place]:
                    self.pool.enter(group, ends[place], table[place])
            request.hashed[group] = max(request.hashed[group], full)

    def take_away(self, request: FakeRequest) -> list[int]:
        """A request's blocks, no longer its own, in the order in which they are to be freed."""
        blocks = [block for table in request.tables for block in reversed(table)]
        request.tables, request.hashed = [], []
        return blocks
