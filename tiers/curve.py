"""What a tier of another size would hit, from sampled real requests.

A policy that learns has no stack distance, so the curve is replayed: small caches at a few
capacities, fed with a sample of the chunks that are asked for. That is Waldspurger, Saemundsson,
Ahmad and Park, "Cache Modeling and Optimization using Miniature Simulations", USENIX ATC 2017.
Chunks are sampled by their key as in SHARDS (Waldspurger, Park, Garthwaite and Ahmad, USENIX FAST
2015): a chunk is in for good or out for good, and one that is in stands for 1/rate of them. A
prompt's sampled chunks stay in prompt order, so each part of a prompt has its share in the sample,
and the first one that is missing tells where the prefix breaks off.

Two things differ from there:

- What almost everybody asks for is always replayed, see `curve_popular.py`; SHARDS-adj corrects for
  such chunks afterwards, and takes all of them for hits.
- The rate is not lowered as the sample grows: a policy cannot forget every other chunk. It is
  chosen so that the largest capacity fits in the bound on the sample, and a small cache is replayed
  in full. Where that does not hold, the rate is halved and the replays start anew.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvtier.chunks import ChunkKey
from kvtier.tiers.curve_replay import MakeFamily, Replay

# Of popular chunks every fourth is replayed, for itself and the three that follow it.
_STRIDE = 4
_MOST_AT_ONCE = 2048  # sampled chunks of one prompt: what follows would hold up our thread
_ASK = 32  # what a request costs a replay besides, in sampled chunks
_LEARN = 1024  # what a fit costs, likewise
_WINDOW = 1 << 17  # requests, after which what was counted weighs half
_HASH_BYTES = 8  # the last ones of a key: policies tell ghosts apart by the first
_FINEST, _COARSEST = 0, 40  # rates are 2 to the power of minus these


@dataclass(frozen=True, slots=True)
class Point:
    """The hit percentage of requested chunks that a capacity would have had."""

    capacity_bytes: int
    hit_percent: float


@dataclass(frozen=True, slots=True)
class Request:
    """Keys in prompt order, from the prompt's first full chunk on. With `reads` they are asked for,
    and then stored; without, they are offered and stored."""

    chunk_bytes: int
    keys: Sequence[ChunkKey]
    now_s: float
    reads: bool = True


class Curve:
    """The hit ratios of several capacities for one stream of requests.

    The rate is such that the largest capacity has room for `most_chunks` sampled chunks; no replay
    ever holds more than twice as many, and one prompt's.
    """

    def __init__(
        self, capacities: Sequence[int], make_family: MakeFamily, most_chunks: int
    ) -> None:
        self._capacities = sorted(set(capacities))
        self._make_family = make_family
        self._most_chunks = most_chunks
        self._shift = _FINEST
        self._start()

    def _start(self) -> None:
        weight = 1 << self._shift
        self._replays = [Replay(nbytes, self._make_family(weight)) for nbytes in self._capacities]
        self._tally = _Tally(len(self._replays))
        self._bound = ((1 << 8 * _HASH_BYTES) - 1 >> self._shift).to_bytes(_HASH_BYTES, "big")

    def steps(self, request: Request, popular: int) -> Iterator[int]:
        """Replay a request, of whose chunks almost everybody asks for the first `popular`. Yields
        after each small piece of work: its cost, in sampled chunks."""
        self._fit(request.chunk_bytes)
        prompt = request.keys[: _MOST_AT_ONCE << self._shift]
        if not self._shift:
            popular = 0  # everything is replayed
        marks, sample = prompt[:popular:_STRIDE], self._sample(prompt[popular:])
        tally, keys = self._tally, [*marks, *sample]
        if request.reads:
            tally.ask(len(prompt), popular, len(sample))
        if not keys:
            return
        sizes = [_STRIDE * request.chunk_bytes] * len(marks)
        sizes += [request.chunk_bytes << self._shift] * len(sample)
        for place, replay in enumerate(self._replays):
            if request.reads:
                hits = replay.ask(keys, sizes, request.now_s)
                tally.popular_hits[place] += min(popular, _STRIDE * hits)
                tally.sampled_hits[place] += max(0, hits - len(marks))
            else:
                replay.offer(keys, sizes, request.now_s)
            yield _ASK + len(keys)
            if replay.learner.due:
                replay.learner.learn()
                yield _LEARN
        if self.most_held > 2 * self._most_chunks:
            self.coarsen()

    def _fit(self, nbytes: int) -> None:
        """Before anything is sampled: choose the rate."""
        if self._tally.requests or self._shift:
            return
        chunks = self._capacities[-1] // nbytes
        while chunks >> self._shift > self._most_chunks and self._shift < _COARSEST:
            self._shift += 1
        self._start()

    def _sample(self, keys: Sequence[ChunkKey]) -> Sequence[ChunkKey]:
        """The keys that are in: their last bytes start with so many bits of 0."""
        if not self._shift:
            return keys
        bound = self._bound
        return [key for key in keys if key[-_HASH_BYTES:] <= bound]

    def coarsen(self) -> None:
        """Halve the rate, for half of the work and half of the memory, and start anew."""
        self._shift = min(self._shift + 1, _COARSEST)
        self._start()

    @property
    def rate(self) -> float:
        """The share of chunks that are replayed, 0 to 1."""
        return 0.5**self._shift

    @property
    def requests(self) -> int:
        """How many the curve stands on; old ones count half, and half of that."""
        return self._tally.requests

    @property
    def sampled_chunks(self) -> int:
        """References to sampled chunks that the curve stands on."""
        return round(self._tally.sampled)

    @property
    def seen_bytes(self) -> int:
        """What the largest capacity would hold now: no curve can tell of more."""
        return self._replays[-1].used_bytes

    @property
    def most_held(self) -> int:
        """Chunks in the replay that holds most."""
        return max(map(len, self._replays))

    def points(self) -> list[Point]:
        """The curve at the capacities that are replayed, smallest first."""
        return [
            Point(nbytes, self._tally.hit_percent(place))
            for place, nbytes in enumerate(self._capacities)
        ]


class _Tally:
    """What was asked for, and how much of it each of several capacities had."""

    def __init__(self, capacities: int) -> None:
        self.requests = 0
        self._asked = 0.0
        self._popular = 0.0
        self.sampled = 0.0
        self.popular_hits = [0.0] * capacities
        self.sampled_hits = [0.0] * capacities

    def ask(self, asked: int, popular: int, sampled: int) -> None:
        """Count a request, before its hits."""
        if self.requests == _WINDOW:
            self._halve()
        self.requests += 1
        self._asked += asked
        self._popular += popular
        self.sampled += sampled

    def _halve(self) -> None:
        self.requests //= 2
        self._asked /= 2
        self._popular /= 2
        self.sampled /= 2
        self.popular_hits = [hits / 2 for hits in self.popular_hits]
        self.sampled_hits = [hits / 2 for hits in self.sampled_hits]

    def hit_percent(self, place: int) -> float:
        """Of popular chunks the hits are counted; of the rest, the sample's share is taken."""
        if not self._asked:
            return 0.0
        rare = self._asked - self._popular
        share = self.sampled_hits[place] / self.sampled if self.sampled else 0.0
        return 100 * (self.popular_hits[place] + rare * share) / self._asked
