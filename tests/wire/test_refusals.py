"""Every documented status is given where it is due, names its field, and changes nothing."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from kvtier.proto import cache_pb2 as pb
from tests.sidecar import Sidecar, until
from tests.wire.own_client import (
    KEY_BYTES,
    TIMEOUT_S,
    OwnClient,
    chain,
    piece_of,
    refusal,
    space_of,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNKNOWN_SESSION = grpc.StatusCode.FAILED_PRECONDITION
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
MAX_KEYS = 64


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    limits = [f"limits.keys_per_request={MAX_KEYS}", "limits.sessions=8", "limits.spaces=4"]
    with Sidecar(tmp_path_factory.mktemp("w"), *limits) as running:
        yield running


@pytest.fixture
def client(sidecar: Sidecar) -> Iterator[OwnClient]:
    """An inline session whose chunk stays right whatever is refused."""
    with OwnClient(sidecar.target, path=pb.DATA_PATH_INLINE) as opened:
        keys = opened.keys(999, 1)
        opened.store(keys)
        yield opened
        assert opened.verify(keys) == 1


def with_keys(client: OwnClient, keys: bytes) -> dict[str, Callable[[], object]]:
    """Every method that takes keys, called with these."""
    stub, session, parent = client.stub, client.id, client.root
    timeout = TIMEOUT_S
    return {
        "Lookup": lambda: stub.Lookup(
            pb.LookupRequest(session_id=session, keys=keys), timeout=timeout
        ),
        "Load": lambda: stub.Load(
            pb.LoadRequest(session_id=session, lease_id=1, keys=keys), timeout=timeout
        ),
        "Get": lambda: stub.Get(pb.GetRequest(session_id=session, keys=keys), timeout=timeout),
        "Reserve": lambda: stub.Reserve(
            pb.ReserveRequest(session_id=session, lease_id=1, keys=keys, parent=parent),
            timeout=timeout,
        ),
        "Prefetch": lambda: stub.Prefetch(
            pb.PrefetchRequest(session_id=session, keys=keys), timeout=timeout
        ),
        "Pin": lambda: stub.Pin(
            pb.PinRequest(session_id=session, keys=keys, ttl_s=60), timeout=timeout
        ),
        "Evict": lambda: stub.Evict(
            pb.EvictRequest(session_id=session, keys=keys), timeout=timeout
        ),
        "Explain": lambda: stub.Explain(
            pb.ExplainRequest(session_id=session, keys=keys), timeout=timeout
        ),
    }


METHODS_WITH_KEYS = ["Lookup", "Load", "Get", "Reserve", "Prefetch", "Pin", "Evict", "Explain"]


@pytest.mark.parametrize("method", METHODS_WITH_KEYS)
@pytest.mark.parametrize("nbytes", [1, 31, 33, KEY_BYTES * MAX_KEYS + 1])
def test_keys_of_a_wrong_length(client: OwnClient, method: str, nbytes: int) -> None:
    status, told = refusal(with_keys(client, os.urandom(nbytes))[method])
    assert status == INVALID
    assert told.startswith("keys: ")


@pytest.mark.parametrize("method", METHODS_WITH_KEYS)
def test_one_key_too_many(client: OwnClient, method: str) -> None:
    status, told = refusal(with_keys(client, os.urandom(KEY_BYTES * (MAX_KEYS + 1)))[method])
    assert status == INVALID
    assert "limits.keys_per_request" in told


@pytest.mark.parametrize("method", METHODS_WITH_KEYS)
@pytest.mark.parametrize("session", [b"", b"x", bytes(16), bytes(1000)])
def test_a_session_that_nobody_opened(client: OwnClient, method: str, session: bytes) -> None:
    client.id, right = session, client.id
    status, told = refusal(with_keys(client, os.urandom(KEY_BYTES))[method])
    client.id = right
    assert status == UNKNOWN_SESSION
    assert told.startswith("session_id: ")


def test_every_other_method_asks_for_the_session(client: OwnClient) -> None:
    client.id, right = bytes(16), client.id
    calls: list[Callable[[], object]] = [
        lambda: client.release(1),
        lambda: client.abort(1),
        lambda: client.commit(1, [0]),
        lambda: client.put([client.header(1)]),
        lambda: client.stub.Unpin(pb.UnpinRequest(session_id=client.id, pin_id=1)),
        lambda: client.stub.ListPins(pb.ListPinsRequest(session_id=client.id)),
    ]
    assert {refusal(call)[0] for call in calls} == {UNKNOWN_SESSION}
    client.id = right


def test_a_session_that_is_over(sidecar: Sidecar, client: OwnClient) -> None:
    with OwnClient(sidecar.target) as ended:
        session = ended.id
        ended.store(ended.keys(5, 1))
        open_before = sidecar.stats().sessions
    sidecar.until(lambda stats: stats.sessions < open_before, "the session is over")
    client.id, right = session, client.id
    assert refusal(lambda: client.lookup([bytes(32)]))[0] == UNKNOWN_SESSION
    client.id = right


@pytest.mark.parametrize("nbytes", [0, 1, 31, 33, 64])
def test_a_parent_of_a_wrong_length(client: OwnClient, nbytes: int) -> None:
    request = pb.ReserveRequest(
        session_id=client.id, lease_id=1, keys=bytes(32), parent=bytes(nbytes)
    )
    status, told = refusal(lambda: client.stub.Reserve(request, timeout=TIMEOUT_S))
    assert status == INVALID
    assert told.startswith("parent: ")
    assert client.reserve(1, client.keys(1, 1))  # the lease id was not used up
    client.abort(1)


def test_a_lease_id_in_use(client: OwnClient) -> None:
    client.reserve(1, client.keys(1, 1))
    status, told = refusal(lambda: client.reserve(1, client.keys(2, 1)))
    assert (status, told.split(":")[0]) == (INVALID, "lease_id")
    assert client.put(client.pieces(1, {0: client.content(client.keys(1, 1)[0])}))


def test_too_many_indexes_in_a_commit(sidecar: Sidecar) -> None:
    with OwnClient(sidecar.target) as client:
        status, told = refusal(lambda: client.commit(1, range(MAX_KEYS + 1)))
    assert (status, told.split(":")[0]) == (INVALID, "indexes")


def test_only_put_commits_on_the_path_inline(client: OwnClient) -> None:
    client.reserve(1, client.keys(1, 1))
    status, told = refusal(lambda: client.commit(1, [0]))
    assert (status, told.split(":")[0]) == (INVALID, "session_id")
    client.abort(1)


def test_evict_of_everything_and_of_keys(client: OwnClient) -> None:
    request = pb.EvictRequest(session_id=client.id, keys=bytes(32), whole_space=True)
    status, told = refusal(lambda: client.stub.Evict(request, timeout=TIMEOUT_S))
    assert (status, told.split(":")[0]) == (INVALID, "keys")


def test_a_put_must_begin_with_its_header(client: OwnClient) -> None:
    for messages in ([], [piece_of(0, b"x")], [pb.PutRequest()]):
        status, told = refusal(lambda messages=messages: client.put(messages))
        assert (status, told.split(":")[0]) == (INVALID, "header")


def test_explain_with_too_large_an_extra(client: OwnClient) -> None:
    with OwnClient(client.target, space_of("another"), pb.DATA_PATH_INLINE) as another:
        another.store(another.keys(1, 1))
        request = pb.ExplainRequest(
            session_id=client.id,
            keys=chain(client.root, range(16))[0],
            token_ids=bytes(64),
            extras=[bytes(65_537)],
        )
        status, told = refusal(lambda: client.stub.Explain(request, timeout=TIMEOUT_S))
    assert (status, told.split(":")[0]) == (INVALID, "extra")


BAD_SPACES: dict[str, pb.Space] = {
    "space.model": space_of(""),
    "space.weights": space_of(weights="w" * 4097),
    "space.rope": space_of(rope="é" * 2049),
    "space.tenant": space_of(tenant="t" * 5000),
    "space.format_version": space_of(format_version=2),
    "layout.dtype": space_of(layout_dtype="float17"),
    "layout.layers": space_of(layout_layers=0),
    "layout.planes": space_of(layout_planes=9),
    "layout.heads": space_of(layout_heads=4097),
    "layout.head_dim": space_of(layout_head_dim=2**32 - 1),
    "layout.tokens": space_of(layout_tokens=65_537),
    "layout.rank": space_of(layout_rank=1, layout_ranks=1),
    "layout.ranks": space_of(layout_ranks=0),
    "layout.axes": space_of(layout_axes="layer,plane,head,token,token"),
    "layout.encoding": space_of(layout_encoding="kivi-int5"),
    "layout": space_of(layout_layers=4096, layout_heads=4096),
    "space.layout": space_of(layout_layers=4096),  # 8 MiB chunks, 8 MiB may be leased: fits
}
BAD_SPACES["space.layout"].layout.tokens = 32  # 16 MiB chunks in an arena of 16 MiB


@pytest.mark.parametrize("field", BAD_SPACES)
def test_a_space_out_of_range(sidecar: Sidecar, client: OwnClient, field: str) -> None:
    request = pb.OpenSessionRequest(space=BAD_SPACES[field], paths=[pb.DATA_PATH_INLINE])
    status, told = refusal(lambda: client.stub.OpenSession(request, timeout=TIMEOUT_S))
    assert (status, told.split(":")[0]) == (INVALID, field)


@pytest.mark.parametrize(
    ("field", "value"),
    [("dtype", "float64"), ("planes", 1), ("axes", "plane,layer,head,token,dim")],
)
def test_what_cannot_be_quantised(client: OwnClient, field: str, value: str | int) -> None:
    space = space_of(**{"layout_encoding": "kivi-int8", f"layout_{field}": value})
    request = pb.OpenSessionRequest(space=space, paths=[pb.DATA_PATH_INLINE])
    status, told = refusal(lambda: client.stub.OpenSession(request, timeout=TIMEOUT_S))
    assert (status, told.split(":")[0]) == (INVALID, f"layout.{field}")


@pytest.mark.parametrize(
    "field", ["layout_dtype", "layout_axes", "layout_encoding", "model", "tenant"]
)
def test_a_giant_text_is_refused_in_few_words(client: OwnClient, field: str) -> None:
    request = pb.OpenSessionRequest(
        space=space_of(**{field: "€" * 500_000}), paths=[pb.DATA_PATH_INLINE]
    )
    status, told = refusal(lambda: client.stub.OpenSession(request, timeout=TIMEOUT_S))
    assert status == INVALID
    assert len(told) < 2000


def test_a_session_without_a_known_path(client: OwnClient) -> None:
    for paths in ([], [0], [77, 0]):
        request = pb.OpenSessionRequest(space=space_of(), paths=paths)  # type: ignore[arg-type]
        status, told = refusal(
            lambda request=request: client.stub.OpenSession(request, timeout=TIMEOUT_S)
        )
        assert (status, told.split(":")[0]) == (INVALID, "paths")


def test_an_unknown_path_is_passed_over(sidecar: Sidecar, client: OwnClient) -> None:
    paths = [77, pb.DATA_PATH_INLINE]
    request = pb.OpenSessionRequest(space=space_of(), paths=paths)  # type: ignore[list-item]
    call = client.stub.OpenSession(request, timeout=TIMEOUT_S)
    assert next(call).opened.path == pb.DATA_PATH_INLINE
    call.cancel()


def test_a_client_with_too_long_a_name(client: OwnClient) -> None:
    for name in ("n" * 257, "é" * 129):
        request = pb.OpenSessionRequest(client=name, space=space_of(), paths=[2])  # type: ignore[list-item]
        status, told = refusal(
            lambda request=request: client.stub.OpenSession(request, timeout=TIMEOUT_S)
        )
        assert (status, told.split(":")[0]) == (INVALID, "client")


def test_too_many_sessions(sidecar: Sidecar, client: OwnClient) -> None:
    sidecar.until(lambda stats: stats.sessions == 1, "the sessions of other tests are over")
    request = pb.OpenSessionRequest(space=space_of(), paths=[pb.DATA_PATH_INLINE])
    calls = [client.stub.OpenSession(request, timeout=TIMEOUT_S) for _ in range(7)]
    assert all(next(call).HasField("opened") for call in calls)
    status, told = refusal(lambda: client.stub.OpenSession(request, timeout=TIMEOUT_S))
    assert (status, told.split(":")[0]) == (EXHAUSTED, "limits.sessions")
    calls[0].cancel()
    sidecar.until(lambda stats: stats.sessions < 8, "one session less")
    again = client.stub.OpenSession(request, timeout=TIMEOUT_S)
    assert next(again).HasField("opened")
    for call in (*calls, again):
        call.cancel()


def test_too_many_spaces(tmp_path: Path) -> None:
    with Sidecar(tmp_path, "limits.spaces=2") as sidecar:
        clients = [OwnClient(sidecar.target, space_of(f"{number}")) for number in range(2)]
        for client in clients:
            client.store(client.keys(1, 1))
        request = pb.OpenSessionRequest(space=space_of("another"), paths=[pb.DATA_PATH_INLINE])
        status, told = refusal(lambda: clients[0].stub.OpenSession(request, timeout=TIMEOUT_S))
        assert (status, told.split(":")[0]) == (EXHAUSTED, "limits.spaces")
        everything = pb.EvictRequest(session_id=clients[1].id, whole_space=True)
        clients[1].stub.Evict(everything, timeout=TIMEOUT_S)
        clients[1].close()
        opening = clients[0].stub.OpenSession

        def opens() -> bool:
            call = opening(request, timeout=TIMEOUT_S)
            return refusal(lambda: [next(call), call.cancel()])[0] == grpc.StatusCode.OK

        until(opens, "the empty space makes room for another")
        with OwnClient(sidecar.target, space_of("another")) as another:
            another.store(another.keys(1, 1))
        assert clients[0].verify(clients[0].keys(1, 1)) == 1
        clients[0].close()


@pytest.mark.slow
def test_too_many_leases(client: OwnClient) -> None:
    keys = client.keys(999, 1)
    for lease in range(1, 4097):
        client.load(lease, keys)
    status, told = refusal(lambda: client.load(5000, keys))
    assert (status, told.split(":")[0]) == (EXHAUSTED, "leases")
    client.release(1)
    assert client.load(5000, keys)[1].chunks == 1
    client.release(5000)
