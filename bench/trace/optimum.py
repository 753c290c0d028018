"""MIN: the most chunks that any policy could have served (Belady, 1966).

What is used again latest goes first, and what comes may be refused. A chunk is used again no later
than what continues it, so that the order keeps prefixes whole; and what waits for one request is
the leading part of that. So chunks need no names: a count for each request is exact.
"""

import heapq

import numpy as np

from kvtier.bench.trace.requests import Trace


class Optimum:
    """Prepared once for a trace, asked for each capacity."""

    def __init__(self, trace: Trace) -> None:
        following = trace.following()
        is_first = np.zeros(trace.references, np.bool_)
        is_first[trace.starts[:-1]] = True
        is_first[1:] |= following[1:] != following[:-1]
        firsts = np.flatnonzero(is_first)
        counts = np.diff(np.append(firsts, trace.references))
        requests = np.searchsorted(trace.starts, firsts, side="right") - 1
        again = following[firsts] < trace.requests
        self._requests = trace.requests
        self._runs = np.stack([requests, following[firsts], counts])[:, again].T.tolist()

    def hits(self, capacity: int) -> int:
        """Chunks served with room for so many."""
        waiting = [0] * self._requests  # chunks held, by the request that uses them next
        latest: list[int] = []  # a heap of those requests, negated
        hits = used = current = 0
        for request, following, count in self._runs:
            while current <= request:
                hits += waiting[current]
                used -= waiting[current]
                waiting[current] = 0
                current += 1
            if not waiting[following]:
                heapq.heappush(latest, -following)
            waiting[following] += count
            used += count
            while used > capacity:
                last = -latest[0]
                gone = min(waiting[last], used - capacity)
                waiting[last] -= gone
                used -= gone
                if not waiting[last]:
                    heapq.heappop(latest)
        return hits + sum(waiting[current:])
