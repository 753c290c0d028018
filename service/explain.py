"""Why a key is or is not a hit."""

import time
from collections.abc import Sequence

from kvtier.chunks import ChunkKey, chain
from kvtier.service.answers import Explanation, KeyState
from kvtier.service.history import History, Loss
from kvtier.spaces import Space
from kvtier.tiers.index import Branch, Index, TierId

_LOST = {
    Loss.EVICTED: KeyState.EVICTED,
    Loss.CORRUPT: KeyState.CORRUPT,
    Loss.EXPIRED: KeyState.EXPIRED,
}


class Explainer:
    """Answers from the index and the history; changes neither."""

    def __init__(self, index: Index, history: History) -> None:
        self._index = index
        self._history = history

    def explain(
        self, branch: Branch, keys: Sequence[ChunkKey], token_ids: bytes, extras: Sequence[bytes]
    ) -> list[Explanation]:
        """One answer per key. `token_ids` is the prompt from its start as packed u32, or empty."""
        answers = [self._here(branch, key) or self._lost(branch, key) for key in keys]
        missing = next((i for i, answer in enumerate(answers) if answer is None), None)
        if missing is None:
            return [answer for answer in answers if answer is not None]
        elsewhere = self._elsewhere(branch.space, token_ids, extras)
        unknown = elsewhere or self._never_stored(branch, keys, missing)
        return [answer or unknown for answer in answers]

    def _here(self, branch: Branch, key: ChunkKey) -> Explanation | None:
        node = branch.nodes.get(key)
        if node is None:
            return None
        if node.ready(TierId.CPU):
            return Explanation(KeyState.RAM, "held in RAM")
        if node.ready(TierId.GPU):
            return Explanation(KeyState.VRAM, "held in VRAM")
        if node.ready(TierId.DISK):
            return Explanation(KeyState.DISK, "held on disk")
        if node.replicas[TierId.CPU]:
            return Explanation(KeyState.BEING_WRITTEN, "reserved and not committed yet")
        return None

    def _lost(self, branch: Branch, key: ChunkKey) -> Explanation | None:
        record = self._history.find(branch.digest, key)
        if record is None:
            return None
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.when_s))
        state = _LOST[record.loss]
        return Explanation(state, f"{record.loss.value} at {when}: {record.detail}")

    def _elsewhere(
        self, space: Space, token_ids: bytes, extras: Sequence[bytes]
    ) -> Explanation | None:
        """The nearest space that holds the prompt. What another tenant holds is not disclosed: of
        such a space only its existence is told, and only where nothing but the tenant differs: any
        other one explains nothing."""
        if self._holds(space, token_ids, extras):
            return None  # the prompt parts from what is stored here: that says why
        found: list[tuple[int, str, list[str]]] = []
        for other in self._index.spaces:
            fields = space.differing_fields(other)
            if not fields:
                continue
            if fields == ["tenant"]:
                detail = "a space of another tenant exists; what it holds is not disclosed"
                found.append((2 * len(fields) + 1, detail, fields))
            elif "tenant" not in fields and self._holds(other, token_ids, extras):
                detail = "the prompt's first chunk is held in a space that differs"
                found.append((2 * len(fields), detail, fields))
        if not found:
            return None
        _, detail, fields = min(found)
        return Explanation(
            KeyState.OTHER_SPACE, f"{detail} in {', '.join(sorted(fields))}", tuple(sorted(fields))
        )

    def _holds(self, other: Space, token_ids: bytes, extras: Sequence[bytes]) -> bool:
        branch = self._index.known(other.digest)
        width = 4 * other.layout.tokens
        first = chain(
            other.digest, token_ids[:width], other.layout.tokens, extras[0] if extras else b""
        )
        return branch is not None and any(
            (node := branch.nodes.get(key)) is not None and node.held for key in first
        )

    def _never_stored(self, branch: Branch, keys: Sequence[ChunkKey], first: int) -> Explanation:
        detail = "no chunk of this space was stored under this key"
        above = branch.nodes.get(keys[first - 1]) if first else None
        if above is not None and above.first_child is not None:
            detail += f"; stored prompts part from this one in chunk {first}"
        return Explanation(KeyState.NEVER_STORED, detail)
