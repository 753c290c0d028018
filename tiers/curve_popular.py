"""Which prefixes almost everybody asks for.

A chunk that stands in one request of a hundred decides more of a hit ratio than a sample by hash
can bear: whether it is in or out would shift the whole curve. Such chunks are known by counting and
are always replayed. They are the top of the prompts' tree, since a chunk is asked for at most as
often as the one before it, so a walk from the root finds them and stops at the first rare one.
"""

from collections.abc import Sequence

from kvtier.chunks import ChunkKey

_SHARE = 256  # popular: in one request of so many
_WATCHED_SHARE = 1024  # counted further down: in one of so many
_LEAST = 16  # requests, below which nothing is popular
_MOST_COUNTED = 4096
_WINDOW = 8192  # requests, after which what was counted weighs half


class Popular:
    """Counts the requests for the top of the tree, with at most 4096 counters."""

    def __init__(self) -> None:
        self._counts: dict[ChunkKey, int] = {}
        self._requests = 0

    def count(self, keys: Sequence[ChunkKey]) -> None:
        """Count a request."""
        self._requests += 1
        if self._requests >= _WINDOW or len(self._counts) >= _MOST_COUNTED:
            self._halve()
        watched = max(_LEAST // 2, self._requests // _WATCHED_SHARE)
        for key in keys:
            seen = self._counts.get(key, 0) + 1
            self._counts[key] = seen
            if seen < watched:
                break

    def run(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading chunks of a prompt are popular."""
        popular = max(_LEAST, self._requests // _SHARE)
        for place, key in enumerate(keys):
            if self._counts.get(key, 0) < popular:
                return place
        return len(keys)

    def _halve(self) -> None:
        """Forget half of the past, and all that is rare in it."""
        self._requests //= 2
        least = max(1, self._requests // _WATCHED_SHARE)
        halved = {key: seen // 2 for key, seen in self._counts.items() if seen // 2 >= least}
        if len(halved) >= _MOST_COUNTED // 2:
            kept = sorted(halved, key=halved.__getitem__, reverse=True)[: _MOST_COUNTED // 2]
            halved = {key: halved[key] for key in kept}
        self._counts = halved
