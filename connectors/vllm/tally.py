"""Counts of what the connector did, taken at intervals by the engine's statistics."""

import threading
from collections import Counter

COUNTS = {
    "lookups": "Requests for which the service was asked what it holds.",
    "ask_again": "Times that a request was left for a later step, as the answer was not there yet.",
    "late_lookups": "Requests computed as the answer or the promotion from disk came too late.",
    "loads": "Loads started.",
    "failed_loads": "Loads that did not bring all they should have; the rest was computed.",
    "loaded_chunks": "Chunks copied into the engine's blocks.",
    "loaded_bytes": "Bytes copied into the engine's blocks.",
    "load_seconds": "Seconds from a load's start to its end.",
    "offloaded_chunks": "Chunks stored.",
    "offloaded_bytes": "Bytes stored.",
    "existing_chunks": "Chunks that the service already held when they were offered.",
    "refused_chunks": "Chunks that were not stored: no room, no service, too late.",
    "fenced_offloads": "Offloads given up because the engine needed their blocks.",
}
"""Every count and what it counts."""


class Tally:
    """Counts since they were last taken. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, **counts: float) -> None:
        """Add to counts by their names in COUNTS."""
        with self._lock:
            for name, value in counts.items():
                assert name in COUNTS, name
                self._counts[name] += value  # type: ignore[assignment]

    def take(self) -> dict[str, float]:
        """All counts that are not 0; they start again."""
        if not self._counts:
            return {}
        with self._lock:
            taken, self._counts = self._counts, Counter()
        return {name: value for name, value in taken.items() if value}
