"""A trace: which chunks each request needs, and when it came."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival.

    Request r came at `times_s[r]` and needs the chunks `chunks[starts[r]:starts[r + 1]]`, in prompt
    order. A chunk is a number below `unique`, the same for the same tokens after the same chunks.
    `partly` [unique] says which are the unfilled ends of prompts. `stops` [requests], where the
    trace has it, says why each turn ended: 1 in a tool call, 2 of itself, 0 unknown.
    """

    name: str
    times_s: npt.NDArray[np.float64]
    starts: Ints
    chunks: Ints
    partly: npt.NDArray[np.bool_]
    stops: Ints | None = None

    @property
    def requests(self) -> int:
        return len(self.times_s)

    @property
    def references(self) -> int:
        return len(self.chunks)

    @property
    def unique(self) -> int:
        return len(self.partly)

    @cached_property
    def lengths(self) -> Ints:
        """Chunks of each request."""
        return np.diff(self.starts)

    def needs(self, request: int) -> list[int]:
        """The chunks of a request."""
        found: list[int] = self.chunks[self.starts[request] : self.starts[request + 1]].tolist()
        return found

    def following(self) -> Ints:
        """For each reference, the request that needs the same chunk next; `requests` for none."""
        of_request = np.repeat(np.arange(self.requests), self.lengths)
        order = np.argsort(self.chunks, kind="stable")
        chunk, request = self.chunks[order], of_request[order]
        following = np.full(self.references, self.requests, np.int64)
        same = chunk[1:] == chunk[:-1]
        following[order[:-1][same]] = request[1:][same]
        return following

    def misplaced(self, parent: Ints) -> int | None:
        """The first request whose chunks do not follow their parents: `parent` [unique], -1 for the
        first chunk of a prompt. None when all do."""
        before = np.empty_like(self.chunks)
        before[1:] = self.chunks[:-1]
        before[self.starts[:-1]] = -1
        wrong = np.flatnonzero(parent[self.chunks] != before)
        if not len(wrong):
            return None
        return int(np.searchsorted(self.starts, wrong[0], side="right")) - 1

    def first_parents(self) -> Ints:
        """What each chunk follows where it comes first: [unique], -1 for nothing."""
        before = np.empty_like(self.chunks)
        before[1:] = self.chunks[:-1]
        before[self.starts[:-1]] = -1
        parents = np.full(self.unique, -1, np.int64)
        found, first = np.unique(self.chunks, return_index=True)
        parents[found] = before[first]
        return parents
