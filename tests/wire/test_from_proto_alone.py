"""The wire contract holds for a client written from `proto/cache.proto` alone."""

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvtier.proto import cache_pb2 as pb
from kvtier.service import answers
from tests.sidecar import Sidecar
from tests.wire.own_client import TIMEOUT_S, OwnClient, chain, space_of

PATHS: dict[str, "pb.DataPath.ValueType"] = {"shm": pb.DATA_PATH_SHM, "inline": pb.DATA_PATH_INLINE}


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with Sidecar(tmp_path_factory.mktemp("w"), "limits.keys_per_request=64") as running:
        yield running


@pytest.fixture(params=PATHS)
def client(request: pytest.FixtureRequest, sidecar: Sidecar) -> Iterator[OwnClient]:
    """A session in a space of its own, on either path."""
    space = space_of(request.node.name)
    with OwnClient(sidecar.target, space, PATHS[request.param]) as opened:
        yield opened


# ── What works ──


def test_a_session_says_what_it_gives(client: OwnClient) -> None:
    opened = client.opened
    assert len(opened.session_id) == 16
    assert opened.chunk_bytes == 4096
    assert opened.max_keys == 64
    assert 0 < opened.max_write_lease_bytes <= 16 << 20
    assert opened.server_version
    assert opened.HasField("arena") == (opened.path == pb.DATA_PATH_SHM)


def test_the_space_digest_is_over_length_prefixed_fields_in_sorted_order(
    client: OwnClient, request: pytest.FixtureRequest
) -> None:
    fields = {
        "format_version": "1", "layout.axes": "layer,plane,head,token,dim",
        "layout.dtype": "float16", "layout.head_dim": "16", "layout.heads": "2",
        "layout.layers": "2", "layout.planes": "2", "layout.rank": "0", "layout.ranks": "1",
        "layout.tokens": "16", "model": request.node.name, "rope": "", "tenant": "", "weights": "",
    }  # fmt: skip
    packed = [
        struct.pack("<I", len(text)) + text.encode() for field in fields.items() for text in field
    ]
    assert client.root == hashlib.sha256(b"kvtier.space.v1" + b"".join(packed)).digest()


def test_an_encoding_is_a_space_of_its_own(sidecar: Sidecar) -> None:
    """Its size is in docs/formats.md; "exact" is what no encoding means."""
    path = pb.DATA_PATH_INLINE
    seen: dict[str, tuple[bytes, int]] = {}
    for encoding in ("", "exact", "kivi-int8", "kivi-int4-g32"):
        space = space_of("encoded", layout_encoding=encoding)
        with OwnClient(sidecar.target, space, path) as client:
            seen[encoding] = client.root, client.nbytes
            keys = client.keys(1, 3)
            assert client.lookup(keys).held == (3 if encoding == "exact" else 0)
            client.store(keys)
            assert client.verify(keys) == 3
    assert seen[""] == seen["exact"]
    assert len({root for root, _ in seen.values()}) == 3
    codes, of_keys, of_values = 16 * 16, 4 * 16, 4 * 16  # a minimum and a scale have 2 bytes each
    assert seen["kivi-int8"][1] == 2 * 2 * (2 * codes + of_keys + of_values)
    assert seen["kivi-int4-g32"][1] == 2 * 2 * (codes + of_keys + of_values)


def test_what_was_stored_comes_back(client: OwnClient) -> None:
    keys = client.keys(1, 10)
    assert client.lookup(keys).held == 0
    assert client.store(keys) == 10
    assert client.verify(keys) == 10
    assert (client.lookup(keys).held, client.lookup(keys).in_ram) == (10, 10)


def test_keys_depend_on_every_token_before_them(client: OwnClient) -> None:
    tokens = list(range(64))
    client.store(chain(client.root, tokens))
    for changed in range(64):
        other = [*tokens[:changed], 99, *tokens[changed + 1 :]]
        assert client.lookup(chain(client.root, other)).held == changed // 16
    assert client.lookup(chain(client.root, tokens, b"a LoRA")).held == 0


def test_a_prompt_continues_from_any_key(client: OwnClient) -> None:
    keys = client.keys(1, 8)
    client.store(keys[:3])
    assert client.store(keys[3:], parent=keys[2]) == 5
    assert client.verify(keys) == 8
    assert client.verify(keys[4:]) == 4


def test_a_load_ends_with_the_reason(client: OwnClient) -> None:
    keys = client.keys(1, 4)
    client.store(keys[:3])
    if client.arena is None:
        assert [client.get(keys[:n])[1].reason for n in (3, 4)] == [
            pb.END_REASON_COMPLETE, pb.END_REASON_MISS,
        ]  # fmt: skip
        return
    assert client.load(1, keys[:3])[1].reason == pb.END_REASON_COMPLETE
    offsets, end = client.load(2, keys)
    assert (end.reason, end.chunks, len(offsets)) == (pb.END_REASON_MISS, 3, 3)


def test_reserve_answers_every_key(client: OwnClient, sidecar: Sidecar) -> None:
    keys = client.keys(1, 4)
    client.store(keys[:1])
    statuses = [answer.status for answer in client.reserve(100, keys)]
    assert statuses == [pb.RESERVE_STATUS_EXISTS] + [pb.RESERVE_STATUS_WRITE] * 3
    again = [answer.status for answer in client.reserve(101, keys)]
    assert again == [pb.RESERVE_STATUS_EXISTS] + [pb.RESERVE_STATUS_BEING_WRITTEN] * 3
    [orphan] = client.reserve(102, client.keys(2, 2)[1:], parent=client.keys(2, 1)[0])
    assert orphan.status == pb.RESERVE_STATUS_PARENT_MISSING
    client.abort(100)
    assert [answer.status for answer in client.reserve(103, keys)] == statuses


def test_what_is_not_committed_is_discarded(client: OwnClient) -> None:
    keys = client.keys(1, 3)
    offered = client.reserve(1, keys)
    assert [answer.status for answer in offered] == [pb.RESERVE_STATUS_WRITE] * 3
    assert client.lookup(keys).held == 0
    if client.arena is None:
        done = client.put(client.pieces(1, {0: client.content(keys[0])}))
    else:
        client.fill(offered[0].offset, client.content(keys[0]))
        done = client.commit(1, [0])
    assert done == [(0, pb.COMMIT_STATUS_STORED)]
    assert client.verify(keys) == 1


def test_the_reservation_limit_is_the_one_announced(client: OwnClient) -> None:
    allowed = client.opened.max_write_lease_bytes // client.nbytes
    granted = 0
    seed = 10
    while granted <= allowed:
        statuses = [answer.status for answer in client.reserve(seed, client.keys(seed, 64))]
        granted += statuses.count(pb.RESERVE_STATUS_WRITE)
        seed += 1
        if pb.RESERVE_STATUS_LEASE_LIMIT in statuses:
            break
    assert granted == allowed
    for lease in range(10, seed):
        client.abort(lease)


def test_evict_removes_what_continues_a_chunk_too(client: OwnClient) -> None:
    keys, other = client.keys(1, 6), client.keys(2, 2)
    client.store(keys)
    client.store(other)
    request = pb.EvictRequest(session_id=client.id, keys=keys[2])
    assert client.stub.Evict(request, timeout=TIMEOUT_S).chunks == 4
    assert (client.lookup(keys).held, client.lookup(other).held) == (2, 2)
    everything = pb.EvictRequest(session_id=client.id, whole_space=True)
    assert client.stub.Evict(everything, timeout=TIMEOUT_S).chunks == 4
    assert client.lookup(other).held == 0


def test_explain_names_each_state(client: OwnClient) -> None:
    keys = client.keys(1, 4)
    client.store(keys[:2])
    client.reserve(7, keys[2:3], parent=keys[1])
    request = pb.ExplainRequest(session_id=client.id, keys=b"".join(keys))
    told = client.stub.Explain(request, timeout=TIMEOUT_S).keys
    states = [pb.KEY_STATE_RAM] * 2 + [pb.KEY_STATE_BEING_WRITTEN, pb.KEY_STATE_NEVER_STORED]
    assert [each.state for each in told] == states
    assert all(each.detail for each in told)
    client.stub.Evict(pb.EvictRequest(session_id=client.id, keys=keys[0]), timeout=TIMEOUT_S)
    told = client.stub.Explain(request, timeout=TIMEOUT_S).keys
    assert [each.state for each in told[:2]] == [pb.KEY_STATE_EVICTED] * 2


def test_prefetch_counts_what_is_there(client: OwnClient) -> None:
    keys = client.keys(1, 4)
    client.store(keys[:2])
    request = pb.PrefetchRequest(session_id=client.id, keys=b"".join(keys))
    answer = client.stub.Prefetch(request, timeout=TIMEOUT_S)
    assert (answer.in_ram, answer.promoting) == (2, 0)


def test_what_is_on_disk_is_found_by_the_next_service(tmp_path: Path) -> None:
    with Sidecar(tmp_path) as sidecar:
        with OwnClient(sidecar.target) as client:
            keys = client.keys(1, 8)
            client.store(keys)
        assert sidecar.terminate() == 0
        sidecar.start()
        for path in PATHS.values():
            with OwnClient(sidecar.target, path=path) as client:
                held = client.lookup(keys)
                assert held.held == 8
                request = pb.PrefetchRequest(session_id=client.id, keys=b"".join(keys))
                answer = client.stub.Prefetch(request, timeout=TIMEOUT_S)
                assert answer.in_ram + answer.promoting == 8
                assert client.verify(keys) == 8


def test_stats_need_no_session(sidecar: Sidecar, client: OwnClient) -> None:
    client.store(client.keys(1, 2))
    stats = client.stub.Stats(pb.StatsRequest(), timeout=TIMEOUT_S)
    assert [tier.name for tier in stats.tiers] == ["cpu", "disk"]
    assert stats.tiers[0].capacity_bytes == 16 << 20
    assert stats.counters["committed_chunks"] >= 2
    assert stats.sessions >= 1
    assert stats.spaces >= 1


def test_health_and_reflection(sidecar: Sidecar, client: OwnClient) -> None:
    health: Any = health_pb2_grpc.HealthStub(client.channel)
    for service in ("", "kvtier.v1.Cache"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    listing = reflection.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=TIMEOUT_S
    )
    [answer] = list(listing)
    names = {service.name for service in answer.list_services_response.service}
    assert {"kvtier.v1.Cache", "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize(
    ("wire", "ours"),
    [
        (pb.EndReason, answers.LoadStop),
        (pb.ReserveStatus, answers.ReserveOutcome),
        (pb.CommitStatus, answers.CommitOutcome),
        (pb.KeyState, answers.KeyState),
    ],
)
def test_enums_have_the_numbers_of_the_wire(wire: type, ours: type) -> None:
    named = {name.split("_", 2)[2]: number for name, number in wire.items()}  # type: ignore[attr-defined]
    assert named.pop("UNSPECIFIED") == 0
    assert named == {each.name: each.value for each in ours}  # type: ignore[attr-defined]
