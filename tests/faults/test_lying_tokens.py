"""Lies about tokens: of a client to the service, and of a service to the client."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvtier.client import Client, connect
from kvtier.proto import cache_pb2 as pb
from kvtier.service.overlaps import MAX_TOKEN_BYTES
from tests.faults.fake_service import FakeService, Lie
from tests.sidecar import HANG_S, Sidecar, content_of, prompt_of, space_of, until
from tests.wire import own_client
from tests.wire.own_client import TIMEOUT_S, TOKENS, OwnClient, refusal

INVALID = grpc.StatusCode.INVALID_ARGUMENT
SPACE = space_of()
NBYTES = SPACE.layout.nbytes
HELD = prompt_of(1, 3)
ASKED = [*HELD[:40], *range(5_000_000, 5_000_030)]  # the part of the third chunk is 8 tokens long


# ── a client ──


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[tuple[OwnClient, Sidecar]]:
    settings = ("limits.token_bytes=64KiB", "limits.keys_per_request=100")
    with (
        Sidecar(tmp_path, *settings, disk=False) as sidecar,
        OwnClient(sidecar.target) as client,
    ):
        yield client, sidecar


def ids_of(*tokens: int) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def store(client: OwnClient, tokens: list[int], told: pb.Tokens, extra: bytes = b"") -> list[bytes]:
    """Store the chunks of a prompt, and tell of their tokens what is given."""
    keys, lease = own_client.chain(client.root, tokens, extra), client.next_lease()
    request = pb.ReserveRequest(
        session_id=client.id, lease_id=lease, keys=b"".join(keys), parent=client.root, tokens=told
    )
    answers = client.stub.Reserve(request, timeout=TIMEOUT_S).chunks
    for key, answer in zip(keys, answers, strict=True):
        client.fill(answer.offset, client.content(key))
    assert len(client.commit(lease, range(len(keys)))) == len(keys)
    return keys


def part(client: OwnClient, tokens: list[int], extra: bytes = b"") -> int:
    """How many tokens of a part a prompt gets; its bytes are leased and let go."""
    told = pb.Tokens(ids=ids_of(*tokens), extras=[extra] if extra else [], parent=client.root)
    lease = client.next_lease()
    request = pb.LoadRequest(session_id=client.id, lease_id=lease, tokens=told)
    chunks = [c for each in client.stub.Load(request, timeout=TIMEOUT_S) for c in each.chunks]
    client.release(lease)
    return chunks[0].tokens if chunks else 0


def test_tokens_that_make_another_key_are_never_answered(liar: tuple[OwnClient, Sidecar]) -> None:
    client, sidecar = liar
    tokens, other = list(range(TOKENS)), list(range(100, 100 + TOKENS))
    [key] = store(client, tokens, pb.Tokens(ids=ids_of(*other)))
    assert part(client, other[:5]) == part(client, tokens[:5]) == 0
    store(client, other, pb.Tokens(ids=ids_of(*other), extras=[b"not so"]))
    assert part(client, other[:5]) == part(client, other[:5], b"not so") == 0
    assert sidecar.stats().counters["unverified_tokens"] == 2
    client.reserve(client.next_lease(), [key])
    honest = pb.Tokens(ids=ids_of(*tokens))
    lease = client.next_lease()
    request = pb.ReserveRequest(
        session_id=client.id, lease_id=lease, keys=key, parent=client.root, tokens=honest
    )
    client.stub.Reserve(request, timeout=TIMEOUT_S)
    assert part(client, tokens[:5]) == 5, "the truth is believed afterwards"
    assert part(client, tokens[:5], b"not so") == 0


# Of a request with two keys.
MALFORMED: dict[str, pb.Tokens] = {
    "no whole token": pb.Tokens(ids=b"abc"),
    "more than there are keys": pb.Tokens(ids=ids_of(*range(3 * TOKENS + 1))),
    "too few extras": pb.Tokens(ids=ids_of(*range(2 * TOKENS)), extras=[b"a"]),
    "too many extras": pb.Tokens(ids=ids_of(*range(TOKENS)), extras=[b"a", b"b"]),
    "an extra too long": pb.Tokens(ids=ids_of(1), extras=[bytes(65_537)]),
}


@pytest.mark.parametrize("method", ["Load", "Get", "Reserve"])
@pytest.mark.parametrize("lie", MALFORMED)
def test_malformed_tokens_are_refused_and_change_nothing(
    liar: tuple[OwnClient, Sidecar], lie: str, method: str
) -> None:
    client, _ = liar
    keys, told = client.keys(1, 2), pb.Tokens(parent=client.root)
    told.MergeFrom(MALFORMED[lie])
    fields = {"session_id": client.id, "keys": b"".join(keys), "tokens": told}
    calls = {
        "Load": lambda: list(client.stub.Load(pb.LoadRequest(lease_id=1, **fields))),
        "Get": lambda: list(client.stub.Get(pb.GetRequest(**fields))),
        "Reserve": lambda: client.stub.Reserve(
            pb.ReserveRequest(lease_id=1, parent=client.root, **fields)
        ),
    }
    status, message = refusal(calls[method])
    assert (status, message[:6]) == (INVALID, "tokens")
    assert [answer.status for answer in client.reserve(1, keys)] == [pb.RESERVE_STATUS_WRITE] * 2


def test_a_parent_that_is_none(liar: tuple[OwnClient, Sidecar]) -> None:
    client, _ = liar
    told = pb.Tokens(ids=ids_of(1), parent=b"short")
    request = pb.LoadRequest(session_id=client.id, lease_id=1, tokens=told)
    status, message = refusal(lambda: list(client.stub.Load(request, timeout=TIMEOUT_S)))
    assert (status, message.split(":")[0]) == (INVALID, "parent")


def test_more_than_a_request_may_have(liar: tuple[OwnClient, Sidecar]) -> None:
    """Tokens and extras count together: 40 chunks with extras of 20 or 30 KiB."""
    client, _ = liar
    assert client.opened.max_token_bytes == MAX_TOKEN_BYTES
    keys = b"".join(client.keys(1, 40))
    for kib, is_refused in ((20, False), (30, True)):
        extras = [bytes(kib << 10)] * 40
        told = pb.Tokens(ids=bytes(40 * 4 * TOKENS), extras=extras, parent=client.root)
        request = pb.LoadRequest(session_id=client.id, lease_id=kib, keys=keys, tokens=told)
        if is_refused:
            assert refusal(lambda: list(client.stub.Load(request, timeout=TIMEOUT_S)))[0] == INVALID  # noqa: B023
        else:
            assert list(client.stub.Load(request, timeout=TIMEOUT_S))


def test_a_flood_of_tokens_stays_within_its_memory(liar: tuple[OwnClient, Sidecar]) -> None:
    """The latest prompts are known, the first are forgotten, and the chunks stay."""
    client, _ = liar
    prompts = [list(range(1000 * seed, 1000 * seed + 8 * TOKENS)) for seed in range(1, 60)]
    for prompt in prompts:
        store(client, prompt, pb.Tokens(ids=ids_of(*prompt)))
    assert part(client, prompts[-1][:5]) == 5
    assert part(client, prompts[0][:5]) == 0
    assert client.verify(own_client.chain(client.root, prompts[0])) == 8
    client.stub.Evict(pb.EvictRequest(session_id=client.id, whole_space=True), timeout=TIMEOUT_S)
    assert part(client, prompts[-1][:5]) == 0


# ── a service ──


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeService]:
    with FakeService(tmp_path, SPACE) as service:

        def keeps_tokens(events: Iterator[pb.SessionEvent], call: object) -> Iterator[object]:
            for event in events:
                event.opened.max_token_bytes = 1 << 20
                yield event

        service.lies["OpenSession"] = keeps_tokens
        yield service


def chunk(index: int, tokens: int, offset: int = 0) -> pb.LoadedChunk:
    return pb.LoadedChunk(index=index, offset=offset, tokens=tokens)


def messages(chunks: list[pb.LoadedChunk]) -> Iterator[pb.LoadResponse]:
    yield from (pb.LoadResponse(chunks=[each]) for each in chunks)


def streamed(chunks: list[pb.LoadedChunk], service: FakeService) -> Iterator[pb.GetResponse]:
    """The same over the path inline."""
    for each in chunks:
        if each.tokens:
            yield pb.GetResponse(tokens=each.tokens)
        data = bytes(service.arena[each.offset : each.offset + NBYTES])
        digest = own_client.checksum(data)
        yield pb.GetResponse(piece=pb.ChunkPiece(index=each.index, data=data, checksum=digest))
    yield pb.GetResponse(end=pb.LoadEnd())


# What the service sends, and how many chunks of it are handed out.
LIES: dict[str, tuple[list[pb.LoadedChunk], int]] = {
    "more tokens than a chunk has": ([chunk(0, 17)], 0),
    "a giant number of tokens": ([chunk(0, 2**32 - 1)], 0),
    "a chunk after the part": ([chunk(0, 3), chunk(1, 0)], 1),
    "a part after the part": ([chunk(0, 3), chunk(1, 3)], 1),
    "a part with a gap": ([chunk(0, 0), chunk(2, 3)], 1),
    "a part again": ([chunk(0, 0), chunk(0, 3)], 1),
    "more tokens than were offered": ([*(chunk(i, 0) for i in range(4)), chunk(4, 7)], 4),
    "a part beyond the tail": ([*(chunk(i, 0) for i in range(4)), chunk(4, 6), chunk(5, 1)], 5),
    "a giant index": ([chunk(2**32 - 1, 3)], 0),
    "a whole chunk beyond the keys": ([chunk(i, 0) for i in range(5)], 4),
    "the truth": ([chunk(0, 0), chunk(1, 0), chunk(2, 8)], 3),
}


@pytest.mark.parametrize("path", ["shm", "inline"])
@pytest.mark.parametrize("lie", LIES)
def test_a_false_part_ends_the_load(fake: FakeService, lie: str, path: str) -> None:
    chunks, honest = LIES[lie]
    with connected(fake, path) as client:
        prefix = client.prefix(ASKED)
        assert len(prefix) == 4
        fake.lies["Load"] = lambda answers, call: messages(chunks)
        fake.lies["Get"] = lambda answers, call: streamed(chunks, fake)
        found = []
        with client.load(prefix, partial=True) as loaded:
            found = [each.tokens for each in loaded]
        assert len(found) == honest
        assert all(1 <= tokens <= 16 for tokens in found)
        assert all(tokens == 16 for tokens in found[:-1]), "only the last may be a part"
        recovers(fake, client)


@pytest.mark.parametrize("path", ["shm", "inline"])
def test_a_part_that_nobody_asked_for_ends_the_load(fake: FakeService, path: str) -> None:
    with connected(fake, path) as client:
        chunks = [chunk(0, 0), chunk(1, 0), chunk(2, 8)]
        fake.lies["Load"] = lambda answers, call: messages(chunks)
        fake.lies["Get"] = lambda answers, call: streamed(chunks, fake)
        with client.load(client.prefix(ASKED)) as loaded:
            assert [each.tokens for each in loaded] == [16, 16]
        recovers(fake, client)


def test_parts_announced_for_ever(fake: FakeService) -> None:
    endless: Lie = lambda answers, call: itertools.repeat(pb.GetResponse(tokens=3))  # noqa: E731
    with connected(fake, "inline") as client:
        fake.lies["Get"] = endless
        with client.load(client.prefix(ASKED), 0.3, partial=True) as loaded:
            assert list(loaded) == []
        recovers(fake, client)


def connected(fake: FakeService, path: str) -> Client:
    client = connect(fake.target, SPACE, deadline_s=HANG_S, path=path)
    assert client.wait_ready(HANG_S)
    for key in client.prefix(HELD):
        fake.hold(key, content_of(key, NBYTES))
    return client


def recovers(fake: FakeService, client: Client) -> None:
    """Once the service is honest, the client works again."""
    del fake.lies["Get"]
    fake.lies.pop("Load", None)
    prefix = client.prefix(HELD)

    def works() -> bool:
        with client.load(prefix, partial=True) as loaded:
            chunks = [bytes(each.data) == content_of(prefix[each.index], NBYTES) for each in loaded]
        return chunks == [True] * 3

    until(works, "the held prompt loads")
