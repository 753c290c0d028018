"""Parts of chunks through the client: what it offers, what it yields, on both paths."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvtier
from kvtier.chunks import Prefix, chain, pack_tokens, with_text
from kvtier.client import Client
from kvtier.client.offering import offered
from tests.sidecar import CHUNK_TOKENS, Sidecar, content_of, load, offload, prompt_of, space_of

ROOT = bytes(32)
STORED = prompt_of(1, 4)


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with Sidecar(tmp_path_factory.mktemp("partial")) as running:
        yield running


def diverging(common: int, length: int) -> list[int]:
    """A prompt that agrees with the stored one in so many tokens."""
    return [*STORED[:common], *range(9_000_000, 9_000_000 + length - common)]


def parts(
    client: Client, prefix: Prefix, expected: Mapping[int, bytes], *, partial: bool = True
) -> list[int]:
    """Load and compare every byte; how many tokens of each chunk are the prompt's. `expected` names
    the chunks that are not those of the prompt's keys."""
    found = []
    with client.load(prefix, partial=partial) as loaded:
        for chunk in loaded:
            assert chunk.index == len(found)
            key = expected.get(chunk.index) or prefix[chunk.index]
            assert bytes(chunk.data) == content_of(key, chunk.data.nbytes)
            found.append(chunk.tokens)
    return found


@pytest.mark.parametrize("path", ["shm", "inline"])
@pytest.mark.parametrize("extra", [b"", b"adapter"])
def test_a_part_comes_last(sidecar: Sidecar, path: str, extra: bytes) -> None:
    client = sidecar.client(space_of(f"{path}-{extra!r}"), path=path)
    stored = client.prefix(STORED, extra)
    assert len(offload(client, stored).stored) == 4
    for common, length in ((40, 64), (40, 41), (7, 9), (7, 7), (63, 200)):
        whole, part = divmod(common, CHUNK_TOKENS)
        prompt = diverging(common, length)
        prefix = client.prefix(prompt, extra)
        tokens = [CHUNK_TOKENS] * whole
        assert parts(client, prefix, {whole: stored[whole]}) == [*tokens, part]
        assert parts(client, prefix, {}, partial=False) == tokens, "not asked for"
        assert parts(client, client.prefix(prompt, b"another"), {}) == []
    assert parts(client, stored, {}) == [CHUNK_TOKENS] * 4
    with client.load(client.prefix(diverging(40, 64), extra), partial=True) as loaded:
        assert next(iter(loaded)).tokens == CHUNK_TOKENS  # and the part is left where it is
    assert load(client, stored) == 4
    sidecar.until(lambda stats: not stats.leases, "every lease is over")


@pytest.mark.parametrize("path", ["shm", "inline"])
def test_slices_ask_from_where_they_begin(sidecar: Sidecar, path: str) -> None:
    client = sidecar.client(space_of(f"slices-{path}"), path=path)
    stored = client.prefix(STORED)
    offload(client, stored[:2])
    offload(client, stored[2:])  # with its own tokens
    prefix = client.prefix(diverging(40, 64))
    for start in range(3):
        expected = [CHUNK_TOKENS] * (2 - start) + [8]
        assert parts(client, prefix[start:], {2 - start: stored[2]}) == expected
    assert parts(client, prefix[:2], {}) == [CHUNK_TOKENS] * 2, "it ends there"
    assert parts(client, prefix[:1], {}) == [CHUNK_TOKENS]
    assert parts(client, prefix[3:], {}) == [], "what is before it is not held"


def test_in_one_process(tmp_path: Path) -> None:
    with kvtier.open(space_of(), cpu="16MiB", deadline_s=20) as client:
        stored = client.prefix(STORED)
        offload(client, stored)
        expected = {2: stored[2]}
        assert parts(client, client.prefix(diverging(40, 64)), expected) == [16, 16, 8]


def test_a_service_that_keeps_no_tokens(tmp_path: Path) -> None:
    with Sidecar(tmp_path, "limits.token_bytes=0") as sidecar:
        client = sidecar.client()
        assert len(offload(client, client.prefix(STORED)).stored) == 4
        assert parts(client, client.prefix(diverging(40, 64)), {}) == [16, 16]
        assert parts(client, client.prefix(STORED[:5]), {}) == []


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=30),
    st.lists(st.binary(max_size=6), max_size=8),
    st.integers(0, 200),
    st.booleans(),
    st.data(),
)
def test_what_is_offered_makes_the_keys_and_stays_in_bounds(
    tokens: list[int], extras: list[bytes], most: int, whole: bool, data: st.DataObject
) -> None:
    packed, width = pack_tokens(tokens), 16
    extra = extras if len(extras) >= len(tokens) // 4 else b"one for all"
    prefix = with_text(chain(ROOT, packed, 4, extra), packed, extra)
    start = data.draw(st.integers(0, len(prefix)))
    prefix = prefix[start : data.draw(st.integers(start, len(prefix)))]
    message = offered(prefix, most, whole=whole)
    if message is None:
        assert not prefix.text or not prefix.text.tokens or most < width + 11 or whole
        return
    assert len(message.ids) + sum(map(len, message.extras)) <= most
    begun = -(-len(message.ids) // width)
    each = list(message.extras) or [b""] * begun
    assert len(each) == begun
    assert message.parent == prefix.parent
    again = chain(message.parent, message.ids, 4, each)
    assert again.keys[: len(prefix)] == prefix.keys[: len(again)]
    assert len(again) <= len(prefix)
    if whole:
        assert len(message.ids) % width == 0


def test_tokens_of_a_prefix_nobody_knows_are_not_offered() -> None:
    assert offered(chain(ROOT, pack_tokens(range(8)), 4), 1 << 20) is None


def test_an_extra_per_chunk_covers_the_tail_where_it_has_one() -> None:
    packed = pack_tokens(range(6))
    for extras, tokens in (([b"a"], 4), ([b"a", b"b"], 6), ([b"a", b"b", b"c"], 6)):
        prefix = with_text(chain(ROOT, packed, 4, extras), packed, extras)
        message = offered(prefix, 1 << 20)
        assert message is not None
        assert (len(message.ids), list(message.extras)) == (4 * tokens, extras[:2])
