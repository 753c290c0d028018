"""What counts as a use of a prefix, so that policies see each request of an engine once.

An engine looks up, loads and offloads one prompt, often from several processes, each with a session
of its own. Calls that carry the number of one request count once: the first of them, with the keys
that it names. Of calls without a number, those that read count.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from weakref import WeakKeyDictionary

from kvtier.chunks import ChunkKey
from kvtier.service.hints import Hints
from kvtier.service.placement import Placement
from kvtier.tiers.tree import Branch, Node

# Numbers that are known in a space: more requests than engines have under way at once.
_KNOWN = 1024


class Call(Enum):
    """What a call wants of the keys it names."""

    LOOK = "look"
    READ = "read"
    STORE = "store"


class Uses:
    """Tells the policies what is used, and what the engine says of it. `on_prompt` is told of
    prompts from their first chunk on, and whether that was a use or only an offer to store."""

    def __init__(self, placement: Placement) -> None:
        self.on_prompt: Callable[[Branch, Sequence[ChunkKey], bool], None] = _tell_nobody
        self._placement = placement
        self._known: WeakKeyDictionary[Branch, dict[int, None]] = WeakKeyDictionary()

    def used(
        self,
        branch: Branch,
        run: list[Node],
        keys: Sequence[ChunkKey],
        hints: Hints,
        call: Call,
        above: Node | None = None,
    ) -> None:
        """A call names keys, of which `run` are the leading ones that are held; `above` is the
        chunk before the first key, where the call names it."""
        counts = self._is_first(branch, hints.request) if hints.request else call is Call.READ
        path = _path(run, above)
        if counts:
            self._placement.asked(branch, path, run, keys)
        if (counts or call is Call.STORE) and len(path) == len(run):
            self.on_prompt(branch, keys, counts)
        if hints.label and path:
            self._placement.hinted(path, hints.label)

    def _is_first(self, branch: Branch, request: int) -> bool:
        known = self._known.setdefault(branch, {})
        first = request not in known
        known.pop(request, None)
        known[request] = None  # the latest is forgotten last
        if len(known) > _KNOWN:
            del known[next(iter(known))]
        return first


def _path(run: list[Node], above: Node | None) -> list[Node]:
    """A held run with all that is before it, from the root on."""
    if run:
        above = run[0].parent
    return above.path() + run if above is not None else run


def _tell_nobody(branch: Branch, keys: Sequence[ChunkKey], used: bool) -> None: ...
