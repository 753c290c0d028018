"""GIX: gives up first what is least worth keeping, by what was learned of its like.

Chunks are in segments, segments in classes. A class's segments are in a queue by age, so that the
least valuable is nearly always at one of its ends: the oldest, or the newest, which is what has
just been stored. To give up the newest is to refuse what comes, so that admission needs nothing
more. What is given up, or refused, stays known as a ghost for a while: it is from hits on ghosts,
too, that the learner knows how early it gave up.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import Generic

from kvtier.chunks import ChunkKey
from kvtier.tiers.base import Coming, Entry, EntryT
from kvtier.tiers.policies.classes import age_bin
from kvtier.tiers.policies.cohorts import Cohort
from kvtier.tiers.policies.learner import HazardLearner
from kvtier.tiers.policies.segments import Queue, Segment, cover, cut_below, join, split
from kvtier.tiers.policies.shades import Shade, Shades
from kvtier.tiers.policies.traits import Arrival, Traits, ending, turn_asked, turn_below

_GHOSTS = 4  # times the most chunks there were
_LOOK = 6  # segments from either end of a queue
_NEWEST_MARGIN = 1.2  # worth of a newest segment: in doubt, what has come stays

Found = tuple[float, float, tuple[int, bool], Segment[Traits]]
"""Its worth, since when it has been as it is, the end of which queue it is at, and a segment."""


class Gix(Generic[EntryT]):
    """The policy of one tenant. Its learner is shared by all tenants of a tier."""

    def __init__(self, learner: HazardLearner) -> None:
        self._learner = learner
        self._classes = learner.classes
        self._queues: dict[int, Queue[Segment[Traits]]] = {}
        self._shades: Shades[Traits] = Shades()
        self._now_s = 0.0
        self._resident = 0
        self._most = 0
        self._coming: set[int] = set()  # classes of the last arrival
        self._chosen: Segment[Traits] | None = None  # to be given up first
        self._chosen_worth = 0.0

    # ── requests ──────────────────────────────────────────────────────────────────────────────────

    def asked(self, path: Sequence[EntryT], beyond: Sequence[ChunkKey], now_s: float) -> None:
        self._tick(now_s)
        self._learner.request(self._now_s)
        self._chosen = None
        self._coming.clear()
        covered = cover(path)
        returning = self._shades.match(beyond)
        turn = turn_asked(covered, len(path), returning)
        used: list[Segment[Traits]] = []
        start = 0
        for segment, end in covered:
            traits = self._seen(
                segment.traits, end - start, turn, used[-1].traits if used else None
            )
            part = self._part(segment, path[start:end], traits)
            if used and used[-1].traits is traits:
                part = join(used.pop(), part)
            used.append(part)
            start = end
        for segment in reversed(used):  # of one class, the last of the path is the first to go
            self._queue(segment.traits.kind).append(segment)
        self._ghosts_asked(returning, turn, used[-1] if used else None)

    def _part(
        self, segment: Segment[Traits], part: Sequence[EntryT], traits: Traits
    ) -> Segment[Traits]:
        """The segment of chunks that were asked for, out of its queue, with its new traits."""
        queue = self._queues[segment.traits.kind]
        if len(part) < segment.count:
            segment = split(queue, segment, part)
        else:
            queue.remove(segment)
        segment.traits = traits
        return segment

    def _ghosts_asked(
        self, returning: list[tuple[Shade[Traits], int]], turn: int, above: Segment[Traits] | None
    ) -> None:
        last = above.traits if above is not None else None
        upper: Shade[Traits] | None = None
        for shade, ghosts in returning:
            traits = self._seen(shade.traits, ghosts, turn, last)
            part = self._shades.part(shade, ghosts, traits)
            if upper is not None and upper.traits is traits:
                part = self._shades.join(upper, part)
            elif upper is None and above is not None and above.traits is traits:
                above.shade = part
            upper, last = part, traits

    def _seen(self, old: Traits, chunks: int, turn: int, before: Traits | None) -> Traits:
        """Count a reuse, and say what the chunks are now: as those before them, if of one class."""
        gap_s = self._now_s - old.since_s
        touches = old.touches + 1
        self._learner.reused(old.kind, gap_s, chunks)
        kind = self._classes.seen(turn, touches, gap_s)  # what was said of them is used up
        if before is None or before.kind != kind:
            before = Traits(kind, self._now_s, turn, touches, self._cohort(kind))
        old.count(-chunks)
        before.count(chunks)
        return before

    def hinted(self, path: Sequence[EntryT], label: int, now_s: float) -> None:
        self._tick(now_s)
        self._chosen = None
        hinted: list[Segment[Traits]] = []
        start = 0
        for segment, end in cover(path):
            traits = self._hinted(segment.traits, end - start, label)
            if traits is not segment.traits:
                hinted.append(self._part(segment, path[start:end], traits))
            start = end
        for segment in reversed(hinted):
            self._queue(segment.traits.kind).append(segment)

    def _hinted(self, old: Traits, chunks: int, label: int) -> Traits:
        kind = self._learner.labelled(old.kind % self._classes.count, label)
        if kind == old.kind:
            return old
        traits = Traits(kind, old.since_s, old.turn, old.touches, self._cohort(kind))
        old.count(-chunks)
        traits.count(chunks)
        return traits

    def _cohort(self, kind: int) -> Cohort:
        return self._learner.cohort(kind, self._now_s)

    # ── coming and going ──────────────────────────────────────────────────────────────────────────

    def arrival(
        self, above: EntryT | None, keys: Sequence[ChunkKey], now_s: float, label: int = 0
    ) -> Arrival:
        self._tick(now_s)
        returning: list[tuple[Traits, int]] = []
        turn = 0 if above is None else turn_below(above)
        known = 0
        for shade, ghosts in self._shades.match(keys):
            known += ghosts
            returning.append((shade.traits, known))
            turn = shade.traits.turn if ghosts == len(shade.prints) else 1
        traits = None
        if known < len(keys):
            kind = self._learner.labelled(self._classes.new(turn, len(keys) - known), label)
            traits = Traits(kind, self._now_s, turn, 1, self._cohort(kind))
        self._chosen = None
        self._coming = {known.kind for known, _ in returning}
        if traits is not None:
            self._coming.add(traits.kind)
        return Arrival(above, keys, returning, traits)

    def admits(self, coming: Coming, over: EntryT) -> bool:
        arrival: Arrival = coming.arrival
        if over is arrival.deepest:
            return False  # the new chunk would hang on nothing
        segment: Segment[Traits] = over.mark
        worth = self._chosen_worth if segment is self._chosen else self._worth(segment.traits)
        if worth <= self._worth_coming(arrival, coming.place):
            return True
        self._refuse(arrival, coming.place)
        return False

    def _worth_coming(self, arrival: Arrival, place: int) -> float:
        """The best of a chunk that comes and all that is to hang on it, as a victim's would be."""
        coming = arrival.traits_from(place)
        return max(self._worth(traits) * self._margin(traits.kind) for traits in coming)

    def _margin(self, kind: int) -> float:
        """The newest of a class has one, unless it is the oldest that may go as well."""
        queue = self._queues.get(kind)
        segment = queue.oldest if queue is not None else None
        for _ in range(_LOOK):
            if segment is None:
                return 1.0
            if segment.tail.evictable:
                break
            segment = segment.newer
        return _NEWEST_MARGIN

    def _refuse(self, arrival: Arrival, place: int) -> None:
        """Know what is not let in as ghosts: it will be seen whether that was right."""
        first = max(place, arrival.known)
        if first >= arrival.refused:
            return
        traits = arrival.traits_at(first)
        shade = self._shades.refuse(arrival.keys[first : arrival.refused], traits, ending(traits))
        traits.count(arrival.refused - first)
        arrival.refused, arrival.shade = first, shade
        self._forget_ghosts()

    def added(self, entry: EntryT, coming: Coming) -> None:
        arrival: Arrival = coming.arrival
        place, segment, above = coming.place, arrival.segment, entry.above
        if segment is None or above is None or segment.tail is not above or place < arrival.known:
            segment = arrival.segment = self._segment_for(entry, above, arrival, place)
        segment.push(entry)
        segment.traits.count(1)
        arrival.deepest = entry
        if place + 1 == arrival.refused and arrival.shade is not None:
            segment.ends, segment.shade = 0, arrival.shade
        self._resident += 1
        self._most = max(self._most, self._resident)

    def _segment_for(
        self, entry: EntryT, above: Entry | None, arrival: Arrival, place: int
    ) -> Segment[Traits]:
        """Where a chunk goes that does not just follow the one before."""
        traits = arrival.traits_at(place)
        segment: Segment[Traits] | None = above.mark if above is not None else None
        if segment is not None and segment.tail is above:
            segment.ends = 0
        else:
            segment = None
        if segment is None or segment.traits is not traits:
            segment = Segment(traits)
            self._queue(traits.kind).append(segment)
        segment.ends, segment.shade = ending(traits), None
        if place < arrival.known:
            shade = self._shades.take(entry.key)
            if shade is not None:
                shade.traits.count(-1)
                segment.ends = 0 if shade.prints else shade.ends
                segment.shade = shade
        return segment

    def removed(self, entry: EntryT, *, evicted: bool) -> None:
        segment: Segment[Traits] | None = entry.mark
        if segment is None:
            return
        traits = segment.traits
        if segment.tail is not entry:
            cut_below(self._queues[traits.kind], entry)
        if evicted:
            segment.shade = self._shades.fade(entry.key, segment.shade, traits, segment.ends)
        else:
            segment.shade = None
            traits.count(-1)
        segment.ends = 0
        segment.pop()
        self._resident -= 1
        if not segment.count:
            self._drop(segment)
        self._forget_ghosts()

    def _drop(self, segment: Segment[Traits]) -> None:
        queue = self._queues[segment.traits.kind]
        queue.remove(segment)
        if queue.oldest is None:
            del self._queues[segment.traits.kind]

    def _forget_ghosts(self) -> None:
        while self._shades.ghosts > _GHOSTS * self._most:
            traits, ghosts = self._shades.forget_oldest()
            self._learner.forgotten(traits.kind, self._now_s - traits.since_s, ghosts)
            traits.count(-ghosts)

    # ── giving up ─────────────────────────────────────────────────────────────────────────────────

    def victims(self, now_s: float) -> Iterator[EntryT]:
        self._tick(now_s)
        passed: set[Segment[Traits]] = set()
        if self._chosen is not None:  # it goes until it is gone, or until there is a request
            yield from self._tails(self._chosen, passed)
        heap = self._ends(passed)
        while heap:
            self._chosen_worth, _, end, segment = heap[0]
            self._chosen = segment
            yield from self._tails(segment, passed)
            self._chosen = None
            if segment not in passed:
                heap = self._ends(passed)  # what is above the gone ones may be an end now
            elif (other := self._at(end, passed)) is not None:
                heapq.heapreplace(heap, other)
            else:
                heapq.heappop(heap)
        yield from self._others(passed)

    def _ends(self, passed: set[Segment[Traits]]) -> list[Found]:
        """A heap of what may go at the ends of the queues, but for the newest of what comes."""
        ends = [
            (kind, newest)
            for kind in self._queues
            for newest in (False, True)
            if not (newest and kind in self._coming)
        ]
        heap = [found for end in ends if (found := self._at(end, passed)) is not None]
        heapq.heapify(heap)
        return heap

    def _at(self, end: tuple[int, bool], passed: set[Segment[Traits]]) -> Found | None:
        """The first segment from an end of a queue that may go, if it is near."""
        kind, newest = end
        queue = self._queues.get(kind)
        if queue is None:
            return None
        segment = queue.newest if newest else queue.oldest
        for _ in range(_LOOK):
            if segment is None:
                return None
            if segment not in passed and segment.tail.evictable:
                worth = self._worth(segment.traits) * (_NEWEST_MARGIN if newest else 1.0)
                return worth, segment.traits.since_s, end, segment
            segment = segment.older if newest else segment.newer
        return None

    def _others(self, passed: set[Segment[Traits]]) -> Iterator[EntryT]:
        """When nothing near an end may go, all are looked at."""
        for queue in list(self._queues.values()):
            segment = queue.oldest
            while segment is not None:
                newer = segment.newer
                yield from self._tails(segment, passed)
                segment = segment.newer if segment.count else newer

    def _tails(self, segment: Segment[Traits], passed: set[Segment[Traits]]) -> Iterator[EntryT]:
        """A segment's chunks from the last one on, while they may go."""
        while segment.count and segment not in passed and segment.tail.evictable:
            entry: EntryT = segment.tail
            yield entry
            if segment.tail is entry:
                passed.add(segment)  # it was left where it is

    def reuse(self, entry: EntryT, now_s: float) -> float:
        self._tick(now_s)
        if entry.mark is None:
            return 1.0
        traits: Traits = entry.mark.traits
        return self._learner.reach[traits.kind][age_bin(self._now_s - traits.since_s)]

    def _worth(self, traits: Traits) -> float:
        return self._learner.worth[traits.kind][age_bin(self._now_s - traits.since_s)]

    def _queue(self, kind: int) -> Queue[Segment[Traits]]:
        queue = self._queues.get(kind)
        if queue is None:
            queue = self._queues[kind] = Queue()
        return queue

    def _tick(self, now_s: float) -> None:
        self._now_s = max(self._now_s, now_s)
