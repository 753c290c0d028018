"""Steps of tests of parts: store with tokens, ask with tokens, compare every byte."""

import itertools
from collections.abc import Sequence

from kvtier.chunks import ChunkKey, Prefix, chain, pack_tokens
from kvtier.service.answers import CommitOutcome, LoadStop, ReserveOutcome
from kvtier.service.overlaps import Offered
from kvtier.service.sessions import Session
from tests.core import CHUNK_TOKENS, Harness, content

STORED = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
LEASES = itertools.count(1_000_000)


def prompt_of(
    session: Session, tokens: Sequence[int], extra: bytes = b""
) -> tuple[Prefix, Offered]:
    """The keys of a prompt, and all its tokens as a client offers them."""
    packed = pack_tokens(tokens)
    prefix = chain(session.branch.digest, packed, CHUNK_TOKENS, extra)
    begun = -(-len(tokens) // CHUNK_TOKENS)
    return prefix, Offered(packed, [extra] * begun if extra else [], prefix.parent)


def store(h: Harness, session: Session, tokens: Sequence[int], extra: bytes = b"") -> Prefix:
    """Reserve, offer the tokens, fill and commit."""
    prefix, offered = prompt_of(session, tokens, extra)
    lease_id, outcomes = h.reserve(session, prefix)
    h.cache.learn(session, prefix.keys, offered)
    granted = [i for i, outcome in enumerate(outcomes) if outcome is ReserveOutcome.WRITE]
    stored = h.cache.commit(session, lease_id, granted)
    assert stored == [CommitOutcome.STORED] * len(granted)
    return prefix


async def ask(
    h: Harness, session: Session, keys: Sequence[ChunkKey], offered: Offered
) -> tuple[int, tuple[ChunkKey, int] | None, LoadStop]:
    """Load; returns how many whole chunks came, which other one with how many tokens, and why no
    more. Every byte is compared, and all must be leased at the end."""
    lease = h.cache.open_read(session, next(LEASES))
    chunks, loading = h.cache.load(
        session, lease, keys, None, in_vram=session.in_vram, offered=offered
    )
    whole, part = 0, None
    async for landed in chunks:
        for index, replica in landed.chunks:
            assert part is None, "something came after the part"
            assert lease.replicas[index] is replica
            assert replica.pins
            assert h.bytes_of(replica) == content(replica.key)
            if tokens := loading.overlapping(index):
                assert index == whole
                part = replica.key, tokens
            else:
                assert replica.key == keys[index]
                whole += 1
    h.cache.release(session, lease.id)
    return whole, part, loading.stop


async def load(
    h: Harness, session: Session, tokens: Sequence[int], extra: bytes = b""
) -> tuple[int, int]:
    """How many whole chunks of a prompt came, and how many tokens of one more."""
    prefix, offered = prompt_of(session, tokens, extra)
    whole, part, _ = await ask(h, session, prefix.keys, offered)
    return whole, part[1] if part is not None else 0
