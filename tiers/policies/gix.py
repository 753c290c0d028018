"""GIX: gives up first what is least worth keeping, by what was learned of its like.

Chunks are in segments, segments in classes. A class's segments are in a queue by age, so that the
least valuable is nearly always at one of its ends: the oldest, or the newest, which is what has
just been stored. To give up the newest is to refuse what comes, so that admission needs nothing
more. What is given up, or refused, stays known as a ghost for a while: it is from hits on ghosts,
too, that the learner knows how early it gave up.
"""

import heapq
from collections.abc import Iterator, Sequence
from math import inf
from typing import Generic

from kvtier.chunks import ChunkKey
from kvtier.tiers.base import Coming, Entry, EntryT
from kvtier.tiers.policies.arrivals import Arrival, turn_asked, turn_below
from kvtier.tiers.policies.classes import age_bin
from kvtier.tiers.policies.learner import HazardLearner
from kvtier.tiers.policies.segments import Queue, Segment, cover, cut_below, join, split
from kvtier.tiers.policies.shades import Shade, Shades
from kvtier.tiers.policies.traits import Traits, ending

_GHOSTS = 4  # times the most chunks there were
_LOOK = 6  # segments from either end of a queue
_NEWEST_MARGIN = 1.2  # worth of a newest segment: in doubt, what has come stays
_STANDS_S = 1.0  # a choice, unless there is a request: ages have hardly changed

Found = tuple[float, float, tuple[int, bool], Segment[Traits]]
"""Its worth, since when it has been as it is, the end of which queue it is at, and a segment."""


class Gix(Generic[EntryT]):
    """The policy of one tenant. Its learner is shared by all tenants of a tier."""

    def __init__(self, learner: HazardLearner) -> None:
        self._learner = learner
        self._classes = learner.classes
        self._queues: dict[int, Queue[Segment[Traits]]] = {}
        self._shades = Shades(self._forgotten)
        self._now_s = 0.0
        self._resident = 0
        self._most = 0
        self._coming = frozenset[int]()  # classes of the last arrival
        self._chosen: Segment[Traits] | None = None  # what was offered last,
        self._chosen_worth = 0.0  # with its margin; it is to go on to be offered
        self._chosen_until_s = -inf  # then, unless what was offered before it is still there

    # ── requests ──────────────────────────────────────────────────────────────────────────────────

    def asked(self, path: Sequence[EntryT], beyond: Sequence[ChunkKey], now_s: float) -> None:
        self._tick(now_s)
        self._learner.request(self._now_s)
        self._chosen = None
        self._coming = frozenset()
        covered = cover(path)
        returning = self._shades.match(beyond)
        turn = turn_asked(covered, len(path), returning)
        used: list[Segment[Traits]] = []
        start = 0
        for segment, end in covered:
            traits = self._seen(
                segment.traits, end - start, turn, used[-1].traits if used else None
            )
            part = self._part(segment, path, start, end)
            part.traits = traits
            if used and used[-1].traits is traits:
                part = join(used.pop(), part)
            used.append(part)
            start = end
        for segment in reversed(used):  # of one class, the last of the path is the first to go
            self._queue(segment.traits.kind).append(segment)
        self._ghosts_asked(returning, turn, used[-1] if used else None)

    def _part(
        self, segment: Segment[Traits], path: Sequence[EntryT], start: int, end: int
    ) -> Segment[Traits]:
        """The segment of a part of a path, in no queue: of a segment's leading chunks."""
        if end - start < segment.count:
            return split(self._queues[segment.traits.kind], segment, path[start:end])
        self._drop(segment)
        return segment

    def _ghosts_asked(
        self, returning: list[tuple[Shade, int]], turn: int, above: Segment[Traits] | None
    ) -> None:
        last = above.traits if above is not None else None
        upper: Shade | None = None
        for shade, ghosts in returning:
            if ghosts > shade.count:  # one that was parted just now has pushed it out
                break
            traits = self._seen(shade.traits, ghosts, turn, last)
            part = self._shades.part(shade, ghosts, traits)
            if traits is last:
                if upper is not None:
                    part = self._shades.join(upper, part)
                elif above is not None:
                    above.shade = part
            upper, last = part, traits

    def _seen(self, old: Traits, chunks: int, turn: int, before: Traits | None) -> Traits:
        """Count a reuse, and say what the chunks are now: as those before them, if of one class."""
        gap_s = self._now_s - old.since_s
        touches = old.touches + 1
        self._learner.reused(old.kind, gap_s, chunks)
        kind = self._classes.seen(turn, touches, gap_s)  # what was said of them is used up
        if before is None or before.kind != kind:
            before = Traits(kind, self._now_s, touches, turn)
        self._turned(old, before, chunks)
        return before

    def hinted(self, path: Sequence[EntryT], label: int, now_s: float) -> None:
        self._tick(now_s)
        self._chosen = None
        hinted: list[Segment[Traits]] = []
        start = 0
        for segment, end in cover(path):
            old = segment.traits
            kind = self._learner.labelled(old.kind % self._classes.count, label)
            if kind != old.kind:
                traits = old._replace(kind=kind)
                self._turned(old, traits, end - start)
                hinted.append(self._part(segment, path, start, end))
                hinted[-1].traits = traits
            start = end
        for segment in reversed(hinted):
            self._queue(segment.traits.kind).append(segment)

    def _ghosts_hinted(self, shade: Shade, ghosts: int, label: int) -> Traits:
        """What is said of chunks that come holds for ghosts that they are, too. The request for
        them has parted a shade of which it wants less than all."""
        old = shade.traits
        kind = self._learner.labelled(old.kind % self._classes.count, label)
        if kind == old.kind or ghosts < shade.count:
            return old
        traits = shade.traits = old._replace(kind=kind)
        self._turned(old, traits, ghosts)
        return traits

    def _turned(self, old: Traits, new: Traits, chunks: int) -> None:
        """So many chunks wait as something else."""
        self._wait(old, -chunks)
        self._wait(new, chunks)

    def _wait(self, traits: Traits, change: int) -> None:
        self._learner.wait(traits.kind, traits.since_s, change)

    # ── coming and going ──────────────────────────────────────────────────────────────────────────

    def arrival(
        self, above: EntryT | None, keys: Sequence[ChunkKey], now_s: float, label: int = 0
    ) -> Arrival:
        self._tick(now_s)
        returning: list[tuple[Traits, int]] = []
        turn = 0 if above is None else turn_below(above)
        known = 0
        for shade, ghosts in self._shades.match(keys):
            traits = self._ghosts_hinted(shade, ghosts, label) if label else shade.traits
            known += ghosts
            returning.append((traits, known))
            turn = traits.turn if ghosts == shade.count else 1
        fresh = None
        if known < len(keys):
            kind = self._learner.labelled(self._classes.new(turn, len(keys) - known), label)
            fresh = Traits(kind, self._now_s, 1, turn)
        arrival = Arrival(above, keys, returning, fresh)
        self._chosen = None
        self._coming = arrival.kinds
        return arrival

    def admits(self, coming: Coming, over: EntryT) -> bool:
        arrival: Arrival = coming.arrival
        if over is arrival.deepest:
            return False  # the new chunk would hang on nothing
        segment: Segment[Traits] = over.mark
        worth = self._chosen_worth if segment is self._chosen else self._worth(segment.traits)
        best = arrival.best_from(coming.place, self._worth)  # with all that is to hang on it
        if worth <= self._worth(best) * self._margin(best.kind):
            return True
        self._refuse(arrival, coming.place)
        return False

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
        self._wait(traits, arrival.refused - first)
        arrival.refused, arrival.shade = first, shade
        self._forget_ghosts()

    def added(self, entry: EntryT, coming: Coming) -> None:
        arrival: Arrival = coming.arrival
        place, segment, above = coming.place, arrival.segment, entry.above
        if segment is None or above is None or segment.tail is not above or place < arrival.known:
            segment = arrival.segment = self._segment_for(entry, above, arrival, place)
        segment.push(entry)
        self._wait(segment.traits, 1)
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
        if segment is None or not self._continues(segment, traits):
            segment = Segment(traits)
            self._queue(traits.kind).append(segment)
        segment.ends, segment.shade = ending(traits), None
        if place < arrival.known:
            shade = self._shades.take(entry.key)
            if shade is not None:
                self._wait(shade.traits, -1)
                segment.ends = 0 if shade.prints else shade.ends
                segment.shade = shade
        return segment

    def _continues(self, segment: Segment[Traits], traits: Traits) -> bool:
        """Whether chunks of these traits are of the segment that they come below. It is renewed by
        more of its turn: what an engine stores block by block, as it decodes, it goes on using."""
        old = segment.traits
        if traits == old:
            return True
        if old.since_s > traits.since_s or old != traits._replace(since_s=old.since_s):
            return False
        queue = self._queue(old.kind)
        queue.remove(segment)
        queue.append(segment)
        segment.traits = traits
        self._turned(old, traits, segment.count)
        return True

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
            self._wait(traits, -1)
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
            self._shades.forget_oldest()

    def _forgotten(self, traits: Traits, ghosts: int) -> None:
        self._learner.forgotten(traits.kind, self._now_s - traits.since_s, ghosts)
        self._wait(traits, -ghosts)

    def closed(self) -> None:
        """Its ghosts are forgotten: they do not wait for ever in what all tenants learn from."""
        while self._shades.ghosts:
            self._shades.forget_oldest()

    # ── giving up ─────────────────────────────────────────────────────────────────────────────────

    def victims(self, now_s: float) -> Iterator[EntryT]:
        self._tick(now_s)
        passed: set[Segment[Traits]] = set()
        if self._chosen is not None and self._now_s <= self._chosen_until_s:
            yield from self._tails(self._chosen, passed)
        for but in (self._coming, frozenset[int]()):  # the newest of what comes is the last to go
            yield from self._from_ends(but, passed)
        yield from self._others(passed)

    def _from_ends(self, but: frozenset[int], passed: set[Segment[Traits]]) -> Iterator[EntryT]:
        """What may go near the ends of the queues, the least worth first, but for the newest of
        some classes."""
        heap = self._ends(but, passed)
        while heap:
            self._chosen_worth, _, end, segment = heap[0]
            self._chosen = segment
            self._chosen_until_s = -inf if passed else self._now_s + _STANDS_S
            yield from self._tails(segment, passed)
            self._chosen = None
            if segment not in passed:
                heap = self._ends(but, passed)  # what is above the gone may be an end now
            elif (other := self._at(end, passed)) is not None:
                heapq.heapreplace(heap, other)
            else:
                heapq.heappop(heap)

    def _ends(self, but: frozenset[int], passed: set[Segment[Traits]]) -> list[Found]:
        """A heap of the ends of the queues."""
        ends = [
            (kind, newest)
            for kind in self._queues
            for newest in (False, True)
            if not (newest and kind in but)
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
        return self._reach(entry.mark.traits)

    def label(self, entry: EntryT) -> int:
        segment: Segment[Traits] | None = entry.mark
        return segment.traits.kind // self._classes.count if segment is not None else 0

    def likely(self, coming: Coming) -> float:
        arrival: Arrival = coming.arrival
        return self._reach(arrival.traits_at(coming.place))

    def _reach(self, traits: Traits) -> float:
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
