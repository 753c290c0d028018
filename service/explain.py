"""Why a key is or is not a hit."""

import time
from collections.abc import Sequence
from dataclasses import replace

from kvtier.chunks import ChunkKey, chain
from kvtier.config import Config
from kvtier.service.answers import Explanation, KeyState
from kvtier.service.history import History, Loss, Why
from kvtier.spaces import Space
from kvtier.tiers.index import Index
from kvtier.tiers.tree import Branch, TierId

_STATES = {
    Why.ROOM: KeyState.EVICTED,
    Why.SHARE: KeyState.EVICTED,
    Why.OWN_QUOTA: KeyState.EVICTED,
    Why.LAYOUT: KeyState.EVICTED,
    Why.REMOVED: KeyState.EVICTED,
    Why.CHECKSUM: KeyState.CORRUPT,
    Why.VANISHED: KeyState.CORRUPT,
    Why.AGE: KeyState.EXPIRED,
    Why.NO_ROOM: KeyState.REFUSED,
    Why.NOT_WORTH: KeyState.REFUSED,
    Why.LEASE_LIMIT: KeyState.REFUSED,
    Why.PARENT_MISSING: KeyState.REFUSED,
    Why.QUOTA: KeyState.QUOTA,
    Why.NOT_COMMITTED: KeyState.NEVER_STORED,
    Why.CRASH: KeyState.LOST_IN_CRASH,
}


class Explainer:
    """Answers from the index and the history; changes neither. `config` names the rules."""

    def __init__(self, index: Index, history: History, config: Config) -> None:
        self._index = index
        self._history = history
        self._config = config

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
        if node.in_cpu:
            return Explanation(KeyState.BEING_WRITTEN, "reserved and not committed yet")
        return None

    def _lost(self, branch: Branch, key: ChunkKey) -> Explanation | None:
        lost = self._history.find(branch.digest, key)
        if lost is None:
            return None
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(lost.when_s))
        detail = f"{self._sentence(lost.loss)} ({when})"
        return Explanation(_STATES[lost.loss.why], detail)

    def _sentence(self, loss: Loss) -> str:
        """What became of a chunk, with the settings that had a say in it."""
        state = _STATES[loss.why]
        if state is KeyState.EVICTED and loss.why is not Why.REMOVED:
            return self._eviction(loss)
        if state in {KeyState.REFUSED, KeyState.QUOTA}:
            return f"refused: {self._refusal(loss.why)}"
        sentence = {
            Why.REMOVED: "removed: a client asked for it with Evict",
            Why.CHECKSUM: "removed: its checksum on disk was wrong",
            Why.VANISHED: "removed: the tier that had it lost it",
            Why.AGE: f"expired: older than retention.ttl_s = {self._config.retention.ttl_s:g}",
            Why.NOT_COMMITTED: (
                "reserved and never committed: its client gave it up, ran into its deadline or died"
            ),
            Why.CRASH: (
                "committed, and not on disk yet when the service ended:"
                f" disk.write = {self._config.disk.write}"
            ),
        }[loss.why]
        return f"{sentence}; it continued such a chunk" if loss.continued else sentence

    def _eviction(self, loss: Loss) -> str:
        assert loss.tier is not None
        tier = loss.tier.name.lower()
        pressure = {
            Why.ROOM: "room was needed for a chunk of its own tenant",
            Why.SHARE: (
                "room was needed for a chunk of another tenant,"
                " and its own held more than its share"
            ),
            Why.OWN_QUOTA: f"its tenant held all that {self._quota(loss.tier)} allows and wrote on",
            Why.LAYOUT: "its slab was given to chunks of another size",
        }[loss.why]
        policy = f"eviction.policy = {self._config.eviction.policy}"
        return f"evicted from {tier}, the only tier with it, by {policy}: {pressure}"

    def _refusal(self, why: Why) -> str:
        return {
            Why.NO_ROOM: "everything else in RAM was leased",
            Why.NOT_WORTH: (
                f"eviction.policy = {self._config.eviction.policy} took everything else in RAM to"
                " be likelier to be asked for again"
            ),
            Why.LEASE_LIMIT: (
                "its session had reserved all that limits.session_lease_percent ="
                f" {self._config.limits.session_lease_percent} allows"
            ),
            Why.PARENT_MISSING: "the chunk before it was neither held nor being written",
            Why.QUOTA: f"its tenant held all that {self._quota(TierId.CPU)} allows",
        }[why]

    def _quota(self, tier: TierId) -> str:
        name = f"{tier.name.lower()}_percent"
        return f"tenants.{name} = {getattr(self._config.tenants, name)}"

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
            if other.tenant != space.tenant:
                if replace(other, tenant=space.tenant) == space:
                    detail = "a space of another tenant exists; what it holds is not disclosed"
                    found.append((3, detail, ["tenant"]))
            elif other != space and self._holds(other, token_ids, extras):
                fields = space.differing_fields(other)
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
        if above is not None and above.below is not None:
            detail += f"; stored prompts part from this one in chunk {first}"
        return Explanation(KeyState.NEVER_STORED, detail)
